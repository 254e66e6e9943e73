"""Learning-rate sensitivity: how much is lost by not knowing the best learning rate."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def lr_sensitivity(losses: Sequence[float | None], initial: float) -> float:
    """Mean loss above the best over a grid of learning rates, capped at the initial loss.

        mean over the grid of [min(loss(lr), l0) - l*],  l* = min over the grid of loss(lr)

    A run that diverged (None, NaN or infinite) counts as l0. Compare only curves over the same grid, or over windows of
    equal width about shifted optima; a model that never trains scores 0.

    Wortsman et al. 2023, "Small-scale proxies for large-scale Transformer training instabilities", section 2.2.

    Args:
        losses: final loss at each rate of the grid, nats.
        initial: l0, loss at initialization, nats.

    Raises:
        ValueError: if there are no losses, or the initial loss is not finite.

    Example:
        >>> round(lr_sensitivity([2.0, 1.0, None], initial=4.0), 6)
        1.333333
    """
    if not len(losses) or not np.isfinite(initial):
        raise ValueError(f"expected losses and a finite initial loss, got {len(losses)} losses and {initial}")
    y = np.array([np.nan if v is None else v for v in losses], dtype=np.float64)
    capped = np.minimum(np.where(np.isfinite(y), y, initial), initial)
    return float(np.mean(capped) - capped.min())
