"""Linear systems (A + damping I) x = b by conjugate gradients or MINRES.

P: dimension; K: right-hand sides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from towtank.linalg.conjugate_gradient import Step, conjugate_gradient
from towtank.linalg.draws import norm
from towtank.linalg.minres import minres
from towtank.linalg.operator import LinearOperator
from towtank.linalg.products import Products

Method = Literal["auto", "cg", "minres"]
Status = Literal["converged", "max_products", "stagnated", "indefinite", "singular"]
Preconditioner = LinearOperator | Callable[[Tensor], Tensor] | Tensor
_METHODS: dict[str, Callable[..., Step]] = {"cg": conjugate_gradient, "minres": minres}


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What became of (A + damping I) x = b.

    Args:
        x: the solution, shaped like b.
        residual: |b - (A + damping I) x| / |b|, from a product made at the end; the largest over right-hand sides.
        status: "converged"; "max_products" spent; "stagnated", as far as rounding lets it; "indefinite", conjugate
            gradients met a direction of negative curvature; "singular", one of none. Of the worst right-hand side.
        products: operator products spent.
        curvature: v^T (A + damping I) v / v^T v of the direction that stopped conjugate gradients, else None.
        direction: that direction, (P,), else None.
        convention: which matrix of which loss this is.
    """

    x: Tensor
    residual: float
    status: Status
    products: float
    curvature: float | None = None
    direction: Tensor | None = None
    convention: str = ""

    @property
    def converged(self) -> bool:
        """Whether the residual met the tolerance."""
        return self.status == "converged"


def solve(
    op: LinearOperator,
    b: Tensor,
    *,
    tol: float = 1e-5,
    damping: float = 0.0,
    preconditioner: Preconditioner | None = None,
    method: Method = "auto",
    max_products: int = 1000,
    progress: bool | None = None,
) -> Solution:
    """Solve (A + damping I) x = b until |b - (A + damping I) x| <= tol |b|.

    The recurrence of an iterative method drifts from the true residual. So the true one is computed when the recurrence
    says it is done, and if it is larger the method goes on from there, until that no longer helps.

    Args:
        op: the operator (P, P).
        b: right-hand side, (P,), or several, (P, K), solved one after another.
        tol: residual allowed, as a share of |b|.
        damping: added to every eigenvalue, in their unit.
        preconditioner: positive definite and near the inverse of A + damping I: an operator, a function of a vector
            (P,), or the diagonal (P,) of a diagonal one.
        method: "cg" for positive definite matrices, "minres" for any symmetric one, "auto" to choose by `semidefinite`.
        max_products: where to stop at the latest; not converged is then said.
        progress: show a bar; by default on a terminal when it takes long.

    Raises:
        ValueError: if an argument does not fit, or a product is not finite.
        TypeError: if the operator is not symmetric.

    Example:
        >>> A = LinearOperator.from_matrix(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
        >>> torch.round(solve(A, torch.tensor([3.0, 4.0])).x, decimals=4)
        tensor([1., 1.])

    Sources: Hestenes and Stiefel 1952; Paige and Saunders 1975.
    """
    if method not in get_args(Method):
        raise ValueError(f"expected method to be one of {', '.join(get_args(Method))}; got {method!r}")
    if not 0 < tol < 1:
        raise ValueError(f"expected tol between 0 and 1, got {tol}")
    with Products(op, max_products, "solve", show=progress) as A:
        columns = _columns(op, b)
        precondition = _precondition(preconditioner, op)
        if method == "auto":
            method = "cg" if op.semidefinite and damping >= 0 else "minres"
        system = _System(A, damping, precondition, _METHODS[method], tol)
        solved = [system.solve(column.contiguous()) for column in columns.T]
    x = torch.stack([s.x for s in solved], dim=1).reshape(b.shape)
    worst = max(solved, key=lambda s: (not s.converged, s.residual))
    return Solution(
        x=x,
        residual=max(s.residual for s in solved),
        status=worst.status,
        products=A.spent,
        curvature=worst.curvature,
        direction=worst.direction,
        convention=op.convention,
    )


