"""Eigenvalues from the ends of a spectrum, each with a bound on its error.

P: dimension; k: pairs asked for; d: vectors multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from towtank.linalg.draws import as_generator, gaussian
from towtank.linalg.lanczos import Krylov
from towtank.linalg.operator import LinearOperator
from towtank.linalg.products import Products

End = Literal["LA", "SA", "LM", "BE"]
_LEAST = 4  # products for each given start: its random half is then three powers deep, where outliers dominate a bulk
_COARSE = 0.05  # and residual of the next pair, as a share of the wanted eigenvalues


@dataclass(frozen=True, kw_only=True)
class Eigenpairs:
    """Approximate eigenpairs with bounds.

    Args:
        values: Ritz values from the wanted end inwards, (k,) float64; for both ends the largest k, then the smallest k.
        vectors: unit Ritz vectors, (P, k), in the dtype of the operator.
        residuals: |A x - theta x| of each pair plus 8 eps |A| for the rounding of products, (k,): some eigenvalue lies
            within this distance of the value.
        products: operator products spent.
        converged: whether every residual met the tolerance.
        ends: smallest and largest Ritz value of the same basis, (2,).
        end_residuals: their residuals, (2,).
        convention: which matrix of which loss this is.
        state: what `eigsh(..., state=)` needs to go on, if it was asked to be kept.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: float
    converged: bool
    ends: Tensor
    end_residuals: Tensor
    convention: str = ""
    state: dict[str, Tensor] | None = None

    def __str__(self) -> str:
        pairs = ", ".join(f"{v:.5g} ± {r:.1g}" for v, r in zip(self.values.tolist(), self.residuals.tolist()))
        return f"{pairs} ({self.products:.3g} products{'' if self.converged else ', not converged'})"


def eigsh(
    op: LinearOperator,
    k: int = 1,
    *,
    which: End = "LA",
    tol: float = 1e-3,
    atol: float = 0.0,
    generator: torch.Generator | int | None = None,
    block: int = 1,
    start: Tensor | None = None,
    max_basis: int | None = None,
    max_products: int | None = None,
    state: dict[str, Tensor] | None = None,
    keep_state: bool = False,
    progress: bool | None = None,
) -> Eigenpairs:
    """Eigenpairs of a symmetric operator from an end of its spectrum, by Lanczos with thick restart.

    Stops when every wanted pair has |A x - theta x| <= max(tol |theta|, atol): then an eigenvalue lies within that
    distance of theta, whatever its neighbours are. Single vectors (`block=1`) find each distinct eigenvalue once; a
    block as large as a multiplicity finds all copies. Both ends are found on the way, see `Eigenpairs.ends`.

    A given start is mixed with as much of a random vector. From an exact eigenvector alone no other could be found, and its
    residual is small at once, whichever eigenvector it is. The random half costs next to nothing: Lanczos needs a share of
    the wanted vector, not a pure one. It must also have been heard before a stop: with a start at least four products are
    made for each of its vectors, and the residual of the Ritz pair next to the wanted ones must be at most 5 % of them.

    Args:
        op: the operator (P, P).
        k: pairs wanted, at most P.
        which: "LA" largest, "SA" smallest, "LM" largest in magnitude, "BE" k from both ends.
        tol: residual allowed, as a share of each eigenvalue.
        atol: residual allowed, in the unit of the eigenvalues: for values near zero.
        generator: of the start vectors, or a seed.
        block: vectors multiplied at once.
        start: first vectors of the basis, (P,) or (P, d), such as eigenvectors found before a step; d is the least block.
        max_basis: vectors held; by default 2k + 20. Memory is this times P numbers.
        max_products: where to stop at the latest; by default 300 + 30 k. Not converged is then said.
        state: an `Eigenpairs.state`, to go on as if there had been no stop; then `generator`, `block` and `max_basis`
            are those of the state.
        keep_state: whether to keep the state; it holds the basis.
        progress: show a bar; by default on a terminal when it takes long.

    Raises:
        ValueError: if k, block, the start or the bounds do not fit, or a product is not finite.
        TypeError: if the operator is not symmetric.

    Example:
        >>> A = LinearOperator.from_matrix(torch.diag(torch.tensor([1.0, -3.0, 2.0])))
        >>> eigsh(A, which="LM").values.round(decimals=5)
        tensor([-3.], dtype=torch.float64)
        >>> eigsh(A, k=2).values.round(decimals=5)
        tensor([2., 1.], dtype=torch.float64)

    Source: Wu and Simon 2000, "Thick-restart Lanczos method"; the bound is that of Parlett 1980, theorem 4.5.1.
    """
    P = op.shape[0] if isinstance(op, LinearOperator) else k
    given = _given(start, P, state)
    block = block if given is None else max(block, len(given))
    _check(P, k, which, block, max_basis)
    need = min(2 * k if which == "BE" else k, P)
    limit = 300 + 30 * k if max_products is None else max_products
    with Products(op, limit, "eigsh", show=progress) as A:
        draw = as_generator(generator, op.device)
        krylov = _krylov(A, need, block, max_basis, draw, state, given)
        ritz = _Ritz(krylov, which, need)
        heard = 0 if given is None else min(_LEAST * len(given), P)

        def settled() -> bool:
            met = _settled(ritz, tol, atol, P) and A.spent >= heard
            return met and (given is None or _next_known(ritz, tol, atol))

        while not settled() and A.left >= max(krylov.n - krylov.done, 1):
            if krylov.complete and not krylov.add(_start(A, 1, draw)[0]):
                break
            if krylov.full:
                krylov.restart(*ritz.kept())
            krylov.expand()
            ritz = _Ritz(krylov, which, need)
        if not krylov.done:
            raise ValueError(f"expected max_products of at least the block {block}, got {limit}")
        kept = {**krylov.state(), "generator": draw.get_state()} if keep_state else None
        return ritz.pairs(A, settled(), kept)


