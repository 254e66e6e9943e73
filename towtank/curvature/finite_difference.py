"""Hessian products from gradients alone, for models whose second derivative does not exist."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from towtank.problem import Problem


def central_difference(gradient: Callable[[Tensor], Tensor], at: Tensor, v: Tensor, relative: float) -> Tensor:
    """H v = (g(theta + e v) - g(theta - e v)) / 2e with e = relative * |theta| / |v|.

    An unscaled step is wrong by 10 to 80 % for long v: it then leaves the region where the gradient is nearly linear.

    Args:
        gradient: of a flat vector (P,).
        at: theta (P,), of the dtype to compute in.
        v: direction (P,).
        relative: step relative to |theta|.

    Example:
        >>> at, v = torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, 1.0]).double()
        >>> central_difference(lambda x: x**2, at, v, 0.5).round(decimals=9)  # H = diag(2 x)
        tensor([2., 4.], dtype=torch.float64)
    """
    length = torch.linalg.vector_norm(v.double())
    if not length:
        return torch.zeros_like(v)
    e = float(relative * (torch.linalg.vector_norm(at.double()) or 1.0) / length)
    return (gradient(at + e * v) - gradient(at - e * v)) / (2 * e)


class CentralDifferences:
    """Products by central differences of the full gradient, two gradients each, with a measured noise floor.

    The relative step is the cube root of the dtype's epsilon, which balances rounding (eps / h) and curvature (h^2).

    Args:
        problem: whose Hessian.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.relative = torch.finfo(problem.dtype).eps ** (1 / 3)
        self.noise: float | None = None

    def product(self, v: Tensor) -> Tensor:
        """H v (P,) for v (P,). The first one is computed with two steps, and their difference kept as the noise floor.

        Raises:
            ValueError: if the noise is of the size of the product.
        """
        at = self.problem.flatten(self.problem.leaves())
        product = central_difference(self._gradient, at, v, self.relative)
        if self.noise is None and v.any():
            other = central_difference(self._gradient, at, v, self.relative / 2)
            self.noise = float((product - other).norm() / product.norm().clamp(min=torch.finfo(v.dtype).tiny))
            if not self.noise < 0.3:
                raise ValueError(
                    f"expected gradients smooth enough for finite differences, got products that differ by "
                    f"{self.noise:.0%} between two steps; measure in precision=torch.float64"
                )
        return product

    def _gradient(self, at: Tensor) -> Tensor:
        return self.problem.gradient(self.problem.unflatten(at))[1]
