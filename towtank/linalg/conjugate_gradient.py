"""Conjugate gradients, which notice when the matrix is not positive definite."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from towtank.linalg.draws import dot, norm


@dataclass(frozen=True)
class Step:
    """What an iterative method added to the solution.

    Args:
        x: the addition, (P,).
        curvature: v^T A v / v^T v of a direction that is not positive, if one stopped the method.
        direction: that direction, (P,).
    """

    x: Tensor
    curvature: float | None = None
    direction: Tensor | None = None


def conjugate_gradient(
    multiply: Callable[[Tensor], Tensor],
    b: Tensor,
    precondition: Callable[[Tensor], Tensor],
    *,
    share: float,
    most: int,
) -> Step:
    """Solve A x = b from zero, until the residual is a `share` of |b|, or after `most` products.

    Raises:
        ValueError: if the preconditioner is not positive definite.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 2.0]))
        >>> conjugate_gradient(lambda v: A @ v, torch.ones(2), torch.clone, share=1e-6, most=5).x
        tensor([1.0000, 0.5000])

    Source: Hestenes and Stiefel 1952, section 3.
    """
    x, r, goal = torch.zeros_like(b), b.clone(), share * norm(b)
    z = precondition(r)
    p, rz = z.clone(), positive(dot(r, z))
    largest = 0.0
    for _ in range(most):
        Ap = multiply(p)
        length, curvature = dot(p, p), dot(p, Ap)
        largest = max(largest, (dot(Ap, Ap) / length) ** 0.5)
        rounding = 8 * torch.finfo(b.dtype).eps * largest
        if curvature <= rounding * length:
            bent = curvature / length
            return Step(x, bent if bent < -rounding else 0.0, p / length**0.5)
        x.add_(p, alpha=rz / curvature)
        r.sub_(Ap, alpha=rz / curvature)
        if norm(r) <= goal:
            break
        z = precondition(r)
        rz, before = positive(dot(r, z)), rz
        p.mul_(rz / before).add_(z)
    return Step(x)


def positive(rz: float) -> float:
    """r^T M r, which a preconditioner M must keep positive.

    Raises:
        ValueError: if it does not.
    """
    if not rz > 0:
        raise ValueError(f"expected a positive definite preconditioner, got r^T M r = {rz:.3g}")
    return rz
