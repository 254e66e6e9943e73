"""A linear operator: what algorithms see of a matrix that is never formed.

P: dimension of the space; K: number of vectors multiplied at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor


class LinearOperator(ABC):
    """A square real matrix known by its products.

    A leaf writes `_matmat`, and `__init__` calls `super().__init__(...)`. The base gives `@`, `+`, `-`, multiplication by a
    number, `.T`, `.dense()` and `.restrict(...)`. Products of a leaf are computed in its `dtype` on its `device`.

    Args:
        size: P.
        dtype: of products.
        device: of products.
        symmetric: whether A = A^T. All algorithms of `towtank.linalg` need it.
        semidefinite: whether v^T A v >= 0 for every v is known, as for Gauss-Newton and Fisher matrices.
        convention: which matrix of which loss this is; carried into every estimate.
        slices: where each named block lies in a vector, for `restrict`.
        cost: of one product, in a unit shared by the operators of one problem (gradients), for algorithms that choose
            between two operators; only ratios matter.

    Example:
        >>> A = LinearOperator.from_matrix(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
        >>> A @ torch.tensor([1.0, 0.0])
        tensor([2., 1.])
        >>> (2 * A - A).dense()
        tensor([[2., 1.],
                [1., 3.]])
        >>> A.restrict([1]).dense()
        tensor([[3.]])
    """

    def __init__(
        self,
        size: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        symmetric: bool = True,
        semidefinite: bool = False,
        convention: str = "",
        slices: dict[str, slice] | None = None,
        cost: float = 1.0,
    ) -> None:
        self.shape = (size, size)
        self.dtype = dtype
        self.device = torch.device(device)
        self.symmetric = symmetric
        self.semidefinite = semidefinite
        self.convention = convention
        self.slices = slices or {}
        self.cost = cost

    @abstractmethod
    def _matmat(self, X: Tensor) -> Tensor:
        """Product with the columns of X (P, K), of the operator's dtype and device."""

    def _transposed(self) -> LinearOperator:
        if self.symmetric:
            return self
        raise TypeError(f"expected a symmetric operator, got {type(self).__name__}, whose transpose is not known")

    def _restricted(self, index: Tensor | list[str]) -> LinearOperator:
        """The block of the named parameters or of the given coordinates; leaves may know a cheaper way."""
        if isinstance(index, Tensor):
            return _Block(self, index, {})
        return _Block(self, self._coordinates(index), _packed({n: self.slices[n] for n in index}))

    def trace_samples(self, count: int, generator: torch.Generator | None) -> tuple[Tensor, float] | None:
        """Independent unbiased samples of the trace cheaper than products: ((count,) float64, products each), or None."""
        return None

    def control(self) -> LinearOperator | None:
        """A near operator whose trace is cheap, as a control variate; None if there is none."""
        return None

    def exact_diagonal(self) -> tuple[Tensor, float] | None:
        """The diagonal (P,) and what it cost in products, where the operator knows it without sampling; or None."""
        return None

    def __matmul__(self, X: Tensor) -> Tensor:
        """A @ X for a vector (P,) or a matrix (P, K).

        Raises:
            ValueError: if the shape does not fit.
            TypeError: if X is no real floating-point tensor.
        """
        if not isinstance(X, Tensor) or not X.dtype.is_floating_point:
            raise TypeError(f"expected a real floating-point tensor, got {getattr(X, 'dtype', type(X).__name__)}")
        if X.ndim not in (1, 2) or X.shape[0] != self.shape[1]:
            raise ValueError(
                f"expected a tensor of shape ({self.shape[1]},) or ({self.shape[1]}, K), got {tuple(X.shape)}"
            )
        columns = X.detach().to(self.device, self.dtype)
        return self._matmat(columns if X.ndim == 2 else columns[:, None]).reshape(X.shape)

    @property
    def T(self) -> LinearOperator:
        """The transpose."""
        return self._transposed()

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return _Sum(self, other, 1.0)

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return _Sum(self, other, -1.0)

    def __mul__(self, scalar: float) -> LinearOperator:
        return _Scaled(self, float(scalar))

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return _Scaled(self, -1.0)

    def __truediv__(self, scalar: float) -> LinearOperator:
        return _Scaled(self, 1 / float(scalar))

    def restrict(self, what: Iterable[str] | Iterable[int] | Tensor) -> LinearOperator:
        """The diagonal block of some coordinates.

        Args:
            what: names of blocks (parameters), in which case the block has them in the order of the operator; or
                coordinates, as integers or as an integer tensor (p,).

        Raises:
            ValueError: if a name is not known, or nothing is asked for.
        """
        if isinstance(what, Tensor):
            return self._restricted(what.to(self.device))
        items = [what] if isinstance(what, str) else list(what)
        if not items:
            raise ValueError("expected at least one name or coordinate to restrict to, got none")
        if not isinstance(items[0], str):
            return self._restricted(torch.as_tensor(items, device=self.device))
        unknown = [n for n in items if n not in self.slices]
        if unknown:
            raise ValueError(
                f"expected names among {', '.join(self.slices) or '(none)'}; got {', '.join(map(str, unknown))}"
            )
        return self._restricted([n for n in self.slices if n in items])

    def dense(self, block: int = 64) -> Tensor:
        """The matrix (P, P), from P products, `block` at a time: for tests and small problems."""
        P = self.shape[1]
        eye = torch.eye(P, dtype=self.dtype, device=self.device)
        return torch.cat([self._matmat(eye[:, i : i + block]) for i in range(0, P, block)], dim=1)

    def _coordinates(self, names: list[str]) -> Tensor:
        every = torch.arange(self.shape[0], device=self.device)
        return torch.cat([every[self.slices[n]] for n in names])

    @staticmethod
    def from_matrix(A: Tensor, *, convention: str = "", semidefinite: bool = False) -> LinearOperator:
        """A dense matrix (P, P) as an operator.

        Raises:
            ValueError: if A is not square.
        """
        if A.ndim != 2 or A.shape[0] != A.shape[1]:
            raise ValueError(f"expected a square matrix, got shape {tuple(A.shape)}")
        return _Dense(A.detach(), convention, semidefinite)


class _Dense(LinearOperator):
    def __init__(self, A: Tensor, convention: str, semidefinite: bool) -> None:
        rounding = 8 * torch.finfo(A.dtype).eps * A.shape[0] ** 0.5
        symmetric = bool(((A - A.T).abs() <= rounding * A.abs().max()).all()) if A.numel() else True
        super().__init__(
            A.shape[0],
            dtype=A.dtype,
            device=A.device,
            symmetric=symmetric,
            semidefinite=semidefinite,
            convention=convention,
        )
        self.A = A

    def _matmat(self, X: Tensor) -> Tensor:
        return self.A @ X

    def _transposed(self) -> LinearOperator:
        return _Dense(self.A.T, self.convention, self.semidefinite)


class _Sum(LinearOperator):
    def __init__(self, left: LinearOperator, right: LinearOperator, sign: float) -> None:
        if left.shape != right.shape or left.device != right.device:
            raise ValueError(
                f"expected operators of one shape on one device, got {left.shape} on {left.device} and {right.shape} "
                f"on {right.device}"
            )
        super().__init__(
            left.shape[0],
            dtype=torch.promote_types(left.dtype, right.dtype),
            device=left.device,
            symmetric=left.symmetric and right.symmetric,
            semidefinite=left.semidefinite and right.semidefinite and sign > 0,
            convention=f"{left.convention} {'+' if sign > 0 else '-'} {right.convention}",
            slices=left.slices if left.slices == right.slices else {},
            cost=left.cost + right.cost,
        )
        self.left, self.right, self.sign = left, right, sign

    def _matmat(self, X: Tensor) -> Tensor:
        return torch.add(self.left @ X, self.right @ X, alpha=self.sign)

    def _transposed(self) -> LinearOperator:
        return _Sum(self.left.T, self.right.T, self.sign)

    def _restricted(self, index: Tensor | list[str]) -> LinearOperator:
        return _Sum(self.left._restricted(index), self.right._restricted(index), self.sign)


class _Scaled(LinearOperator):
    def __init__(self, op: LinearOperator, scalar: float) -> None:
        super().__init__(
            op.shape[0],
            dtype=op.dtype,
            device=op.device,
            symmetric=op.symmetric,
            semidefinite=op.semidefinite and scalar >= 0,
            convention=f"{scalar:g} * {op.convention}",
            slices=op.slices,
            cost=op.cost,
        )
        self.op, self.scalar = op, scalar

    def _matmat(self, X: Tensor) -> Tensor:
        return self.scalar * (self.op @ X)

    def _transposed(self) -> LinearOperator:
        return _Scaled(self.op.T, self.scalar)

    def _restricted(self, index: Tensor | list[str]) -> LinearOperator:
        return _Scaled(self.op._restricted(index), self.scalar)

    def trace_samples(self, count: int, generator: torch.Generator | None) -> tuple[Tensor, float] | None:
        cheap = self.op.trace_samples(count, generator)
        return None if cheap is None else (self.scalar * cheap[0], cheap[1])


class _Block(LinearOperator):
    def __init__(self, op: LinearOperator, index: Tensor, slices: dict[str, slice]) -> None:
        if index.dtype.is_floating_point or index.ndim != 1:
            raise ValueError(f"expected integer coordinates (p,), got {index.dtype} of shape {tuple(index.shape)}")
        super().__init__(
            index.numel(),
            dtype=op.dtype,
            device=op.device,
            symmetric=op.symmetric,
            semidefinite=op.semidefinite,
            convention=f"block of {op.convention}",
            slices=slices,
            cost=op.cost,
        )
        self.op, self.index = op, index

    def _matmat(self, X: Tensor) -> Tensor:
        whole = X.new_zeros(self.op.shape[1], X.shape[1])
        whole[self.index] = X
        return (self.op @ whole)[self.index]

    def _transposed(self) -> LinearOperator:
        return _Block(self.op.T, self.index, self.slices)


def _packed(slices: dict[str, slice]) -> dict[str, slice]:
    packed, start = {}, 0
    for name, old in slices.items():
        packed[name] = slice(start, start + old.stop - old.start)
        start = packed[name].stop
    return packed
