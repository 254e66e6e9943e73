"""The largest curvature against the largest that the optimizer can follow: sharpness, preconditioned sharpness, their limits.

P: number of parameters; H: Hessian on the probe batch; w: weight decay; D: diagonal preconditioner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from towtank.linalg.operator import LinearOperator
from towtank.signals.as_met import as_met, preconditioner
from towtank.signals.step import CannotTell, Step

if TYPE_CHECKING:
    from towtank.problem import Problem

BASIS = 8  # vectors of P numbers that are held: the memory of a measurement must stay below that of a training step
COST_PER_CALL = (
    20.0  # gradients: 6 to 8 products of 2, building the graphs and the self-check (bench cases, warm start)
)
Preconditioner = Callable[[torch.optim.Optimizer, "Problem"], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Curvature:
    """A largest eigenvalue.

    Args:
        value: the largest Ritz value, a lower bound of the largest eigenvalue up to rounding.
        error: |A x - value x|: some eigenvalue lies within it.
        vector: the unit vector x, (P,).
        products: operator products it took.
        converged: whether the error met the tolerance.
    """

    value: float
    error: float
    vector: Tensor
    products: float
    converged: bool


def largest(
    op: LinearOperator, *, tol: float = 0.05, start: Tensor | None = None, seed: int = 0, max_products: int = 100
) -> Curvature:
    """The largest eigenvalue of an operator (P, P).

    Args:
        op: symmetric.
        tol: error allowed, as a share of the value.
        start: an eigenvector found before, (P,), mixed with as much of a random vector; another shape is left out.
        seed: of the random vector.
        max_products: where to stop at the latest.

    Raises:
        ValueError: if a product is not finite.

    Example:
        >>> found = largest(LinearOperator.from_matrix(torch.diag(torch.tensor([1.0, 4.0, -9.0]))))
        >>> round(found.value, 4), found.converged
        (4.0, True)

    Source: see `towtank.eigsh`.
    """
    from towtank.linalg.eigsh import eigsh

    fits = start is not None and start.shape == op.shape[:1] and bool(torch.isfinite(start).all()) and bool(start.any())
    pairs = eigsh(
        op,
        tol=tol,
        start=start if fits else None,
        generator=seed,
        max_products=max_products,
        max_basis=BASIS if op.shape[0] > 4 * BASIS else None,
        progress=False,
    )
    return Curvature(
        value=float(pairs.values[0]),
        error=float(pairs.residuals[0]),
        vector=pairs.vectors[:, 0].clone(),
        products=pairs.products,
        converged=pairs.converged,
    )


@contextmanager
def telling() -> Generator[None, None, None]:
    """Turn what makes a measurement impossible into the answer that it is.

    Raises:
        CannotTell: in place of errors of value, type or missing derivatives.
        OutOfMemoryError: as it came.
    """
    try:
        yield
    except (CannotTell, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        raise CannotTell(" ".join(str(error).split())) from error


@dataclass(frozen=True, kw_only=True)
class Sharpness:
    """The probe of `sharpness`."""

    name: ClassVar[str] = "sharpness"

    tol: float = 0.05
    max_products: int = 100

    def cost(self, problem: Problem) -> float:
        """Gradients of the probe batch that a call costs."""
        return COST_PER_CALL

    def __call__(self, step: Step) -> dict[str, float]:
        """Measure it."""
        with telling():
            factor = _factor(step.optimizer)
            op: LinearOperator = step.hessian
            if factor is not None and step.optimizer is not None:
                op = as_met(op, step.optimizer, step.problem, None)
            found = _warm(step, "stability/sharpness", op, self.tol, self.max_products)
        said = {"curvature/sharpness": found.value, "curvature/sharpness_error": found.error}
        return said if factor is None else said | {"stability/sharpness_ratio": step.lr * found.value / factor}


@dataclass(frozen=True, kw_only=True)
class PreconditionedSharpness:
    """The probe of `preconditioned_sharpness`."""

    name: ClassVar[str] = "preconditioned_sharpness"

    tol: float = 0.05
    max_products: int = 100
    diagonal: Preconditioner | None = None
    factor: float | None = None

    def cost(self, problem: Problem) -> float:
        """Gradients of the probe batch that a call costs."""
        return COST_PER_CALL

    def __call__(self, step: Step) -> dict[str, float]:
        """Measure it.

        Raises:
            CannotTell: if the optimizer has no preconditioner that is known, or no state yet.
        """
        if step.optimizer is None:
            raise CannotTell("expected an optimizer, got none; give it to the monitor")
        with telling():
            D = (self.diagonal or preconditioner)(step.optimizer, step.problem)
            factor = _adaptive_factor(step.optimizer) if self.factor is None else self.factor
            op = as_met(step.hessian, step.optimizer, step.problem, D)
            found = _warm(step, "stability/preconditioned", op, self.tol, self.max_products)
        key = "curvature/preconditioned_sharpness"
        said = {key: found.value, f"{key}_error": found.error}
        return said if factor is None else said | {"stability/preconditioned_ratio": step.lr * found.value / factor}


@dataclass(frozen=True, kw_only=True)
class StabilityLimit:
    """The probe of `stability_limit`."""

    name: ClassVar[str] = "stability_limit"
    first: int = 1

    tol: float = 0.05
    max_products: int = 100

    def cost(self, problem: Problem) -> float:
        """Gradients of the probe batch that a call costs."""
        return COST_PER_CALL

    def __call__(self, step: Step) -> dict[str, float]:
        """Measure it.

        Raises:
            CannotTell: if there is no optimizer, or one whose limit is not known.
        """
        from towtank.curvature.limits import stability_factor

        if step.optimizer is None:
            raise CannotTell("expected an optimizer, got none; give it to the monitor, or use the probe sharpness")
        with telling():
            adaptive = stability_factor(step.optimizer).adaptive
        age = _age(step.optimizer)
        if adaptive and age < 2:
            raise CannotTell(f"expected averages over at least 2 steps, got an optimizer that has taken {age:g}; wait")
        kind = PreconditionedSharpness if adaptive else Sharpness
        said = kind(tol=self.tol, max_products=self.max_products)(step)
        ratio = next((v for k, v in said.items() if k.endswith("_ratio")), None)
        step.kept["stability/last"] = (step.lr, ratio)
        if ratio is not None:
            _tell_trend(step, ratio)
        return said

    def stale(self, step: Step) -> bool:
        """Whether the learning rate has been raised beyond the limit since it was measured: by a fourth at least."""
        lr, ratio = step.kept.get("stability/last", (0.0, None))
        return ratio is not None and step.lr > 1.25 * lr > 0 and ratio * step.lr / lr > 1


def _tell_trend(step: Step, ratio: float) -> None:
    """Note what the ratio is doing, when that changes."""
    from towtank.signals.trend import sharpness_trend

    series = step.kept.setdefault("stability/series", [])
    series.append((step.number, ratio))
    del series[:-200]
    found = sharpness_trend(*zip(*series, strict=True), lr=1.0, factor=1.0)
    if found.kind not in ("cannot tell", step.kept.get("stability/kind")):
        step.kept["stability/kind"] = found.kind
        step.note("stability", str(found))


def _age(optimizer: torch.optim.Optimizer) -> float:
    """Steps that an optimizer has taken with the parameter that it knows longest."""
    return max((float(state.get("step", 2)) for state in optimizer.state.values()), default=0.0)


def sharpness(tol: float = 0.05, *, max_products: int = 100) -> Sharpness:
    """A probe of the largest eigenvalue of the Hessian, and of how near it is to what gradient descent can follow.

    curvature/sharpness = lambda_max(H + w), stability/sharpness_ratio = lr lambda_max / c; c = 2 for gradient descent,
    2 (1 + mu) with heavy-ball momentum mu, see `towtank.curvature.limits`. The step is unstable beyond ratio 1 on the
    quadratic approximation of the full loss. w is SGD's weight decay, which is part of the gradient it follows. Where its
    groups learn at different rates, H is scaled to the largest. Of another optimizer there is no ratio, and no w.

    The `_error` is the residual of the eigenvector: an eigenvalue lies within it. Each call starts from the eigenvector of the
    one before, which is kept (P numbers).

    Args:
        tol: residual allowed, as a share of the eigenvalue.
        max_products: Hessian products after which it stops.

    Example:
        The loss 2 w^2 has curvature 4; lr = 0.45 is 0.9 of the limit 2 / 4.

        >>> from towtank.problem import Problem
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> batch = torch.ones(1, 1), torch.zeros(1, 1)
        >>> loss = lambda z, y: 2 * (z - y).square().mean()
        >>> step = Step(number=1, loss=torch.zeros(()), model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.45),
        ...             problem_of=lambda batch: Problem(model, loss, batch), probe_batch=batch)
        >>> said = sharpness()(step)
        >>> round(said["curvature/sharpness"], 4), round(said["stability/sharpness_ratio"], 4)
        (4.0, 0.9)

    Source: Cohen et al. 2021, "Gradient descent on neural networks typically occurs at the edge of stability", equation 1
    and appendix B.
    """
    return Sharpness(tol=tol, max_products=max_products)


def preconditioned_sharpness(
    tol: float = 0.05,
    *,
    max_products: int = 100,
    diagonal: Preconditioner | None = None,
    factor: float | None = None,
) -> PreconditionedSharpness:
    """A probe of the largest eigenvalue of D^-1/2 (H + w) D^-1/2, the curvature an adaptive optimizer meets.

    stability/preconditioned_ratio = lr S / c, c = 2 (1 + beta1) / (1 - beta1) for Adam: 38 at beta1 = 0.9. D is that of the
    optimizer's state, with bias correction and eps, see `towtank.adam_preconditioner`; w is weight decay that is part of the
    gradient (Adam's, not AdamW's). Known are the adaptive optimizers of `torch.optim`, and AdamW, AdaBelief and AdaHessian of
    `towtank.optim`. NAdam has no known limit: there is S without a ratio.

    Args:
        tol: residual allowed, as a share of the eigenvalue.
        max_products: Hessian products after which it stops.
        diagonal: `diagonal(optimizer, problem)` -> D (P,), for other optimizers.
        factor: c, for other optimizers.

    Example:
        >>> probe = preconditioned_sharpness(diagonal=lambda optimizer, problem: torch.ones(problem.size), factor=2.0)
        >>> probe.tol, probe.factor
        (0.05, 2.0)

    Source: Cohen et al. 2022, "Adaptive gradient methods at the edge of stability", equations 2 and 4.
    """
    return PreconditionedSharpness(tol=tol, max_products=max_products, diagonal=diagonal, factor=factor)


def stability_limit(tol: float = 0.05, *, max_products: int = 100) -> StabilityLimit:
    """The probe of the two that is about the optimizer in use: `sharpness` for SGD, else `preconditioned_sharpness`.

    Args:
        tol: residual allowed, as a share of the eigenvalue.
        max_products: Hessian products after which it stops.

    Example:
        >>> stability_limit().tol
        0.05
    """
    return StabilityLimit(tol=tol, max_products=max_products)


def _warm(step: Step, key: str, op: LinearOperator, tol: float, max_products: int) -> Curvature:
    """The largest eigenvalue from the last eigenvector; another seed at each step, so that what one missed the next finds."""
    found = largest(op, tol=tol, start=step.kept.get(key), seed=step.number, max_products=max_products)
    step.kept[key] = found.vector
    return found


def _factor(optimizer: torch.optim.Optimizer | None) -> float | None:
    """The c of plain descent, None for other optimizers."""
    from towtank.curvature.limits import stability_factor

    try:
        found = None if optimizer is None else stability_factor(optimizer)
    except TypeError:
        return None
    return None if found is None or found.adaptive else found.value


def _adaptive_factor(optimizer: torch.optim.Optimizer) -> float | None:
    from towtank.curvature.limits import stability_factor

    found = stability_factor(optimizer)
    if not found.adaptive:
        raise CannotTell(f"expected an adaptive optimizer, got {type(optimizer).__name__}; use the probe sharpness")
    return None if math.isnan(found.value) else found.value
