"""Diagonals of an operator and of its inverse.

P: dimension; m: test vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from towtank.linalg.draws import as_generator, rademacher
from towtank.linalg.operator import LinearOperator
from towtank.linalg.products import Products
from towtank.linalg.sampling import LEAST, Running, check_tolerance, sample_until
from towtank.linalg.sketches import Sketch, Small, jackknife, shared_error
from towtank.linalg.solve import Inverse, Preconditioner

Method = Literal["auto", "exact", "hutchinson", "xdiag"]
_ROWS = 256  # rows on which the jackknife is made


@dataclass(frozen=True, kw_only=True)
class Diagonal:
    """An estimated diagonal.

    Args:
        values: (P,) float64.
        stderr: standard error of each entry, (P,); zero where computed rather than sampled.
        products: operator products spent.
        converged: whether |stderr| met its target.
        convention: which matrix of which loss this is.
    """

    values: Tensor
    stderr: Tensor
    products: float
    converged: bool
    convention: str = ""


def diagonal(
    op: LinearOperator,
    *,
    rtol: float = 0.05,
    atol: float = 0.0,
    method: Method = "auto",
    generator: torch.Generator | int | None = None,
    max_products: int = 1000,
    progress: bool | None = None,
) -> Diagonal:
    """Diagonal of a symmetric operator, sampled until |stderr| <= max(rtol |diagonal|, atol), in Euclidean norm.

    - "hutchinson": mean of v * (A v) over random sign vectors; variance of entry i is sum_{j != i} A_ij^2.
    - "xdiag": the part on a sketched range exactly, the rest by leave-one-out; holds 3 m vectors of P numbers.
    - "exact": what the operator knows, else P products.
    - "auto": exact if the operator knows it or P is at most 20, else hutchinson.

    Args:
        op: the operator (P, P).
        rtol: error asked for, as a share of the diagonal's Euclidean norm.
        atol: error asked for, in the unit of the diagonal's Euclidean norm.
        method: see above.
        generator: of the probes, or a seed.
        max_products: where to stop at the latest; not converged is then said.
        progress: show a bar; by default on a terminal when it takes long.

    Raises:
        ValueError: if an argument does not fit or a product is not finite.
        TypeError: if the operator is not symmetric.

    Example:
        >>> A = LinearOperator.from_matrix(torch.diag(torch.arange(20.0)))
        >>> diagonal(A).values[:4]
        tensor([0., 1., 2., 3.], dtype=torch.float64)

    Sources: Bekas, Kokiopoulou and Saad 2007; Epperly, Tropp and Webber 2024, section 2.4 (XDiag).
    """
    check_tolerance(rtol, atol)
    if method not in get_args(Method):
        raise ValueError(f"expected method to be one of {', '.join(get_args(Method))}; got {method!r}")
    with Products(op, max_products, "diagonal", show=progress) as A:
        draw = as_generator(generator, op.device)
        known = op.exact_diagonal() if method in ("auto", "exact") else None
        if known is not None:
            A.charge(known[1])
            values, stderr, met = known[0].double(), torch.zeros_like(known[0], dtype=torch.float64), True
        elif method == "exact" or (method == "auto" and op.shape[0] <= min(LEAST, A.left)):
            values, stderr, met = _exact(A)
        elif method == "xdiag":
            values, stderr, met = _xdiag(A, draw, rtol, atol)
        else:
            values, stderr, met = _hutchinson(A, lambda: A.left, draw, rtol, atol)
    return Diagonal(values=values, stderr=stderr, products=A.spent, converged=met, convention=op.convention)


def inverse_diagonal(
    op: LinearOperator,
    *,
    damping: float = 0.0,
    rtol: float = 0.05,
    atol: float = 0.0,
    tol: float = 1e-4,
    preconditioner: Preconditioner | None = None,
    generator: torch.Generator | int | None = None,
    max_products: int = 3000,
    progress: bool | None = None,
) -> Diagonal:
    """Diagonal of (A + damping I)^-1: Hutchinson's estimate, each probe a system solved.

    Args:
        op: the operator (P, P).
        damping: added to every eigenvalue, in their unit.
        rtol: error asked for, as a share of the diagonal's Euclidean norm.
        atol: error asked for, in the unit of the diagonal's Euclidean norm.
        tol: residual allowed in each system, as a share of its right-hand side; not part of the standard error.
        preconditioner: see `solve`.
        generator: of the probes, or a seed.
        max_products: where to stop at the latest; not converged is then said, and also where a system was not solved.
        progress: show a bar; by default on a terminal when it takes long.

    Raises:
        ValueError: if an argument does not fit or a product is not finite.
        TypeError: if the operator is not symmetric.

    Example:
        >>> A = LinearOperator.from_matrix(torch.diag(torch.full((20,), 3.0)), semidefinite=True)
        >>> torch.round(inverse_diagonal(A, damping=1.0).values[:2], decimals=4)
        tensor([0.2500, 0.2500], dtype=torch.float64)
    """
    check_tolerance(rtol, atol)
    inverse = Inverse(op, damping=damping, tol=tol, preconditioner=preconditioner, max_products=max_products)
    with Products(inverse, max_products, "inverse diagonal", show=progress) as A:
        draw = as_generator(generator, op.device)

        def room() -> int:
            return int((max_products - inverse.products) * A.spent / inverse.products) if A.spent else 2

        values, stderr, met = _hutchinson(A, room, draw, rtol, atol)
    return Diagonal(
        values=values,
        stderr=stderr,
        products=inverse.products,
        converged=met and inverse.converged,
        convention=inverse.convention,
    )


def _exact(A: Products) -> tuple[Tensor, Tensor, bool]:
    P = A.op.shape[0]
    if A.left < P:
        raise ValueError(f"expected max_products of at least {P} for an exact diagonal, got {A.limit}")
    entries = []
    for i in range(P):
        e = torch.zeros(P, 1, dtype=A.op.dtype, device=A.op.device)
        e[i] = 1
        entries.append(A(e)[i, 0].double())
    values = torch.stack(entries)
    return values, torch.zeros_like(values), True


def _hutchinson(
    A: Products, room: Callable[[], int], draw: torch.Generator, rtol: float, atol: float
) -> tuple[Tensor, Tensor, bool]:
    op = A.op

    def entries(count: int) -> Tensor:
        probes = (rademacher(op.shape[0], 1, draw, like=op.dtype, device=op.device) for _ in range(count))
        return torch.cat([(v * A(v)).T for v in probes])

    running, met = sample_until(entries, rtol=rtol, atol=atol, room=room, chunk=1)
    return running.mean, running.stderr, met


def _xdiag(A: Products, draw: torch.Generator, rtol: float, atol: float) -> tuple[Tensor, Tensor, bool]:
    op, sketch = A.op, Sketch(A)
    more, met = LEAST // 2, False
    values = stderr = torch.full((op.shape[0],), torch.nan, dtype=torch.float64, device=op.device)
    if A.left < 6:
        raise ValueError(f"expected max_products of at least 6 for xdiag, got {A.limit}")
    while (more := min(more, A.left // 2, op.shape[0] - sketch.m)) > 0:
        sketch.grow(rademacher(op.shape[0], more, draw, like=op.dtype, device=op.device))
        if sketch.spans:
            values = (sketch.Q * sketch.AQ).sum(dim=1, dtype=torch.float64)
            return values, torch.zeros_like(values), True
        values, stderr, met = _judged(sketch, rtol, atol)
        if met:
            break
        more = max(1, sketch.m // 2)
    return values, stderr, met


def _judged(sketch: Sketch, rtol: float, atol: float) -> tuple[Tensor, Tensor, bool]:
    """Mean and error of the leave-one-out estimates.

    Their scatter understates the error, see `shared_error`: by how much is seen on some rows, where the jackknife, m
    times as dear, is made too.
    """
    small, estimates, rows = sketch.small(), Running(), []
    for part in zip(*(X.split(2**16) for X in (sketch.Q, sketch.AQ, sketch.Omega))):
        rows.append(_left_out_diagonals(small, *part))
    estimates.add(torch.cat(rows, dim=1))
    some = slice(None, None, max(1, len(sketch.Q) // _ROWS))
    Q, AQ, Omega = sketch.Q[some], sketch.AQ[some], sketch.Omega[some]
    without = []
    for j in range(small.m):
        less, rest = small.without(j), [i for i in range(small.m) if i != j]
        turn = less.rotation.to(Q)
        without.append(_left_out_diagonals(less, Q @ turn, AQ @ turn, Omega[:, rest]).mean(dim=0))
    scatter = torch.linalg.vector_norm(estimates.stderr[some])
    error = shared_error(scatter, torch.linalg.vector_norm(jackknife(torch.stack(without))))
    stderr = estimates.stderr * (error / scatter if scatter > 0 else 1.0)
    met = float(torch.linalg.vector_norm(stderr)) <= estimates.target(rtol, atol)
    return estimates.mean, stderr, met


def _left_out_diagonals(small: Small, Q: Tensor, AQ: Tensor, Omega: Tensor) -> Tensor:
    """Estimates diag(Q Q^T A) - (Q s_i) * (A Q s_i) + omega_i * (Q s_i) (s_i^T r_i), of some rows, for each test vector i: (m, rows)."""
    S = small.left_out()
    gain = (S * small.R).sum(dim=0).to(Q)
    q, Aq = Q @ S.to(Q), AQ @ S.to(Q)
    base = (Q * AQ).sum(dim=1, dtype=torch.float64)
    return (base[:, None] - q * Aq + Omega * q * gain).T