class Inverse(LinearOperator):
    """(A + damping I)^-1, whose products are solutions: with it `trace`, `diagonal` and `eigsh` work on an inverse.

    Args:
        op: A.
        damping: added to every eigenvalue, in their unit.
        tol: see `solve`.
        preconditioner: see `solve`.
        method: see `solve`.
        max_products: of one solution; where it does not do, `converged` turns False.

    Example:
        >>> A = LinearOperator.from_matrix(torch.diag(torch.tensor([1.0, 4.0])), semidefinite=True)
        >>> torch.round(Inverse(A).dense(), decimals=3)
        tensor([[1.0000, 0.0000],
                [0.0000, 0.2500]])
    """

    def __init__(
        self,
        op: LinearOperator,
        *,
        damping: float = 0.0,
        tol: float = 1e-5,
        preconditioner: Preconditioner | None = None,
        method: Method = "auto",
        max_products: int = 1000,
    ) -> None:
        super().__init__(
            op.shape[0],
            dtype=op.dtype,
            device=op.device,
            symmetric=op.symmetric,
            semidefinite=op.semidefinite and damping >= 0,
            convention=f"inverse of {op.convention} + {damping:g} I",
            slices=op.slices,
        )
        self._op, self._damping, self._tol = op, damping, tol
        self._preconditioner, self._limit = preconditioner, max_products
        self._method: Method = method
        self.products = 0.0  # of A, spent so far
        self.converged = True  # all solutions so far

    def _matmat(self, X: Tensor) -> Tensor:
        solution = solve(
            self._op,
            X,
            tol=self._tol,
            damping=self._damping,
            preconditioner=self._preconditioner,
            method=self._method,
            max_products=self._limit * X.shape[1],
            progress=False,
        )
        self.products += solution.products
        self.converged &= solution.converged
        return solution.x


@dataclass(frozen=True)
class _System:
    """One matrix with a way to solve; every right-hand side goes through `solve`."""

    A: Products
    damping: float
    precondition: Callable[[Tensor], Tensor]
    method: Callable[..., Step]
    tol: float

    def solve(self, b: Tensor) -> Solution:
        x, r = torch.zeros_like(b), b
        size = left = norm(b)
        goal, status, step = self.tol * size, "converged", Step(x)
        while left > goal and status == "converged":
            if self.A.left < 2:
                status = "max_products"
                break
            step = self.method(self.multiply, r, self.precondition, share=goal / left, most=self.A.left - 1)
            trial = x + step.x
            residual = b - self.multiply(trial)
            now = norm(residual)
            status = self._verdict(step, now, left)
            if now < left:
                x, r, left = trial, residual, now
        solved = left <= goal
        return Solution(
            x=x,
            residual=left / size if size else 0.0,
            status="converged" if solved else status,
            products=self.A.spent,
            curvature=None if solved else step.curvature,
            direction=None if solved else step.direction,
        )

    def multiply(self, v: Tensor) -> Tensor:
        return torch.add(self.A(v[:, None])[:, 0], v, alpha=self.damping)

    def _verdict(self, step: Step, now: float, before: float) -> Status:
        """Why not to go on; "converged" if going on is worth it."""
        if step.curvature is not None:
            return "indefinite" if step.curvature < 0 else "singular"
        if now <= 0.5 * before:
            return "converged"
        return "stagnated" if self.A.left > 1 else "max_products"


def _columns(op: LinearOperator, b: Tensor) -> Tensor:
    if not isinstance(b, Tensor) or not b.dtype.is_floating_point:
        raise TypeError(f"expected a real floating-point tensor as b, got {getattr(b, 'dtype', type(b).__name__)}")
    if b.ndim not in (1, 2) or b.shape[0] != op.shape[0] or not b.numel():
        raise ValueError(f"expected b of shape ({op.shape[0]},) or ({op.shape[0]}, K), got {tuple(b.shape)}")
    if not bool(torch.isfinite(b).all()):
        raise ValueError("expected a finite right-hand side, got NaN or infinity in b")
    return b.detach().to(op.device, op.dtype).reshape(op.shape[0], -1)


def _precondition(given: Preconditioner | None, op: LinearOperator) -> Callable[[Tensor], Tensor]:
    if given is None:
        return torch.clone
    if isinstance(given, LinearOperator):
        return lambda r: (given @ r).to(r)
    if not isinstance(given, Tensor):
        return given
    if given.shape != (op.shape[0],) or not bool((given > 0).all()):
        raise ValueError(f"expected a positive diagonal ({op.shape[0]},) as preconditioner, got {tuple(given.shape)}")
    diagonal = given.to(op.device, op.dtype)
    return lambda r: diagonal * r
