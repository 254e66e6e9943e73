"""When a growing signal will reach a limit: local trends, pooled, with an interval of steps.

s: step; y: a positive signal over its limit.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import t as student

from towtank.estimate import Interval
from towtank.signals.history import Floats
from towtank.signals.trend import DRAWS, HORIZON, line

LEAST = 8  # points of a trend
FARTHEST = 100.0  # factor over which a trend may be continued


def crossing(
    steps: Floats, values: Floats, limit: float, *, falling: bool = False, horizon: float = HORIZON, seed: int = 0
) -> Interval | None:
    """The step at which a positive signal reaches a limit, or None where that cannot be told.

    Over the later half of the points (at least 8) three trends are fitted by least squares: linear (y in s), exponential (log y in s)
    and a power (log y in log s); of a falling signal, its inverse. Their errors are those of correlated residuals: n is replaced by n (1 - r) / (1 + r), r the
    correlation of neighbours. Draws from all are pooled by their likelihoods, so that the interval shows what the data leave
    open about the form of the growth. There is no forecast where a slope is not away from 0 at 95 %, where the middle lies
    beyond `horizon` times the steps of the trend, where a fortieth of the draws never cross, where the signal is more than a factor of
    100 away, or where the forecast from the first three quarters of the points disagrees: growth that bends has no trend yet. It
    is the crossing of the trend, not of its noisiest reading.

    Args:
        steps: of the readings, ascending.
        values: of the signal; readings that are not positive and finite are left out.
        limit: to reach, positive.
        falling: whether it is reached from above.
        horizon: see above.
        seed: of the draws.

    Returns:
        The interval (95 %) of the step, or None.

    Raises:
        ValueError: if the limit is not positive, or steps and values differ in number.

    Example:
        A signal that doubles every 10 steps from 1 is at 1024 after 100.

        >>> s = np.arange(1.0, 71.0)
        >>> found = crossing(s, 2 ** (s / 10), 1024.0)
        >>> print(found)
        100 [100, 100]
    """
    if limit <= 0 or len(steps) != len(values):
        raise ValueError(
            f"expected a positive limit and a value for each step, got {limit}, {len(steps)}, {len(values)}"
        )
    usable = np.isfinite(values) & (values > 0) & (steps >= 1)
    s, y = steps[usable], values[usable] / limit
    y = 1 / y if falling else y
    if y[-3:].max(initial=0.0) < 1 / FARTHEST:
        return None
    now, earlier = _crossing(s, y, horizon, seed), _crossing(*_first(s, y), np.inf, seed)
    if now is None or earlier is None:
        return None
    slack = 0.1 * (now.value - float(s[-1]))  # a tenth of the lead is no disagreement
    return now if now.low - slack <= earlier.high and earlier.low <= now.high + slack else None


def _first(s: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The first three quarters of the points."""
    count = 3 * len(s) // 4
    return s[:count], y[:count]


def _crossing(s: Floats, y: Floats, horizon: float, seed: int) -> Interval | None:
    if len(s) < LEAST or s[-1] <= s[0]:
        return None
    now, begin = s[-1], s[0]
    recent = slice(min(len(s) // 2, len(s) - LEAST), None)
    drawn = _pooled(s[recent], y[recent], np.random.default_rng(seed))
    if drawn is None:
        return None
    low, middle, high = np.quantile(drawn, [0.025, 0.5, 0.975], method="nearest")
    if not np.isfinite(high) or middle - now > horizon * (now - begin):
        return None
    low, middle, high = (float(max(x, now)) for x in (low, middle, high))
    return Interval(middle, low, high)


def _pooled(s: Floats, y: Floats, rng: np.random.Generator) -> Floats | None:
    """Draws of the crossing of y = limit from all forms, as many of each as its likelihood gives; None where one need not rise.

    Residuals are relative to the signal: of its logarithm, or shares of its mean.
    """
    mean = float(y.mean())
    forms = (line(s, (y - 1) / mean), line(s, np.log(y)), line(np.log(s), np.log(y)))
    best = min(forms, key=lambda x: x.scatter)
    floor = max(best.scatter, len(s) * (8 * np.finfo(float).eps * max(1.0, float(np.abs(np.log(y)).max()))) ** 2)
    weights = np.array([(max(x.scatter, floor) / floor) ** (-best.independent / 2) for x in forms])
    counts = np.round(DRAWS * weights / weights.sum()).astype(int)
    drawn = []
    for x, count, unlog in zip(forms, counts, (False, False, True), strict=True):
        if count >= DRAWS // 40:
            if x.slope - float(student.ppf(0.975, x.free)) * x.error <= 0:
                return None
            zeros = x.zeros(count, rng)
            drawn.append(np.exp(np.minimum(zeros, 700.0)) if unlog else zeros)
    return np.concatenate(drawn)
