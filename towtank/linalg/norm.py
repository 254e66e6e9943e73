"""Frobenius norm of an operator."""

from __future__ import annotations

import torch
from torch import Tensor

from towtank.estimate import Estimate
from towtank.linalg.draws import as_generator, dots, rademacher
from towtank.linalg.operator import LinearOperator
from towtank.linalg.products import Products
from towtank.linalg.sampling import LEAST, check_tolerance, sample_until


def frobenius_norm(
    op: LinearOperator,
    *,
    rtol: float = 0.05,
    generator: torch.Generator | int | None = None,
    max_products: int = 1000,
    progress: bool | None = None,
) -> Estimate:
    """|A|_F, the root of the mean of |A v|^2 over random sign vectors v.

    Args:
        op: the operator (P, P).
        rtol: standard error asked for, as a share of the norm.
        generator: of the probes, or a seed.
        max_products: where to stop at the latest; not converged is then said.
        progress: show a bar; by default on a terminal when it takes long.

    Raises:
        ValueError: if an argument does not fit or a product is not finite.
        TypeError: if the operator is not symmetric.

    Example:
        >>> print(frobenius_norm(LinearOperator.from_matrix(2 * torch.eye(25))))
        10 (20 products)

    Source: Hutchinson 1990, applied to A^T A; the error of the root is the delta method's.
    """
    check_tolerance(rtol, 0.0)
    with Products(op, max_products, "Frobenius norm", show=progress) as A:
        draw = as_generator(generator, op.device)
        P = op.shape[0]
        if P <= min(LEAST, A.left):
            columns = A(torch.eye(P, dtype=op.dtype, device=op.device))
            return Estimate(float(dots(columns, columns).sum()) ** 0.5, 0.0, A.spent, True, op.convention)

        def squares(count: int) -> Tensor:
            probes = (rademacher(P, 1, draw, like=op.dtype, device=op.device) for _ in range(count))
            return torch.cat([dots(y, y) for y in map(A, probes)])

        # d|A|_F = d(|A|_F^2) / (2 |A|_F): a share of the norm is half that share of its square
        running, met = sample_until(squares, rtol=2 * rtol, atol=0.0, room=lambda: A.left)
        value = float(running.mean) ** 0.5
        error = float(running.stderr) / (2 * value) if value else 0.0
    return Estimate(value, error, A.spent, met, op.convention)