class _Ritz:
    """Ritz pairs of a basis, wanted ones first."""

    def __init__(self, krylov: Krylov, which: End, need: int) -> None:
        d, n = krylov.done, krylov.n
        self.krylov, self.which, self.need = krylov, which, need
        self.theta, self.S = torch.linalg.eigh(krylov.projected())
        rest = krylov.H[: max(n, d), :d] @ self.S
        if n == d < len(krylov.H):  # what was left of the last product, too small to go on with
            rest = torch.cat([rest, krylov.H[n : n + 1, :d] @ self.S])
        rest[:d] -= self.S * self.theta
        self.rounding = 8 * torch.finfo(krylov.Q.dtype).eps * krylov.scale
        self.residuals = torch.linalg.vector_norm(rest, dim=0) + self.rounding
        self.order = _order(self.theta, which)

    def kept(self) -> tuple[Tensor, Tensor]:
        """What a restart keeps: the wanted pairs, a part of those next to them, which speeds it up, and both ends."""
        count = self.need + (self.krylov.done - self.need) // 3
        ends = torch.tensor([0, len(self.theta) - 1])
        best = torch.cat([self.order[:count], ends]).unique()
        return self.theta[best], self.S[:, best]

    def pairs(self, A: Products, converged: bool, state: dict[str, Tensor] | None) -> Eigenpairs:
        best = self.order[: self.need]
        if self.which == "BE":
            best = torch.cat([best[::2], best[1::2]])
        X = self.krylov.vectors(self.S[:, best])
        last = len(self.theta) - 1
        return Eigenpairs(
            values=self.theta[best],
            vectors=X / torch.linalg.vector_norm(X, dim=0),
            residuals=self.residuals[best],
            products=A.spent,
            converged=converged,
            ends=self.theta[[0, last]],
            end_residuals=self.residuals[[0, last]],
            convention=A.op.convention,
            state=state,
        )


