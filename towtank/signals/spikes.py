"""Loss and gradient spikes: a value far above what its own recent past leads to expect.

The past is detrended by a robust line; the scale is robust too, and wide where the past itself had far outliers. At most the
last 128 values count. A value that is not finite is a divergence, not a spike: see `diverged`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from towtank.signals.step import CannotTell

Floats = NDArray[np.float64]
LEAST = 20  # values before which nothing is told
WINDOW = 128  # values of the past that count
_RECENT = 5  # values whose median stands for "just now"
_NORMAL = 1.4826  # median absolute deviation to standard deviation, for a Gaussian
_TAIL = 2.4  # largest past residuals, as a share of the scale: with z > 6 a spike is 2.5 times as large as they are


@dataclass(frozen=True, kw_only=True)
class Rule:
    """When a value is a spike.

    Args:
        z: robust standard deviations above the expected value.
        rise: relative rise over the expected value, at least.
        logarithm: whether to look at logarithms, for positive quantities that vary by factors.

    Raises:
        ValueError: if z is not positive, or the rise is not between 0 and 1.
    """

    z: float = 6.0
    rise: float = 0.1
    logarithm: bool = False

    def __post_init__(self) -> None:
        if not (self.z > 0 and 0 <= self.rise <= 1):
            raise ValueError(f"expected z > 0 and a rise between 0 and 1, got {self.z} and {self.rise}")


LOSS = Rule()
NORM = Rule(rise=1.0, logarithm=True)
RULES = {"train/loss": LOSS, "grad/norm": NORM}


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A spike of one quantity.

    Args:
        step: where it is.
        key: of which quantity.
        value: what was seen.
        expected: what the past led to expect.
        z: how far above, in robust standard deviations.
    """

    step: int
    key: str
    value: float
    expected: float
    z: float

    def __str__(self) -> str:
        return f"{self.key} {self.value:.4g} at step {self.step}, {self.expected:.4g} expected (z = {self.z:.3g})"


@dataclass(frozen=True, kw_only=True)
class Band:
    """Where the next value is expected.

    Args:
        low: lower end of the expected values: of the trend and of the recent median, the smaller.
        high: upper end, the larger.
        scale: robust standard deviation of a new value around them.
    """

    low: float
    high: float
    scale: float

    def z(self, value: float) -> float:
        """Standard deviations of a value above (positive) or below the expected ones; 0 between them, infinite if not finite."""
        if not math.isfinite(value):
            return math.inf
        nearest = min(max(value, self.low), self.high)
        return (value - nearest) / self.scale


