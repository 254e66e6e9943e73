"""Taking out of a step what only changes the length of scale-invariant weights: shared by AdamP and SGDP."""

from __future__ import annotations

import torch
from torch import Tensor

from towtank.optim.rowwise import largest, row_count, row_length, row_sum, total

Number = float | Tensor


def project(
    param: Tensor, grad: Tensor, step: Tensor, delta: Number, wd_ratio: Number, eps: Number
) -> tuple[Tensor, Number]:
    """The step without its radial part where weights look scale-invariant, and the factor of their weight decay.

    First by rows (channels), then as a whole (layer): if max |cos(grad, param)| < delta / sqrt(size of a view), then
    q <- q - p_hat (p_hat . q) with p_hat = p / (||p|| + eps), and the decay is multiplied by `wd_ratio`.

    Source: Heo et al. 2021, "AdamP", equations 8 and 12, algorithm 1.
    """
    pp, gg, gp = row_sum(param * param), row_sum(grad * grad), row_sum(grad * param)
    length, rows = row_length(param), row_count(param)
    cosines = torch.abs(gp) / torch.clamp(torch.sqrt(gg * pp), min=eps)
    by_row = largest(cosines) < delta / length**0.5
    p2, q2 = total(pp), total(gp)
    cosine = torch.abs(q2) / torch.clamp(torch.sqrt(total(gg) * p2), min=eps)
    as_whole = cosine < delta / (length * rows) ** 0.5
    qp = row_sum(step * param)
    radial = torch.where(
        by_row,
        qp / torch.square(torch.sqrt(pp) + eps),
        torch.where(as_whole, total(qp) / torch.square(torch.sqrt(p2) + eps) + 0 * pp, 0 * pp),
    )
    factor = torch.where(by_row | as_whole, wd_ratio + 0 * p2, 1 + 0 * p2)
    return step - radial * param, factor