def _settled(ritz: _Ritz, tol: float, atol: float, P: int) -> bool:
    if len(ritz.theta) < min(ritz.need, P):
        return False
    best = ritz.order[: ritz.need]
    allowed = (tol * ritz.theta[best].abs()).clamp(min=max(atol, 2 * ritz.rounding))
    return bool((ritz.residuals[best] <= allowed).all())


def _next_known(ritz: _Ritz, tol: float, atol: float) -> bool:
    """Whether the pair next to the wanted ones is known so far that none hides beyond them."""
    if len(ritz.order) <= ritz.need:
        return True
    last, following = ritz.order[ritz.need - 1], ritz.order[ritz.need]
    allowed = max(max(tol, _COARSE) * float(ritz.theta[last].abs()), atol, 2 * ritz.rounding)
    return bool(ritz.residuals[following] <= allowed)


def _order(theta: Tensor, which: End) -> Tensor:
    """Indices of ascending values, the most wanted first; for both ends the largest, the smallest, and so on."""
    up = torch.arange(len(theta))
    if which == "BE":
        return torch.stack([up.flip(0), up], dim=1).flatten()[: len(theta)]
    return {"LA": up.flip(0), "SA": up, "LM": theta.abs().argsort(descending=True)}[which]


def _krylov(
    A: Products,
    need: int,
    block: int,
    max_basis: int | None,
    draw: torch.Generator,
    state: dict[str, Tensor] | None,
    given: Tensor | None,
) -> Krylov:
    P = A.op.shape[0]
    like = torch.empty(0, dtype=A.op.dtype, device=A.op.device)
    if state is not None:
        draw.set_state(state["generator"])
        if state["Q"].shape[1] != P:
            raise ValueError(f"expected a state of vectors of {P} entries, got {state['Q'].shape[1]}")
        return Krylov.resumed(A, state, like)
    basis = max(2 * need + 20, need + 3 * block) if max_basis is None else max_basis
    first = _start(A, min(block, P), draw)
    if given is not None:
        first /= torch.linalg.vector_norm(first, dim=1, keepdim=True)
        first[: len(given)] += given.to(first)
    return Krylov(A, first, capacity=basis + block)


def _given(start: Tensor | None, P: int, state: dict[str, Tensor] | None) -> Tensor | None:
    """The given start as unit rows (d, P).

    Raises:
        ValueError: if it does not fit.
    """
    if start is None:
        return None
    if state is not None:
        raise ValueError("expected a start or a state, got both; a state has its basis already")
    if start.ndim not in (1, 2) or start.shape[0] != P or not start.numel():
        raise ValueError(f"expected a start of shape ({P},) or ({P}, d), got {tuple(start.shape)}")
    rows = start.detach().reshape(P, -1).T.double()
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    if not bool((torch.isfinite(lengths) & (lengths > 0)).all()):
        raise ValueError("expected start vectors that are finite and not zero; leave start out")
    return rows / lengths


def _start(A: Products, count: int, draw: torch.Generator) -> Tensor:
    return gaussian(A.op.shape[0], count, draw, like=A.op.dtype, device=A.op.device).T.contiguous()


def _check(P: int, k: int, which: str, block: int, max_basis: int | None) -> None:
    if which not in get_args(End):
        raise ValueError(f"expected which to be one of {', '.join(get_args(End))}; got {which!r}")
    if not 1 <= k <= P:
        raise ValueError(f"expected k from 1 to the size of the operator, {P}; got {k}")
    if not 1 <= block <= P:
        raise ValueError(f"expected a block from 1 to the size of the operator, {P}; got {block}")
    need = 2 * k if which == "BE" else k
    if max_basis is not None and max_basis < min(need + 2 * block, P):
        raise ValueError(f"expected max_basis of at least {need + 2 * block} for k={k}, block={block}; got {max_basis}")
