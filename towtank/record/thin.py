"""A long curve in few points."""

from __future__ import annotations

import math
from operator import itemgetter

Point = tuple[int, float]
_VALUE = itemgetter(1)


def thin(curve: list[Point], limit: int) -> list[Point]:
    """At most `limit` points of a curve: its ends, and of each stretch the lowest and the highest, or one that is not finite.

    Args:
        curve: (step, value), in order of steps.
        limit: points to keep, at least 4.

    Raises:
        ValueError: if the limit is below 4.

    Example:
        >>> thin([(i, float(i == 5)) for i in range(10)], 4)
        [(0, 0.0), (1, 0.0), (5, 1.0), (9, 0.0)]
    """
    if limit < 4:
        raise ValueError(f"expected a limit of at least 4 points, got {limit}")
    if len(curve) <= limit:
        return list(curve)
    inner, stretches = curve[1:-1], (limit - 2) // 2
    kept, whole = [curve[0]], math.isfinite(sum(map(_VALUE, inner)))
    for i in range(stretches):
        points = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
        kept += _extremes(points, whole)
    return [*kept, curve[-1]]


def _extremes(points: list[Point], whole: bool) -> list[Point]:
    """The lowest and the highest point in order, the first one that is not finite in place of the lowest."""
    low = min(points, key=_VALUE)
    high = max(points, key=_VALUE)
    if not whole:
        low = next((point for point in points if not math.isfinite(point[1])), low)
        high = max((point for point in points if math.isfinite(point[1])), key=_VALUE, default=low)
    return [low] if low is high else [low, high] if low[0] <= high[0] else [high, low]