def band(past: Sequence[float], *, ahead: int = 1) -> Band:
    r"""Where a value is expected, from the values before it.

    The line goes through the medians of the first and last third of the past. With residuals r around it,
    scale^2 = s^2 (1 + 1.6 / n + 21 d^2 / n^3), s = max(1.48 MAD(r), 1.48 MAD(diff r) / sqrt 2, r_(j) / 2.4),
    for n values and a distance d from their middle; r_(j) is the j-th largest |r| of the later half, j = 1 + n // 128, so that
    a heavy tail widens the band and, among 128 values, a single earlier spike does not. While the past bends, as it does at the start of training,
    its older half is left out.

    Args:
        past: earlier values, oldest first; those that are not finite are left out, and only the last 128 count.
        ahead: values ahead of the last one.

    Raises:
        CannotTell: with fewer than 20 finite values.
        ValueError: if it is not ahead.

    Example:
        >>> ramp = [float(i) for i in range(30)]
        >>> round(band(ramp).high, 6)
        30.0

    Source: the line is that of Brown and Mood 1951 with thirds (Tukey's resistant line); its error 4.6 s / n^(3/2) is that of
    the difference of two medians of n / 3 Gaussian values.
    """
    y = np.asarray(past, dtype=float)
    y = y[np.isfinite(y)][-WINDOW:]
    if len(y) < LEAST:
        raise CannotTell(f"expected at least {LEAST} earlier values, got {len(y)}; wait")
    if ahead < 1:
        raise ValueError(f"expected ahead of at least 1, got {ahead}")
    slope, level, residuals = _line(y)
    while len(y) >= 2 * LEAST and _bent(residuals):
        y = y[len(y) // 2 :]
        slope, level, residuals = _line(y)
    n = len(y)
    distance = (n - 1) / 2 + ahead
    line = level + slope * distance
    recent = float(np.median(y[-_RECENT:]))
    spread = math.sqrt(1 + 1.6 / n + 21 * distance**2 / n**3)
    floor = 4 * sys.float_info.epsilon * max(abs(line), abs(recent)) + sys.float_info.min
    return Band(low=min(line, recent), high=max(line, recent), scale=max(_scale(residuals) * spread, floor))


def _line(y: Floats) -> tuple[float, float, Floats]:
    """Slope, value at the middle, and residuals."""
    n, third = len(y), len(y) // 3
    slope = float(np.median(y[-third:]) - np.median(y[:third])) / (n - third)
    residuals = y - slope * (np.arange(n) - (n - 1) / 2)
    level = float(np.median(residuals))
    return slope, level, residuals - level


def _bent(residuals: Floats) -> bool:
    """Whether the middle third lies off the line through the outer ones, by 3 standard errors of such a difference of medians."""
    third = len(residuals) // 3
    middle, outer = residuals[third:-third], np.concatenate([residuals[:third], residuals[-third:]])
    error = 1.25 * _wild(residuals) * math.sqrt(1.5 / third)
    return abs(float(np.median(middle) - np.median(outer))) > 3 * error


def _wild(residuals: Floats) -> float:
    """Robust standard deviation by differences of neighbors, which a bending trend does not enter."""
    steps = np.diff(residuals)
    return _NORMAL * float(np.median(np.abs(steps - np.median(steps)))) / math.sqrt(2)


def _scale(residuals: Floats) -> float:
    size = np.abs(residuals)
    later = size[-max(LEAST, len(size) // 2) :]  # the steep start of a curve is no outlier of its noise
    tail = float(np.sort(later)[-1 - len(later) // 64])
    return max(_NORMAL * float(np.median(size)), _wild(residuals), tail / _TAIL)


def spike(
    past: Sequence[float], value: float, *, step: int, key: str = "train/loss", rule: Rule | None = None
) -> Spike | None:
    """Whether a value is a spike against the values before it.

    It is one if z > 6 and it rises by at least a tenth over the expected value; norms are judged by logarithms and must double.
    False alarms per step, measured on noise around a level, are under 1e-4 for Gaussian noise, about 2e-4 for Laplace noise and
    1e-3 for Student's t with 3 degrees of freedom; a rise of less than a tenth is none, however unusual.

    Args:
        past: earlier values, oldest first; the last 128 count.
        value: the new one.
        step: its step.
        key: which quantity; with "grad/norm" the rule is that for norms.
        rule: thresholds in place of those of the key.

    Raises:
        CannotTell: if the value is not finite, which is a divergence, or with fewer than 20 earlier values.

    Example:
        >>> past = [2.0, 2.1, 1.9, 2.0, 2.05] * 6
        >>> print(spike(past, 2.1, step=31))
        None
        >>> found = spike(past, 5.0, step=31)
        >>> found.expected, found.z > 6
        (2.0, True)
    """
    rule = rule or RULES.get(key, LOSS)
    if not math.isfinite(value):
        raise CannotTell(f"expected a finite {key}, got {value}; this is a divergence, not a spike")
    usable = [v for v in past[-2 * WINDOW :] if math.isfinite(v) and (v > 0 or not rule.logarithm)]
    if len(usable) >= LEAST and not _rises(value, float(median(usable[-_RECENT:])), rule):
        return None  # as nearly always; nothing is expected below the recent median
    where = band([math.log(v) for v in usable] if rule.logarithm else usable)
    z = where.z(_seen(value, rule))
    expected = math.exp(where.high) if rule.logarithm else where.high
    if z <= rule.z or not _rises(value, expected, rule):
        return None
    return Spike(step=step, key=key, value=value, expected=expected, z=z)


def _rises(value: float, expected: float, rule: Rule) -> bool:
    return value - expected >= rule.rise * abs(expected)


def _seen(value: float, rule: Rule) -> float:
    if not rule.logarithm:
        return value
    return math.log(value) if value > 0 else -sys.float_info.max


def spikes(
    series: Iterable[tuple[int, float]], *, key: str = "train/loss", rule: Rule | None = None
) -> tuple[Spike, ...]:
    """All spikes of a series, each once, at its first step.

    Values that are spikes do not enter the past of later ones. Steps that follow a spike without a pause belong to it, up to
    20 of them: after that the higher level is taken as the new one.

    Args:
        series: (step, value) in order of steps.
        key: which quantity.
        rule: thresholds in place of those of the key.

    Example:
        >>> values = [2.0, 2.1, 1.9, 2.0, 2.05] * 8
        >>> values[30] = 9.0
        >>> [found.step for found in spikes(enumerate(values))]
        [30]
    """
    past: list[float] = []
    held: list[float] = []  # values of the spike that is going on
    found: list[Spike] = []
    for step, value in series:
        now = _spike_or_none(past, value, step, key, rule)
        if now is None:
            held = []
            past.append(value)
            continue
        found += [] if held else [now]
        held.append(value)
        if len(held) >= LEAST:
            past, held = held, []
    return tuple(found)


def _spike_or_none(past: list[float], value: float, step: int, key: str, rule: Rule | None) -> Spike | None:
    try:
        return spike(past[-WINDOW:], value, step=step, key=key, rule=rule)
    except CannotTell:
        return None


def diverged(series: Iterable[tuple[int, float]]) -> int | None:
    """The first step whose value is not finite, or None.

    Example:
        >>> diverged([(1, 2.0), (2, float("nan")), (3, 2.0)])
        2
    """
    return next((step for step, value in series if not math.isfinite(value)), None)
