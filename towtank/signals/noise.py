"""Probes of gradient noise: noise scale, coherence, and the tests for batch growth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from towtank.problem import Problem
from towtank.signals.batch_tests import batch_growth_tests
from towtank.signals.coherence import gradient_coherence
from towtank.signals.noise_scale import (
    NoiseScale,
    NoiseStream,
    noise_scale_from_examples,
    noise_scale_from_parts,
)
from towtank.signals.per_example import ExampleGradients, pass_cost
from towtank.signals.step import CannotTell, Need, Probe, Step

Source = Literal["auto", "parts", "examples"]
_INNER = 3.0  # gradients that the products with the mean gradient cost


def gradient_noise(
    source: Source = "auto",
    *,
    steps: float | None = None,
    parts: Literal["means", "sums"] = "means",
    part_size: int | None = None,
) -> Probe:
    """Probe of the gradient noise scale B_simple = tr(Sigma) / |G|^2, in examples, with a 95 % interval.

    From the parts of a step (micro-batches, accumulation, data-parallel processes) it costs nothing; from single examples it is
    dear. |G|^2 and tr(Sigma) are averaged over steps before they are divided. Readings: noise/scale with _low and _high, where
    the upper end is infinite if |G|^2 cannot be told from 0; noise/signal and noise/noise, |G|^2 and tr(Sigma); noise/critical_batch, the same number where it has an upper end;
    noise/snr/{tensor} = |G|^2 / tr(Sigma) of each tensor.

    Args:
        source: "parts", "examples", or "auto": parts where a step has two or more, else examples.
        steps: number of measured steps that the averages are worth; default 100 for parts, 10 for examples.
        parts: whether each part's loss was a mean over its examples, or a sum (or mean over the whole step).
        part_size: examples of each part, where the recording does not say.

    Raises:
        ValueError: if the source is unknown, or steps are fewer than one.

    Example:
        >>> gradient_noise("parts").needs
        frozenset({'micro'})
    """
    if source not in ("auto", "parts", "examples"):
        raise ValueError(f'expected source "auto", "parts" or "examples", got {source!r}')
    if steps is not None and steps < 1:
        raise ValueError(f"expected averages over at least 1 step, got {steps}")
    of_parts = PartNoise(steps=steps or 100.0, parts=parts, part_size=part_size)
    of_examples = ExampleNoise(steps=steps or 10.0)
    if source == "auto":
        return AnyNoise(of_parts=of_parts, of_examples=of_examples)
    return of_parts if source == "parts" else of_examples


@dataclass(frozen=True, kw_only=True)
class PartNoise:
    """The noise scale from the parts of a step; see `gradient_noise`."""

    steps: float = 100.0
    parts: Literal["means", "sums"] = "means"
    part_size: int | None = None
    quiet: bool = False  # whether a step of one part is passed over in silence
    name: ClassVar[str] = "gradient_noise of parts"
    needs: ClassVar[frozenset[Need]] = frozenset({"micro"})

    def __call__(self, step: Step) -> Mapping[str, float]:
        """Readings of a step.

        Raises:
            CannotTell: if the step has fewer than two parts, their sizes are unknown, or no step was finite yet.
        """
        micro = step.micro
        count = len(micro.squares)
        if count < 2 and self.quiet:
            return {}
        if count < 2:
            raise CannotTell(f'expected a step of at least 2 parts, got {count}; use gradient_noise("examples")')
        sizes = micro.sizes or (self.part_size and (self.part_size,) * count)
        if not sizes:
            raise CannotTell("expected parts of known size, got none; give gradient_noise(part_size=)")
        found = noise_scale_from_parts(micro.squares, sizes, micro.total, parts=self.parts)
        return _readings(_streamed(step, "noise", self.steps, found))


@dataclass(frozen=True, kw_only=True)
class ExampleNoise:
    """The noise scale from gradients of single examples; see `gradient_noise`."""

    steps: float = 10.0
    spare: bool = False  # whether nothing is done where the parts of steps tell the same
    name: ClassVar[str] = "gradient_noise of examples"

    def __call__(self, step: Step) -> Mapping[str, float]:
        """Readings of a step.

        Raises:
            CannotTell: if there are fewer than three examples, or their gradients cannot be told.
        """
        if self.spare and "noise" in step.kept:
            return {}
        return _readings(_streamed(step, "noise/examples", self.steps, example_noise_scale(step.examples)))

    def cost(self, problem: Problem) -> float:
        """Expected cost of a call, in gradients of the batch."""
        return pass_cost(problem) + _INNER


@dataclass(frozen=True, kw_only=True)
class AnyNoise:
    """The noise scale from parts where a step has them, else from examples; see `gradient_noise`."""

    of_parts: PartNoise
    of_examples: ExampleNoise
    name: ClassVar[str] = "gradient_noise"
    needs: ClassVar[frozenset[Need]] = frozenset({"micro"})

    def __call__(self, step: Step) -> Mapping[str, float]:
        """Readings of a step."""
        return self.of_parts(step) if len(step.micro.squares) > 1 else self.of_examples(step)

    def cost(self, problem: Problem) -> float:
        """Expected cost of a call from examples, in gradients of the batch; from parts there is none."""
        return self.of_examples.cost(problem)


@dataclass(frozen=True, kw_only=True)
class CoherenceProbe:
    """See `coherence`."""

    name: ClassVar[str] = "coherence"

    def __call__(self, step: Step) -> Mapping[str, float]:
        """Readings of a step."""
        found = gradient_coherence(step.examples.squares, step.examples.inners)
        unbiased = found.unbiased
        return {
            "noise/coherence": found.biased,
            "noise/coherence_unbiased": unbiased.value,
            "noise/coherence_unbiased_low": unbiased.low,
            "noise/coherence_unbiased_high": unbiased.high,
        }

    def cost(self, problem: Problem) -> float:
        """Expected cost of a call, in gradients of the batch; nothing more where another probe asked for examples."""
        return pass_cost(problem) + _INNER


def coherence() -> Probe:
    """Probe of the coherence of the examples of a step's batch; see `gradient_coherence`.

    Readings: noise/coherence, over all pairs, between 1/M and 1; noise/coherence_unbiased with _low and _high (95 %).
    """
    return CoherenceProbe()


@dataclass(frozen=True, kw_only=True)
class BatchTestProbe:
    """See `batch_tests`."""

    eta: float
    theta: float
    nu: float
    name: ClassVar[str] = "batch_tests"

    def __call__(self, step: Step) -> Mapping[str, float]:
        """Readings of a step."""
        examples = step.examples
        found = batch_growth_tests(examples.squares, examples.inners, eta=self.eta, theta=self.theta, nu=self.nu)
        return {
            "noise/norm_test_batch": found.norm,
            "noise/inner_product_test_batch": found.inner_product,
            "noise/augmented_test_batch": found.augmented,
        }

    def cost(self, problem: Problem) -> float:
        """Expected cost of a call, in gradients of the batch; nothing more where another probe asked for examples."""
        return pass_cost(problem) + _INNER


def batch_tests(*, eta: float = 0.5, theta: float = 0.9, nu: float = 5.84) -> Probe:
    """Probe of the batch sizes that the norm, inner-product and augmented tests ask for; see `batch_growth_tests`.

    Args:
        eta: of the norm test.
        theta: of the inner-product test.
        nu: of the orthogonality test.
    """
    return BatchTestProbe(eta=eta, theta=theta, nu=nu)


def example_noise_scale(examples: ExampleGradients) -> NoiseScale:
    """The noise scale of one batch from the gradients of its examples.

    Args:
        examples: gradients of single examples.

    Raises:
        CannotTell: if there are fewer than three.
    """
    if examples.count < 3:
        raise CannotTell(f"expected a batch of at least 3 examples, got {examples.count}")
    means = examples.mean_squares
    tensors = {n: (square, means[n]) for n, square in examples.tensor_squares.items()}
    return noise_scale_from_examples(examples.squares, examples.inners, tensors=tensors)


def _streamed(step: Step, key: str, steps: float, found: NoiseScale) -> NoiseScale:
    stream = step.kept.get(key, NoiseStream(steps=steps)).add(found)
    step.kept[key] = stream
    if not stream.weight:
        raise CannotTell("expected finite gradients of all parts, got none yet")
    return stream.estimate()


def _readings(found: NoiseScale) -> dict[str, float]:
    scale = found.scale()
    readings = {"noise/scale": scale.value, "noise/scale_low": scale.low, "noise/scale_high": scale.high}
    readings |= {"noise/signal": float(found.signal), "noise/noise": float(found.noise)}
    if math.isfinite(scale.high):
        readings["noise/critical_batch"] = scale.value
    return readings | {f"noise/snr/{n}": x for n, x in found.snr.items()}
