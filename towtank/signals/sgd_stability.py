"""Trace and Frobenius norm of the Hessian against what stochastic gradient descent can follow, and the Fisher trace.

H: Hessian on the probe batch; x: gradient of the output of one example; B: batch size; mu: momentum; P: number of parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from towtank.signals.stability import telling
from towtank.signals.step import CannotTell, Step

if TYPE_CHECKING:
    from towtank.estimate import Estimate
    from towtank.problem import Problem


@dataclass(frozen=True, kw_only=True)
class SGDRatios:
    """How near a minimum is to what SGD can follow; 1 at the bound.

    Args:
        trace: lr tr(H) / (2 B (1 - mu)).
        frobenius: lr |H|_F / (sqrt(B) (1 - mu)).
    """

    trace: float
    frobenius: float


def sgd_ratios(trace: float, frobenius: float, *, lr: float, batch_size: int, momentum: float = 0.0) -> SGDRatios:
    """The two necessary conditions for a minimum to be linearly stable for SGD.

    Assumed: a minimum that fits every example, squared error of one output, so that the Hessian of an example is x x^T, and
    batches of B examples drawn independently. The second moment M of the distance from the minimum then moves by

        M <- M - lr (H M + M H) + lr^2 (E[x x^T M x x^T] / B + (1 - 1/B) H M H),

    a symmetric positive map. Its Rayleigh quotient at M = I is at least 1 where lr E|x|^4 / B >= 2 tr(H), and E|x|^4 >= tr(H)^2:
    so lr tr(H) <= 2 B is necessary, and at B = 1 with examples of equal |x| also sufficient. For the loss instead,
    E[loss'] >= (lr^2 / B) |H|_F^2 a loss, where a is the alignment of the noise, Cov(x x^T e) >= 2 a loss H; a >= 1 for Gaussian
    x. So lr |H|_F <= sqrt(B) is necessary where a >= 1; it is no bound where examples agree (one repeated example has a = 0).
    With C outputs the Hessian of an example has rank up to C, and the first condition weakens to lr tr(H) <= 2 B C. Drawing
    without replacement from n examples, 1 / B becomes (n - B) / (B (n - 1)).

    Momentum adds noise up as a rate lr / (1 - mu) would, to first order in lambda_1 / tr(H): in one dimension the condition is
    lr (s^2 / (1 - mu) + lambda^2 / (1 + mu)) <= 2 lambda, s^2 the variance of the curvature of a batch. The part of the noise
    is 1 - mu times stricter, that of the mean 1 + mu times looser.

    A ratio beyond 1 says that SGD leaves such a minimum; below 1 it does not promise that it stays: see `sharpness` for the
    mean.

    Args:
        trace: tr(H), H of the mean loss of an example.
        frobenius: |H|_F.
        lr: learning rate.
        batch_size: B, examples of one step.
        momentum: mu.

    Raises:
        ValueError: if the batch size or 1 - mu is not positive.

    Example:
        >>> sgd_ratios(40.0, 10.0, lr=0.1, batch_size=4)
        SGDRatios(trace=0.5, frobenius=0.5)

    Source: Wu and Su 2023, "The implicit regularization of dynamical stability in SGD" (trace, B = 1); Wu, Wang and Su 2022,
    "The alignment property of SGD noise" (Frobenius norm). Those for B, C and mu are derived here.
    """
    if batch_size < 1 or momentum >= 1:
        raise ValueError(f"expected a batch of at least 1 and momentum below 1, got {batch_size} and {momentum}")
    rate = lr / (1 - momentum)
    return SGDRatios(trace=rate * trace / (2 * batch_size), frobenius=rate * frobenius / batch_size**0.5)


@dataclass(frozen=True, kw_only=True)
class CurvatureTrace:
    """The probe of `curvature_trace`."""

    rtol: float = 0.1
    max_products: int = 100
    batch_size: int | None = None

    def cost(self, problem: Problem) -> float:
        """Gradients of the probe batch that a call costs, at most."""
        return 2.0 * min(self.max_products, max(problem.size, 1)) / 2

    def __call__(self, step: Step) -> dict[str, float]:
        """Measure it."""
        from towtank.linalg.trace import trace

        with telling():
            found = trace(
                step.hessian, rtol=self.rtol, max_products=self.max_products, generator=step.number, progress=False
            )
        ratio = _ratios(step, found.value, 0.0, self.batch_size)
        return _said("curvature/trace", found) | ({} if ratio is None else {"stability/trace_ratio": ratio.trace})


@dataclass(frozen=True, kw_only=True)
class CurvatureFrobenius:
    """The probe of `curvature_frobenius`."""

    rtol: float = 0.1
    max_products: int = 100
    batch_size: int | None = None

    def cost(self, problem: Problem) -> float:
        """Gradients of the probe batch that a call costs, at most."""
        return 2.0 * min(self.max_products, max(problem.size, 1)) / 2

    def __call__(self, step: Step) -> dict[str, float]:
        """Measure it."""
        from towtank.linalg.norm import frobenius_norm

        with telling():
            found = frobenius_norm(
                step.hessian, rtol=self.rtol, max_products=self.max_products, generator=step.number, progress=False
            )
        ratio = _ratios(step, 0.0, found.value, self.batch_size)
        said = _said("curvature/frobenius", found)
        return said if ratio is None else said | {"stability/frobenius_ratio": ratio.frobenius}


@dataclass(frozen=True, kw_only=True)
class FisherTrace:
    """The probe of `fisher_trace`."""

    rtol: float = 0.1
    max_products: int = 100

    def cost(self, problem: Problem) -> float:
        """Gradients of the probe batch that a call costs: a forward pass and some 25 backward passes."""
        return 20.0

    def __call__(self, step: Step) -> dict[str, float]:
        """Measure it.

        Raises:
            CannotTell: if the loss is no likelihood.
        """
        from towtank.curvature.fisher import Fisher
        from towtank.linalg.trace import trace

        with telling():
            found = trace(
                Fisher(step.problem),
                rtol=self.rtol,
                max_products=self.max_products,
                generator=step.number,
                progress=False,
            )
        return _said("curvature/fisher_trace", found)


def curvature_trace(rtol: float = 0.1, *, max_products: int = 100, batch_size: int | None = None) -> CurvatureTrace:
    """A probe of the trace of the Hessian, and of its ratio to the bound of SGD: see `sgd_ratios`.

    The ratio is given for SGD alone, with its momentum; of other optimizers there is the trace without a ratio. A negative trace,
    as far from a minimum, is near no bound.

    Args:
        rtol: standard error asked for, as a share of the trace.
        max_products: where to stop at the latest.
        batch_size: examples that a step averages over; None counts those of the step's batch, which is right without
            gradient accumulation and data-parallel training.

    Example:
        >>> curvature_trace(batch_size=32).batch_size
        32

    Source: Wu and Su 2023.
    """
    return CurvatureTrace(rtol=rtol, max_products=max_products, batch_size=batch_size)


def curvature_frobenius(
    rtol: float = 0.1, *, max_products: int = 100, batch_size: int | None = None
) -> CurvatureFrobenius:
    """A probe of the Frobenius norm of the Hessian, and of its ratio to the bound of SGD: see `sgd_ratios`.

    Args:
        rtol: standard error asked for, as a share of the norm.
        max_products: where to stop at the latest.
        batch_size: see `curvature_trace`.

    Example:
        >>> curvature_frobenius(batch_size=32).batch_size
        32

    Source: Wu, Wang and Su 2022.
    """
    return CurvatureFrobenius(rtol=rtol, max_products=max_products, batch_size=batch_size)


def fisher_trace(rtol: float = 0.1, *, max_products: int = 100) -> FisherTrace:
    """A probe of the trace of the Fisher matrix: the mean square of a single term's gradient, over the model's own labels.

    tr(F) = E_x E_{y ~ p(. | x)} |grad log p(y | x)|^2, sampled by random signs on a root of the covariance of the output gradient,
    which has the expectation of sampled labels and less scatter. See `towtank.signals.trend.early_peak` for its peak.

    Args:
        rtol: standard error asked for, as a share of the trace.
        max_products: where to stop at the latest.

    Example:
        >>> fisher_trace().rtol
        0.1

    Source: Jastrzebski et al. 2021, "Catastrophic Fisher explosion", equation 2.
    """
    return FisherTrace(rtol=rtol, max_products=max_products)


def _said(key: str, found: Estimate) -> dict[str, float]:
    return {key: found.value, f"{key}_error": found.stderr}


def _ratios(step: Step, trace: float, frobenius: float, batch_size: int | None) -> SGDRatios | None:
    """The ratios for SGD; None for other optimizers."""
    optimizer = step.optimizer
    rule = getattr(getattr(optimizer, "rule", None), "name", "")
    if optimizer is None or not (isinstance(optimizer, torch.optim.SGD) or rule == "sgd"):
        return None
    B = _examples(step.batch) if batch_size is None else batch_size
    group: dict[str, Any] = optimizer.param_groups[0]
    mu = float(group.get("momentum", 0.0))
    lr = step.lr * (1 - float(group.get("dampening", 0.0)) if mu else 1.0)
    return sgd_ratios(trace, frobenius, lr=lr, batch_size=B, momentum=mu)


def _examples(batch: Any) -> int:
    from towtank.problem.data import examples

    found = None if batch is None else examples(batch)
    if not found:
        raise CannotTell("expected the number of examples of a step, got a batch that does not say; give batch_size=")
    return found
