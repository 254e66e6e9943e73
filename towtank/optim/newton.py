"""Newton's method regularized by the gradient's norm, for any matrix that is known by its products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Status = Literal["converged", "rounding", "stalled", "steps"]
NOISE = 64  # rounding of a loss, a sum of many terms, in units in its last place


class Matrix(Protocol):
    """What is asked of a matrix: its product with a vector (P,). Operators of `towtank.curvature` have it, tensors too."""

    def __matmul__(self, vector: Tensor) -> Tensor: ...  # noqa: D105


@dataclass(frozen=True, kw_only=True)
class Minimum:
    """Where `newton` stopped, and why.

    Args:
        point: x, (P,).
        loss: f(x).
        gradient_norm: of the gradient at x, in the dual of the metric.
        gamma: the last radius gamma.
        status: `converged` (the gradient is small enough), `rounding` (the loss can fall no further in its precision),
            `stalled` (no radius above the precision of x passes the test: is the gradient that of the loss, or the matrix
            far from symmetric?), `steps` (all steps were taken).
        steps: accepted steps.
        solves: linear systems.
        products: with the matrix.
        losses: f at the start and after each accepted step.
    """

    point: Tensor
    loss: float
    gradient_norm: float
    gamma: float
    status: Status
    steps: int
    solves: int
    products: int
    losses: tuple[float, ...]


def newton(
    loss: Callable[[Tensor], tuple[Tensor, Tensor]],
    matrix: Callable[[Tensor], Matrix],
    start: Tensor,
    *,
    gamma: float = 1.0,
    metric: Tensor | None = None,
    tol: float = 1e-8,
    steps: int = 100,
    tries: int = 40,
    solve_tol: float = 1e-10,
    solve_steps: int | None = None,
) -> Minimum:
    """Minimize by (H + lambda B) d = -g with lambda = ||g|| / gamma, where gamma is doubled or halved as steps succeed.

    A step is taken if f(x) - f(x + d) >= ||g(x + d)||^2 / (8 lambda); then gamma <- 2 gamma, otherwise gamma / 2 and again.
    No step is longer than gamma where H is semidefinite, so gamma is a radius, and the search ends at the precision of x
    (the authors' code has no such floor, takes the step that failed the 40th test, and lets gamma collapse). Once the
    decrease that is still to be had is below the rounding of f, a step is judged by its gradient instead, which must halve.
    Negative curvature met by conjugate gradients halves gamma.

    Args:
        loss: x (P,) -> (f (), gradient (P,)).
        matrix: x -> H or an approximation of it (Gauss-Newton, Fisher) as an object with `@`.
        start: x, (P,).
        gamma: first radius, in units of x.
        metric: diagonal of B (P,), positive; None: ones.
        tol: gradient norm that counts as zero.
        steps: most steps.
        tries: most radii per step.
        solve_tol: relative residual of the linear systems.
        solve_steps: most products per system; None: 2 P.

    Raises:
        ValueError: for numbers out of range, or a loss that is not finite at the start.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 10.0], dtype=torch.float64))
        >>> found = newton(lambda x: (x @ A @ x / 2, A @ x), lambda x: A, torch.ones(2, dtype=torch.float64))
        >>> found.status, bool(found.point.abs().max() < 1e-8)
        ('converged', True)

    Source: Semenov, Jaggi and Doikov 2025, "Gradient-normalized smoothness for optimization with approximate Hessians",
    algorithm 1.
    """
    if not (gamma > 0 and tol >= 0 and steps >= 0 and tries >= 1 and 0 < solve_tol < 1):
        raise ValueError(
            "expected gamma > 0, tol >= 0, steps >= 0, tries >= 1 and 0 < solve_tol < 1, "
            f"got {gamma}, {tol}, {steps}, {tries} and {solve_tol}"
        )
    b = torch.ones_like(start) if metric is None else metric
    if b.shape != start.shape or not bool((b > 0).all()):
        raise ValueError(f"expected a positive metric of shape {tuple(start.shape)}, got one of shape {tuple(b.shape)}")
    search = _Search(loss, b, tries, solve_tol, solve_steps or 2 * len(start))
    at = search.evaluate(start)
    if not (math.isfinite(at.loss) and math.isfinite(at.norm)):
        raise ValueError(
            f"the loss is {at.loss} and its gradient's norm {at.norm} at the start; expected finite numbers"
        )
    losses, status = [at.loss], "converged" if at.norm <= tol else "steps"
    while status == "steps" and len(losses) <= steps:
        found, gamma, status = search.step(matrix(at.point), at, gamma)
        if found is not None:
            at = found
            losses.append(at.loss)
            status = "converged" if at.norm <= tol else "steps"
    return Minimum(
        point=at.point,
        loss=at.loss,
        gradient_norm=at.norm,
        gamma=gamma,
        status=status,
        steps=len(losses) - 1,
        solves=search.solves,
        products=search.products,
        losses=tuple(losses),
    )


@dataclass(frozen=True)
class _At:
    point: Tensor
    loss: float
    gradient: Tensor
    norm: float


@dataclass
class _Search:
    """The search for a radius whose step passes, and what it has cost."""

    loss: Callable[[Tensor], tuple[Tensor, Tensor]]
    metric: Tensor
    tries: int
    solve_tol: float
    solve_steps: int
    solves: int = 0
    products: int = 0

    def evaluate(self, point: Tensor) -> _At:
        value, gradient = self.loss(point)
        return _At(point, float(value), gradient, float((gradient.square() / self.metric).sum().sqrt()))

    def step(self, H: Matrix, at: _At, gamma: float) -> tuple[_At | None, float, Status]:
        """The accepted point, if any, the next radius, and why there is none."""
        shortest = torch.finfo(at.point.dtype).eps * float((at.point.square() * self.metric).sum().sqrt())
        for k in range(self.tries):
            shift = at.norm / gamma
            d = self.solve(H, shift, -at.gradient)
            if d is not None:
                new = self.evaluate(at.point + d)
                decrease = -float(at.gradient @ d) / 2  # what is to be had where the quadratic model holds
                if decrease <= NOISE * torch.finfo(d.dtype).eps * abs(at.loss):
                    if new.norm <= at.norm / 2:
                        return new, 2 * gamma, "steps"
                    return None, gamma, "stalled" if k else "rounding"
                if at.loss - new.loss >= new.norm**2 / (8 * shift):
                    return new, 2 * gamma, "steps"
            if gamma / 2 <= shortest:
                break
            gamma /= 2
        return None, gamma, "stalled"

    def solve(self, H: Matrix, shift: float, b: Tensor) -> Tensor | None:
        """(H + shift B) x = b by conjugate gradients preconditioned by B; None where the curvature is not positive."""
        self.solves += 1
        x, r = torch.zeros_like(b), b
        z = r / self.metric
        p, rz = z, float(r @ z)
        bound = self.solve_tol**2 * rz
        for _ in range(self.solve_steps):
            q = H @ p + shift * self.metric * p
            self.products += 1
            curvature = float(p @ q)
            if not curvature > 0:
                return None
            x, r = x + rz / curvature * p, r - rz / curvature * q
            z = r / self.metric
            rz, old = float(r @ z), rz
            if rz <= bound:
                break
            p = z + rz / old * p
        return x
