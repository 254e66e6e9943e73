"""Products that are counted, bounded and checked: what every algorithm here calls instead of `op @ X`."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor

from towtank.linalg.operator import LinearOperator
from towtank.linalg.progress import Meter


class Products:
    """Products of a symmetric operator, counted against a limit.

    Args:
        op: the operator.
        limit: products that may be spent; a cheaper sample counts as its share.
        what: name of the work, for the bar and for messages.
        show: see `Meter`.

    Raises:
        TypeError: if `op` is no symmetric `LinearOperator`.
        ValueError: if the limit is below one product.

    Example:
        >>> with Products(LinearOperator.from_matrix(2 * torch.eye(3)), 10, "doubling") as A:
        ...     print(A(torch.ones(3, 1)).T, A.spent, A.left)
        tensor([[2., 2., 2.]]) 1.0 9
    """

    def __init__(self, op: LinearOperator, limit: float, what: str, *, show: bool | None = None) -> None:
        if not isinstance(op, LinearOperator):
            raise TypeError(
                f"expected a LinearOperator, got {type(op).__name__}; wrap a matrix by LinearOperator.from_matrix(A)"
            )
        if not op.symmetric:
            raise TypeError(f"expected a symmetric operator for {what}, got {type(op).__name__} with symmetric=False")
        if limit < 1:
            raise ValueError(f"expected max_products of at least 1, got {limit}")
        self.op, self.limit, self.spent = op, limit, 0.0
        self._what = what
        self._meter = Meter(what, limit, show=show)

    @property
    def left(self) -> int:
        """Whole products that may still be spent."""
        return int(self.limit - self.spent + 1e-9)

    def __enter__(self) -> Products:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._meter.__exit__(kind, error, at)

    def __call__(self, X: Tensor) -> Tensor:
        """A @ X for X (P, K).

        Raises:
            ValueError: if the product is not finite.
        """
        Y = self.op @ X
        self.charge(X.shape[1])
        if not bool(torch.isfinite(Y.sum())):
            self._complain(Y)
        return Y

    def charge(self, products: float, note: str = "") -> None:
        """Count work that was done elsewhere."""
        self.spent += products
        self._meter.advance(products, note)

    def _complain(self, Y: Tensor) -> None:
        bad = ~torch.isfinite(Y).all(dim=1)
        if not bool(bad.any()):
            return  # finite entries whose sum overflowed
        names = [n for n, part in self.op.slices.items() if bool(bad[part].any())]
        where = f", in {', '.join(names[:5])}{' and others' if len(names) > 5 else ''}" if names else ""
        raise ValueError(
            f"expected finite products for {self._what}, got NaN or infinity in {int(bad.sum())} of {len(bad)} entries "
            f"at product {self.spent:.0f} of {type(self.op).__name__}{where}; check that the loss and its derivatives "
            "are finite at these parameters"
        )
