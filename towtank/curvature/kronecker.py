"""Block-diagonal operators whose blocks are diagonal in a Kronecker-product basis: what K-FAC and EK-FAC leave behind.

A block acts on a matrix M (m, n): the weight of a layer, with its bias as a last column where it has one, or a vector as a
column. With orthogonal L (m, m) and R (n, n) and a spectrum S (m, n), its product is L ((L^T M R) * S) R^T. So any function of
the matrix is that function of S: inverse, logarithm and trace are exact and cheap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from towtank.linalg.operator import LinearOperator


@dataclass(frozen=True, kw_only=True, eq=False)
class KroneckerBlock:
    """One block: its parameters, its basis, its spectrum.

    Args:
        names: of the parameters, side by side as columns: (weight,), (weight, bias), or one vector.
        left: L (m, m), orthogonal; None for the identity.
        right: R (n, n), orthogonal; None for the identity.
        spectrum: S (m, n).
    """

    names: tuple[str, ...]
    left: Tensor | None
    right: Tensor | None
    spectrum: Tensor

    def apply(self, M: Tensor) -> Tensor:
        """L ((L^T M R) * S) R^T for M (m, n, K)."""
        rotated = self._rotate(M, transpose=True) * self.spectrum[:, :, None]
        return self._rotate(rotated, transpose=False)

    def _rotate(self, M: Tensor, *, transpose: bool) -> Tensor:
        if self.left is not None:
            M = torch.tensordot(self.left.T if transpose else self.left, M, dims=1)
        if self.right is not None:
            M = torch.einsum("ab,mbk->mak", self.right.T if transpose else self.right, M)
        return M

    def diagonal(self) -> Tensor:
        """The diagonal entries (m, n): L^2 S (R^2)^T, squares entry by entry."""
        D = self.spectrum
        D = D if self.left is None else self.left.square() @ D
        return D if self.right is None else D @ self.right.square().T


class KroneckerOperator(LinearOperator):
    """A semidefinite block-diagonal matrix of `KroneckerBlock`s on the parameters of a problem.

    Args:
        blocks: covering every parameter exactly once.
        slices: where each parameter lies in a flat vector.
        convention: which matrix it stands for.

    Example:
        >>> S = torch.tensor([[1.0, 3.0]])
        >>> block = KroneckerBlock(names=("w",), left=None, right=None, spectrum=S)
        >>> op = KroneckerOperator([block], slices={"w": slice(0, 2)})
        >>> op.inverse(1.0).dense()
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
        >>> op.trace(), round(op.logdet(1.0), 4)
        (4.0, 2.0794)
    """

    def __init__(self, blocks: Sequence[KroneckerBlock], *, slices: dict[str, slice], convention: str = "") -> None:
        spectrum = blocks[0].spectrum
        super().__init__(
            sum(s.stop - s.start for s in slices.values()),
            dtype=spectrum.dtype,
            device=spectrum.device,
            semidefinite=True,
            convention=convention,
            slices=slices,
        )
        self.blocks = tuple(blocks)

    def _matmat(self, X: Tensor) -> Tensor:
        out = torch.empty_like(X)
        for block in self.blocks:
            self._put(out, block, block.apply(self._get(X, block)))
        return out

    def _get(self, X: Tensor, block: KroneckerBlock) -> Tensor:
        m = block.spectrum.shape[0]
        return torch.cat([X[self.slices[n]].reshape(m, -1, X.shape[1]) for n in block.names], dim=1)

    def _put(self, out: Tensor, block: KroneckerBlock, M: Tensor) -> None:
        m = block.spectrum.shape[0]
        sizes = [(self.slices[n].stop - self.slices[n].start) // m for n in block.names]
        for name, part in zip(block.names, M.split(sizes, dim=1), strict=True):
            out[self.slices[name]] = part.reshape(-1, out.shape[1])

    def _restricted(self, index: Tensor | list[str]) -> LinearOperator:
        if isinstance(index, Tensor):
            return super()._restricted(index)
        kept = [b for b in self.blocks if set(b.names) <= set(index)]
        if sum(len(b.names) for b in kept) < len(index):  # a weight without its bias, say
            return super()._restricted(index)
        slices, start = {}, 0
        for name in index:
            size = self.slices[name].stop - self.slices[name].start
            slices[name] = slice(start, start + size)
            start += size
        return KroneckerOperator(kept, slices=slices, convention=f"block of {self.convention}")

    def inverse(self, damping: float) -> KroneckerOperator:
        """(A + damping I)^-1, exactly.

        Args:
            damping: added to every eigenvalue; 0 only where the matrix is regular to working precision.

        Raises:
            ValueError: if a damped eigenvalue is not positive.
        """
        self._check_positive(damping)
        return self._mapped(lambda S: 1 / (S + damping), f"inverse of {self.convention} + {damping:g}")

    def trace(self) -> float:
        """The sum of the eigenvalues."""
        return math.fsum(float(b.spectrum.double().sum()) for b in self.blocks)

    def logdet(self, damping: float) -> float:
        """The log-determinant of A + damping I.

        Args:
            damping: added to every eigenvalue.

        Raises:
            ValueError: if a damped eigenvalue is not positive.
        """
        self._check_positive(damping)
        return math.fsum(float((b.spectrum.double() + damping).log().sum()) for b in self.blocks)

    def diagonal(self) -> Tensor:
        """The diagonal (P,)."""
        out = torch.empty(self.shape[0], 1, dtype=self.dtype, device=self.device)
        for block in self.blocks:
            self._put(out, block, block.diagonal()[:, :, None])
        return out[:, 0]

    def exact_diagonal(self) -> tuple[Tensor, float]:
        """The diagonal (P,), at no cost in products."""
        return self.diagonal(), 0.0

    def _check_positive(self, damping: float) -> None:
        smallest = min(float(b.spectrum.min()) for b in self.blocks)
        largest = max(float(b.spectrum.max()) for b in self.blocks)
        known = 0.0 if damping else torch.finfo(self.dtype).eps * largest  # below this, an eigenvalue is rounding
        if not (smallest + damping > known and math.isfinite(damping)):
            raise ValueError(
                f"expected damped eigenvalues above 0, got eigenvalues from {smallest:.3g} to {largest:.3g} and "
                f"damping={damping}; raise it"
            )

    def _mapped(self, function: Callable[[Tensor], Tensor], convention: str) -> KroneckerOperator:
        blocks = [replace(b, spectrum=function(b.spectrum)) for b in self.blocks]
        return KroneckerOperator(blocks, slices=self.slices, convention=convention)
