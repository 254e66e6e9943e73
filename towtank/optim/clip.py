"""Gradient norms and clipping, member by member."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def member_norms(grads: Sequence[Tensor]) -> Tensor:
    """Global gradient norm of each member, ||g_e|| over all its tensors.

    Args:
        grads: tensors of shape (E, ...), one member along the first axis.

    Returns:
        Norms, shape (E,).

    Example:
        >>> member_norms([torch.tensor([[3.0], [0.0]]), torch.tensor([[4.0], [2.0]])])
        tensor([5., 2.])
    """
    per_tensor = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads]
    return torch.linalg.vector_norm(torch.stack(per_tensor), dim=0)


def clip_scale(norms: Tensor, largest: Tensor) -> Tensor:
    """Factor that brings each member's gradient to at most `largest`: min(1, largest / (norm + 1e-6)).

    The 1e-6 is that of `torch.nn.utils.clip_grad_norm_`, so that both clip alike.

    Example:
        >>> clip_scale(torch.tensor([0.5, 4.0]), torch.tensor(1.0))
        tensor([1.0000, 0.2500])
    """
    return (largest / (norms + 1e-6)).clamp(max=1.0)
