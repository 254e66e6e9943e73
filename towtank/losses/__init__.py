"""Losses of the built-in tasks, in nats, written so that `vmap` and `compile` see plain tensor operations."""

from __future__ import annotations

from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor, log_z: Tensor | None = None) -> Tensor:
    """Mean cross-entropy, log Z - z_target, over all leading axes.

    Args:
        logits: shape (..., V).
        targets: integer classes, shape (...).
        log_z: logsumexp of the logits, shape (...), where it is known already: it is a good part of the cost.

    Returns:
        A scalar, in nats.

    Example:
        >>> import torch
        >>> cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1, 2])).item() == torch.tensor(4.0).log().item()
        True
    """
    picked = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return ((logits.logsumexp(-1) if log_z is None else log_z) - picked).mean()


def z_loss(log_z: Tensor) -> Tensor:
    """Mean (log Z)^2: the penalty that keeps output logits from drifting.

    Args:
        log_z: logsumexp of the logits, any shape.

    Returns:
        A scalar.

    Example:
        >>> import torch
        >>> z_loss(torch.tensor([1.0, -3.0])).item()
        5.0

    Source: Chowdhery et al. 2022, section 5; Wortsman et al. 2023, section 3.1.2 (coefficient 1e-4).
    """
    return log_z.square().mean()


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error over all axes."""
    return (outputs - targets).square().mean()
