"""A gradient seen in the span of its leading singular vectors: shared by GaLore and Fira.

A matrix (rows, ...) is laid out tall, (long, short), so that the basis (short, rank) always multiplies from the right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from towtank.optim.rule import Role
from towtank.optim.rules import adamw

Number = float | Tensor


def projected(param: Tensor, role: Role) -> bool:
    """Whether a parameter is projected: matrices and convolutions are; embeddings, heads and vectors take Adam."""
    return role == "matrix" and param.ndim > 1


def zeros(param: Tensor, rank: Number, gap: Number) -> tuple[Tensor, Tensor, Tensor]:
    """A basis of zeros (short, rank), which `leading` fills, and two moments (long, rank).

    Raises:
        ValueError: for a rank or a gap below 1.
    """
    if rank < 1 or gap < 1:
        raise ValueError(f"rank = {rank}, update_proj_gap = {gap}: expected numbers >= 1")
    long, short = tall(param).shape
    columns = min(int(rank), short)
    return param.new_zeros(short, columns), param.new_zeros(long, columns), param.new_zeros(long, columns)


def tall(x: Tensor) -> Tensor:
    """A tensor (rows, ...) as a matrix, transposed if it has more columns than rows.

    Example:
        >>> tall(torch.zeros(2, 3, 4)).shape
        torch.Size([12, 2])
    """
    matrix = x.reshape(x.shape[0], -1)
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


def restored(matrix: Tensor, like: Tensor) -> Tensor:
    """Inverse of `tall`."""
    wide = like.shape[0] ** 2 < like.numel()
    return (matrix.mT if wide else matrix).reshape(like.shape)


def leading(grad: Tensor, rank: int) -> Tensor:
    """The leading singular vectors of the gradient's shorter side, (short, rank), in the gradient's precision.

    Example:
        >>> leading(torch.tensor([[0.0, 3.0], [0.0, 4.0], [1.0, 0.0]]), 1).abs()
        tensor([[0.],
                [1.]])
    """
    matrix = grad.reshape(grad.shape[0], -1)  # not laid out tall: the signs are then those of the official code
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (vh.mT if matrix.shape[0] >= matrix.shape[1] else u)[:, :rank]


def adam(grad: Tensor, m: Tensor, v: Tensor, hyper: Any, step: Number, *, official: bool):  # noqa: ANN201
    """(direction, factor, m, v) of Adam: the step is lr * factor * direction.

    With c1 = 1 - b1^t, c2 = 1 - b2^t the direction is (m / c1) / (sqrt(v / c2) + eps) and the factor 1; officially
    m / (sqrt(v) + eps) and sqrt(c2) / c1, which makes epsilon larger while t is small.
    """
    m, v = torch.lerp(grad, m, hyper.beta1), torch.lerp(torch.square(grad), v, hyper.beta2)
    unbias1, unbias2 = 1 / (1 - hyper.beta1**step), (1 - hyper.beta2**step) ** -0.5
    if official:
        return m / (torch.sqrt(v) + hyper.eps), unbias1 / unbias2, m, v
    return m * unbias1 / (torch.sqrt(v) * unbias2 + hyper.eps), 1.0, m, v


def adam_step(param: Tensor, grad: Tensor, state: adamw.State, hyper: Any, step: Number, *, official: bool):  # noqa: ANN201
    """One step of what is not projected."""
    direction, factor, m, v = adam(grad, state.m, state.v, hyper, step, official=official)
    return param - (hyper.lr * factor) * direction, adamw.State(m, v)


def captured(grad: Tensor, basis: Tensor) -> Tensor:
    """Share of the gradient's squared norm that lies in the span of the basis."""
    inside = torch.sum(torch.square(tall(grad) @ basis))
    return inside / torch.clamp(torch.sum(torch.square(grad)), min=torch.finfo(grad.dtype).tiny)
