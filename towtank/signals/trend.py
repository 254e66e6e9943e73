"""What a run's curvature is doing: sharpening, at the edge of stability, falling back; and whether the Fisher trace peaked.

s: step; r: sharpness over its limit, 1 at the limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.stats import t as student

from towtank.estimate import Interval
from towtank.signals.history import Floats

LEAST = 6  # points from which a trend is told
EDGE = (0.85, 1.25)  # ratios that count as hovering at the limit
SMALL = 0.1  # change over the window, as a share of the level, that counts as none
Z95 = 1.96
HORIZON = 3.0  # how far a rise may be continued, in multiples of the steps it was seen over
DRAWS = 1000

Kind = Literal[
    "progressive sharpening",
    "edge of stability",
    "self-stabilization",
    "catapult",
    "flattening",
    "unstable",
    "stable",
    "cannot tell",
]


@dataclass(frozen=True, kw_only=True)
class Trend:
    """What a series of sharpness says.

    Args:
        kind: the behavior, see `sharpness_trend`.
        ratio: sharpness over its limit now, the median of the last three.
        peak: largest ratio; peak_step: where.
        slope: change of the sharpness per step over the later half of the series, 95 %; None with too few points.
        crossing: step at which the limit is reached, while it sharpens below it; None if that cannot be told.
        reason: the numbers that decided.
    """

    kind: Kind
    ratio: float
    peak: float
    peak_step: float
    slope: Interval | None
    crossing: Interval | None
    reason: str

    def __str__(self) -> str:
        when = f"; limit reached at about step {self.crossing}" if self.crossing else ""
        return f"{self.kind}: {self.reason}{when}"


def sharpness_trend(
    step: Sequence[float] | Floats,
    sharpness: Sequence[float] | Floats,
    *,
    lr: float | Sequence[float] | Floats,
    factor: float | Sequence[float] | Floats = 2.0,
) -> Trend:
    """Name what a series of sharpness is doing against its limit factor / lr.

    With r = lr sharpness / factor, in this order:

    - edge of stability: the last third (at least 4 points) lies in 0.85 to 1.25 and has crossed or come within 5 % of 1,
      without a rise that is still under way below 1
    - catapult: it began beyond 1 and is below 1 now; self-stabilization: it began below 1, went beyond, and is below again
    - unstable: the last third is beyond 1.25, or beyond 1 and not falling
    - progressive sharpening, flattening: the later half rises, or falls, by more than its error at 95 %, and by more than 10 % of
      its level over the whole window at that slope
    - stable: a change of 10 % over the window is excluded; cannot tell: nothing of this, or fewer than 6 points

    The error of the slope allows for the correlation of neighbouring readings.

    Args:
        step: of the readings, ascending.
        sharpness: readings, preconditioned ones with their own factor; those that are not finite are left out.
        lr: learning rate at each reading, or one.
        factor: c of the limit lr sharpness < c at each reading, or one.

    Raises:
        ValueError: if lengths differ, steps do not ascend, or lr or factor is not positive.

    Example:
        >>> s = np.arange(0.0, 100.0, 5.0)
        >>> found = sharpness_trend(s + 1, 10 + 0.1 * s, lr=0.08)
        >>> found.kind, round(found.slope.value, 3), round(found.ratio, 2)
        ('progressive sharpening', 0.1, 0.76)

    Source: Cohen et al. 2021, section 3 (progressive sharpening, edge of stability); Damian et al. 2023 (self-stabilization);
    Lewkowycz et al. 2020 (catapult).
    """
    s, y, limit = _series(step, sharpness, lr, factor)
    if len(s) < LEAST:
        reason = f"expected {LEAST} readings or more, got {len(s)}; measure more often"
        return Trend(
            kind="cannot tell",
            ratio=_last(y / limit),
            peak=float(np.max(y / limit, initial=-math.inf)) if len(s) else math.nan,
            peak_step=float(s[np.argmax(y / limit)]) if len(s) else math.nan,
            slope=None,
            crossing=None,
            reason=reason,
        )
    r = y / limit
    slope = slope_of(*_later(s, y))
    kind, reason = _named(s, y, r, slope)
    reached = limit_reached(s, r) if kind == "progressive sharpening" and _last(r) < 1 else None
    top = int(np.argmax(r))
    return Trend(
        kind=kind,
        ratio=_last(r),
        peak=float(r[top]),
        peak_step=float(s[top]),
        slope=slope,
        crossing=reached,
        reason=reason,
    )


def limit_reached(s: Floats, r: Floats, *, seed: int = 0) -> Interval | None:
    """The step at which a rising ratio reaches 1, 95 %; None where that cannot be told.

    A linear and an exponential rise are fitted to the later half and pooled by their likelihoods, so that the interval shows what
    the form of the growth leaves open; `towtank.signals.forecast.crossing` does so for signals of many decades. None where a
    fortieth of the draws never cross, or where the middle lies beyond 3 times the steps seen.

    Args:
        s: steps, ascending.
        r: ratio, positive.
        seed: of the draws.

    Example:
        >>> s = np.arange(0.0, 100.0, 5.0)
        >>> print(limit_reached(s, 0.4 + s / 250))
        150 [150, 150]
    """
    s, r = _later(s, r)
    lines = [line(s, r - 1), line(s, np.log(r))] if (r > 0).all() else [line(s, r - 1)]
    sizes = [float(r.mean()), 1.0]
    floor = len(s) * (64 * np.finfo(float).eps) ** 2
    scatter = np.array([max(x.scatter / size**2, floor) for x, size in zip(lines, sizes)])
    weights = (scatter.min() / scatter) ** (lines[int(scatter.argmin())].independent / 2)
    rng = np.random.default_rng(seed)
    drawn = [x.zeros(round(DRAWS * w), rng) for x, w in zip(lines, weights / weights.sum())]
    low, middle, high = np.quantile(np.concatenate(drawn), [0.025, 0.5, 0.975], method="nearest")
    if not math.isfinite(high) or middle - s[-1] > HORIZON * (s[-1] - s[0]):
        return None
    return Interval(*(float(max(x, s[-1])) for x in (middle, low, high)))


@dataclass(frozen=True)
class Line:
    """Least squares of y on s: mean of s, level of y there, slope, sum of (s - mean)^2, residuals."""

    mean: float
    level: float
    slope: float
    spread: float
    rest: Floats

    @property
    def scatter(self) -> float:
        """Sum of squared residuals."""
        return float((self.rest**2).sum())

    @property
    def independent(self) -> float:
        """How many independent readings n residuals of correlation rho between neighbors are worth, n (1 - rho) / (1 + rho)."""
        rho = float((self.rest[1:] * self.rest[:-1]).sum()) / self.scatter if self.scatter > 0 else 0.0
        rho = min(max(rho, 0.0), 0.95)
        return len(self.rest) * (1 - rho) / (1 + rho)

    @property
    def free(self) -> float:
        """Degrees of freedom; not below 2, so that a smooth bend does not hide a clear rise."""
        return max(self.independent - 2, 2.0)

    @property
    def error(self) -> float:
        """Standard error of the slope."""
        return math.sqrt(self.scatter / self.free / self.spread)

    def zeros(self, count: int, rng: np.random.Generator) -> Floats:
        """Draws of the step at which the line is 0; infinite where it does not rise."""
        slopes = self.slope + self.error * rng.standard_t(self.free, count)
        levels = self.level + self.error * math.sqrt(self.spread / len(self.rest)) * rng.standard_t(self.free, count)
        return np.where(slopes > 0, self.mean - levels / np.where(slopes > 0, slopes, 1.0), np.inf)


def line(s: Floats, y: Floats) -> Line:
    """The line of least squares."""
    mean, level = float(s.mean()), float(y.mean())
    spread = float(((s - mean) ** 2).sum())
    slope = float(((s - mean) * y).sum()) / spread
    return Line(mean, level, slope, spread, y - level - slope * (s - mean))


def slope_of(s: Floats, y: Floats) -> Interval:
    """Least-squares slope with its 95 % interval; n residuals of correlation rho count as n (1 - rho) / (1 + rho).

    Args:
        s: places, at least 3, not all equal.
        y: values.

    Example:
        >>> print(slope_of(np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 2.0, 4.0, 6.0])))
        2 [2, 2]
    """
    fitted = line(s, y)
    half = float(student.ppf(0.975, fitted.free)) * fitted.error
    return Interval(fitted.slope, fitted.slope - half, fitted.slope + half)


def _later(s: Floats, y: Floats) -> tuple[Floats, Floats]:
    """The later half, where that is enough."""
    begin = len(s) // 2 if len(s) >= 2 * LEAST else 0
    return s[begin:], y[begin:]


def _series(step: Any, sharpness: Any, lr: Any, factor: Any) -> tuple[Floats, Floats, Floats]:
    s, y = np.atleast_1d(np.asarray(step, float)), np.atleast_1d(np.asarray(sharpness, float))
    rate, c = np.asarray(lr, float), np.asarray(factor, float)
    if s.shape != y.shape or s.ndim != 1 or any(x.ndim and x.shape != s.shape for x in (rate, c)):
        raise ValueError(f"expected one value for each of {s.size} steps, got {y.size}, {rate.size}, {c.size}")
    if not ((rate > 0).all() and (c > 0).all()):
        raise ValueError("expected positive learning rates and factors; leave out steps at which the rate is 0")
    keep = np.isfinite(y) & np.isfinite(s)
    if (np.diff(s[keep]) <= 0).any():
        raise ValueError("expected steps that ascend, got some that do not; sort the readings")
    return s[keep], y[keep], np.broadcast_to(c / rate, s.shape)[keep]


def _named(s: Floats, y: Floats, r: Floats, slope: Interval) -> tuple[Kind, str]:
    tail, now = r[-max(4, len(r) // 3) :], _last(r)
    span, level = float(s[-1] - s[0]), float(np.median(np.abs(y)))
    rises, falls = slope.low > 0, slope.high < 0
    moved = span * slope.value / level if level else 0.0
    change = f"{moved:+.0%} over {span:g} steps, ratio {now:.2f}"
    climbing = rises and tail.max() < 1 and tail[-1] == tail.max()
    if EDGE[0] <= tail.min() and tail.max() <= EDGE[1] and tail.max() >= 0.95 and not climbing:
        return "edge of stability", f"ratio {tail.min():.2f} to {tail.max():.2f} over the last {len(tail)} readings"
    if r.max() > 1.0 + 0.05 and now < 1:
        kind: Kind = "catapult" if _first(r) > 1 else "self-stabilization"
        return kind, f"ratio peaked at {r.max():.2f} at step {s[np.argmax(r)]:g}, {now:.2f} now"
    if tail.min() > EDGE[1] or (now > 1 and not falls):
        return "unstable", f"ratio {now:.2f}"
    if rises and moved > SMALL:
        return "progressive sharpening", change
    if falls and moved < -SMALL:
        return "flattening", change
    most = span * max(abs(slope.low), abs(slope.high))
    if most <= SMALL * level or (not level and not most):
        return "stable", change
    if abs(moved) <= SMALL and (rises or falls):
        return "stable", change
    return "cannot tell", f"slope {slope}, which excludes neither a rise nor a fall; ratio {now:.2f}"


def _last(r: Floats) -> float:
    return float(np.median(r[-3:])) if len(r) else math.nan


def _first(r: Floats) -> float:
    return float(np.median(r[:3]))


@dataclass(frozen=True, kw_only=True)
class EarlyPeak:
    """Whether a positive series, such as the trace of the Fisher matrix, exploded early and came down.

    Args:
        kind: "early peak", "late peak", "rising" (no peak yet), "none", or "cannot tell".
        step: of the peak.
        value: at the peak, smoothed by the median of three.
        rise: peak over the first value.
        fall: peak over the last value.
        share: place of the peak among the steps seen, 0 to 1.
        reason: the numbers that decided.
    """

    kind: Literal["early peak", "late peak", "rising", "none", "cannot tell"]
    step: float
    value: float
    rise: float
    fall: float
    share: float
    reason: str


def early_peak(
    step: Sequence[float] | Floats,
    value: Sequence[float] | Floats,
    error: Sequence[float] | Floats | None = None,
    *,
    height: float = 2.0,
    early: float = 0.5,
) -> EarlyPeak:
    """Find the early explosion of the Fisher trace, which small learning rates show and large ones suppress.

    The series is smoothed by the median of three. A peak stands `height` times above the first value and as much above the
    last, at 95 % where errors are given; it is early in the first half of the steps. The higher it is, the worse the run
    generalizes in the reference; compare peaks of learning rates.

    Args:
        step: of the readings, ascending.
        value: readings, positive; those that are not finite are left out.
        error: standard errors of the readings.
        height: how far the peak stands out, at least 1.
        early: the share of the steps within which a peak is early.

    Raises:
        ValueError: if lengths differ.

    Example:
        >>> s = np.arange(1.0, 101.0)
        >>> found = early_peak(s, 1 + 9 * np.exp(-(((s - 20) / 8) ** 2)))
        >>> found.kind, found.step, round(found.fall, 1)
        ('early peak', 20.0, 9.9)

    Source: Jastrzebski et al. 2021, "Catastrophic Fisher explosion", section 3.
    """
    s, y = np.asarray(step, float), np.asarray(value, float)
    e = np.zeros_like(y) if error is None else np.asarray(error, float)
    if not s.shape == y.shape == e.shape:
        raise ValueError(f"expected one value for each of {s.size} steps, got {y.size} and {e.size} errors")
    keep = np.isfinite(y) & (y > 0)
    s, y, e = s[keep], y[keep], np.nan_to_num(e[keep])
    if len(s) < LEAST:
        nan = math.nan
        reason = f"expected {LEAST} positive readings or more, got {len(s)}"
        return EarlyPeak(kind="cannot tell", step=nan, value=nan, rise=nan, fall=nan, share=nan, reason=reason)
    smooth = np.median([y[:-2], y[1:-1], y[2:]], axis=0)
    smooth = np.concatenate([[min(y[0], smooth[0])], smooth, [smooth[-1]]])
    tied = np.flatnonzero(smooth == smooth.max())  # the median of three is flat at the top
    top = int(tied[np.argmax(y[tied])])
    peak, first, last = (float(smooth[i]) for i in (top, 0, -1))
    rise, fall, share = peak / first, peak / last, float((s[top] - s[0]) / (s[-1] - s[0]))
    sure = [Z95 * math.hypot(e[top] / peak, e[i] / smooth[i]) for i in (0, -1)]
    up, down = rise / math.exp(sure[0]) >= height, fall / math.exp(sure[1]) >= height
    reason = f"{rise:.3g} times the first and {fall:.3g} times the last value, at step {s[top]:g}"
    kind = ("early peak" if share <= early else "late peak") if up and down else "rising" if up else "none"
    return EarlyPeak(kind=kind, step=float(s[top]), value=peak, rise=rise, fall=fall, share=share, reason=reason)
