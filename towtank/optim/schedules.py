"""Learning-rate schedules as a shape between 0 and 1; the peak is the member's own."""

from __future__ import annotations

import math


def shape(
    step: int, steps: int, *, kind: str = "cosine", warmup: float = 0.1, final: float = 0.0, decay_share: float = 0.2
) -> float:
    """Share of the peak learning rate used by one step.

    Linear warm-up (step + 1) / w over the first w = round(warmup * steps) steps, then, with progress
    p = (step - w) / (steps - w) in [0, 1):

        cosine    final + (1 - final) (1 + cos(pi p)) / 2
        linear    1 - (1 - final) p
        wsd       1, then linear from 1 to `final` over the last decay_share * steps
        constant  1

    Args:
        step: number of updates already made, 0 <= step < steps.
        steps: length of the run.
        kind: `cosine`, `linear`, `wsd` or `constant`.
        warmup: share of the steps spent warming up.
        final: share of the peak at which the schedule ends.
        decay_share: share of the steps in the decay of `wsd`.

    Raises:
        ValueError: for an unknown kind or a step outside the run.

    Example:
        >>> [round(shape(s, 10, warmup=0.2), 3) for s in (0, 1, 2, 6)]
        [0.5, 1.0, 1.0, 0.5]
    """
    if not 0 <= step < steps:
        raise ValueError(f"expected 0 <= step < {steps}, got {step}")
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / (steps - rise)
    if kind == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * progress)) / 2
    if kind == "linear":
        return 1 - (1 - final) * progress
    if kind == "wsd":
        fall = max(1, round(decay_share * steps))
        return 1 - (1 - final) * max(0, step - (steps - fall)) / fall
    if kind == "constant":
        return 1.0
    raise ValueError(f"schedule = {kind!r}: expected cosine | linear | wsd | constant")
