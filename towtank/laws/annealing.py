"""The learning-rate-annealing law: a loss curve from two areas of its schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from scipy.signal import lfilter

from towtank.laws.curve_fit import Points
from towtank.laws.curve_law import CurveLaw
from towtank.laws.parametric import Parameter, grid
from towtank.laws.schedules import Schedule
from towtank.laws.table import Floats, Ints

MOMENTA = (0.99, 0.995, 0.999, 0.9995)  # the range in which the fit hardly tells momenta apart


def annealing_areas(
    schedule: Schedule, momentum: float, *, warmup: Literal["as run", "peak"] = "as run"
) -> tuple[Floats, Floats]:
    """Forward area S1 and annealing area S2 of a schedule after each of its steps.

        S1(s) = sum_{i<=s} eta_i,   S2(s) = sum_{i<=s} m_i,   m_i = momentum m_{i-1} + (eta_{i-1} - eta_i),   m_0 = 0

    The warm-up is left out of S2: until the first step at the peak its rates count as the peak there.

    Tissue, Wang and Wang 2024, "Scaling law with learning rate annealing", equations 1 and 2.

    Args:
        schedule: the rates.
        momentum: how slowly the effect of a fall builds up, between 0 and 1.
        warmup: whether S1 counts the rates of the warm-up as they were run, or as the peak.

    Example:
        >>> s1, s2 = annealing_areas(Schedule(np.array([1.0, 1.0, 0.5, 0.5])), 0.5)
        >>> s1, s2
        (array([1. , 2. , 2.5, 3. ]), array([0.  , 0.  , 0.5 , 0.75]))
    """
    flat = np.array(schedule.rates)
    flat[: schedule.warmup] = schedule.peak
    fall = -np.diff(flat, prepend=flat[0])
    s2 = np.cumsum(lfilter([1.0], [1.0, -momentum], fall))
    return np.cumsum(schedule.rates if warmup == "as run" else flat), s2


@dataclass(frozen=True)
class Areas:
    """What the law needs of a schedule: S1, S2 and the size of the model at each row."""

    s1: Floats
    s2: Floats
    size: Floats


@dataclass(frozen=True, kw_only=True)
class AnnealingLaw(CurveLaw):
    """L(s) = L0 + A S1^-alpha - C S2, and with `by_size` + B N^-beta; see `annealing_areas`.

    C and the momentum trade against each other: C / (1 - momentum) is what a fit determines (`fit.identifiability`).

    Tissue, Wang and Wang 2024, "Scaling law with learning rate annealing", equation 1 (momentum 0.999, between 0.99 and
    0.999; Huber delta 1e-3 on the log loss), and its section on the model size.

    Args:
        momentum: momentum of the annealing area.
        warmup: whether S1 counts the warm-up's rates as they were run, or as the peak.
        by_size: whether the curves are of models of several sizes N (parameters), with the term B N^-beta.

    Example:
        >>> from towtank.laws.schedules import constant, cosine
        >>> runs = {"flat": constant(peak=1e-3, steps=4001), "cosine": cosine(peak=1e-3, steps=4001)}
        >>> def loss(run):
        ...     s1, s2 = annealing_areas(run, 0.999)
        ...     return [(s, run.rates[s], 2 + 0.5 * s1[s] ** -0.6 - 0.3 * s2[s]) for s in range(200, 4001, 100)]
        >>> fit = AnnealingLaw(draws=20).fit_curves({n: loss(r) for n, r in runs.items()}, schedules=runs)
        >>> {name: round(c.value, 6) for name, c in fit.coefficients.items()}
        {'L0': 2.0, 'A': 0.5, 'alpha': 0.6, 'C': 0.3}
    """

    momentum: float = 0.999
    warmup: Literal["as run", "peak"] = "as run"
    by_size: bool = False

    name: ClassVar[str] = "annealing"
    formula: ClassVar[str] = "L = L0 + A S1^-alpha - C S2 (+ B N^-beta)"
    variables: ClassVar[Mapping[str, str]] = {"step": "update", "lr": "learning rate of every step"}
    source: ClassVar[str] = "Tissue, Wang and Wang 2024, equation 1"
    needs: ClassVar[str] = "loss curves (curve, step, lr, loss), one of them with a falling rate; better five"

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"expected a momentum between 0 and 1, got {self.momentum}")
        if self.warmup not in ("as run", "peak"):
            raise ValueError(f"warmup = {self.warmup!r}: expected 'as run' | 'peak'")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """L0, A, alpha, C, and with `by_size` B, beta."""
        size = (Parameter("B", 1e-9, 1e12), Parameter("beta", 0.0, 3.0, log=False)) if self.by_size else ()
        return (
            Parameter("L0", 0.0, 100.0, log=False), Parameter("A", 1e-9, 1e9), Parameter("alpha", 0.0, 3.0, log=False),
            Parameter("C", 0.0, 1e9, log=False), *size,
        )  # fmt: skip

    @property
    def needs_size(self) -> bool:
        """Whether the size of each model must be given."""
        return self.by_size

    def features(self, schedule: Schedule, steps: Ints, size: float) -> Areas:
        """S1 and S2 at the steps."""
        s1, s2 = annealing_areas(schedule, self.momentum, warmup=self.warmup)
        return Areas(s1[steps], s2[steps], np.full(steps.size, size))

    def join(self, features: Sequence[Areas]) -> Areas:
        """The rows of several schedules as one."""
        return Areas(*(np.concatenate([getattr(f, name) for f in features]) for name in ("s1", "s2", "size")))

    def value(self, c: Mapping[str, float], features: Areas) -> tuple[Floats, dict[str, Floats]]:
        """The formula and its derivatives."""
        power = features.s1 ** -c["alpha"]
        slopes = {
            "L0": np.ones_like(power), "A": power, "C": -features.s2, "alpha": -c["A"] * power * np.log(features.s1)
        }  # fmt: skip
        loss = c["L0"] + c["A"] * power - c["C"] * features.s2
        if self.by_size:
            share = features.size ** -c["beta"]
            loss = loss + c["B"] * share
            slopes |= {"B": share, "beta": -c["B"] * share * np.log(features.size)}
        return loss, slopes

    def starts(self, points: Points) -> dict[str, Floats]:
        """Exponents from 0.1 to 1; the linear coefficients by least squares."""
        exponents: dict[str, Sequence[float]] = {"alpha": [0.1, 0.3, 0.5, 0.7, 1.0]}
        if self.by_size:
            return linear_starts(self, points, grid(**exponents, beta=[0.1, 0.3, 0.6]), ("L0", "A", "C", "B"))
        return linear_starts(self, points, grid(**exponents), ("L0", "A", "C"))

    def annealed(self, c: Mapping[str, float], features: Areas) -> Floats:
        """C S2."""
        return c["C"] * features.s2

    def rivals(self) -> tuple[CurveLaw, ...]:
        """Other momenta."""
        return tuple(replace(self, momentum=m) for m in sorted({*MOMENTA, self.momentum}) if m < 1)

    def combined(self, c: Mapping[str, float]) -> tuple[str, str, str, float]:
        """C / (1 - momentum): the loss taken off by a fall of 1 in the long run."""
        return "C", "momentum", "C / (1 - momentum)", float(c["C"] / (1 - self.momentum))


def linear_starts(
    law: CurveLaw, points: Points, given: Mapping[str, Floats], linear: tuple[str, ...]
) -> dict[str, Any]:
    """Starts whose exponents are given and whose linear coefficients solve the least-squares problem of the loss."""
    y = np.exp(points.log_loss)
    count = len(next(iter(given.values())))
    found: dict[str, list[float]] = {name: [] for name in linear}
    for i in range(count):
        c = {**dict.fromkeys(linear, 1.0), **{name: float(v[i]) for name, v in given.items()}}
        slopes = law.value(c, points.joined)[1]
        columns = np.stack([slopes[name] for name in linear], axis=1)
        scale = np.abs(columns).max(0)
        used = scale > 0
        solved = np.ones(len(linear))
        solved[used] = np.linalg.lstsq(columns[:, used] / scale[used], y, rcond=None)[0] / scale[used]
        for name, v in zip(linear, solved, strict=True):
            found[name].append(v if v > 0 else 1e-3 * y.min() / max(scale[linear.index(name)], 1e-300))
    return {**given, **{name: np.array(v) for name, v in found.items()}}
