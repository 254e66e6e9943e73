"""What a number is in towtank: a value with its uncertainty and its cost, and a verdict with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

Status = Literal["ok", "weak", "refuse"]
_ORDER: tuple[Status, ...] = ("ok", "weak", "refuse")


@dataclass(frozen=True)
class Interval:
    """A value with a confidence interval.

    Args:
        value: point estimate, in the unit of the quantity.
        low: lower end of the interval.
        high: upper end of the interval.
        level: coverage the interval claims, between 0 and 1.

    Raises:
        ValueError: if `low <= value <= high` does not hold, or the level is not between 0 and 1.

    Example:
        >>> Interval(2.0, 1.5, 2.5)
        Interval(value=2.0, low=1.5, high=2.5, level=0.95)
        >>> 1.6 in Interval(2.0, 1.5, 2.5)
        True
        >>> print(Interval(0.003, 0.002, 0.0041))
        0.003 [0.002, 0.0041]
    """

    value: float
    low: float
    high: float
    level: float = 0.95

    def __post_init__(self) -> None:
        if not self.low <= self.value <= self.high:
            raise ValueError(f"expected low <= value <= high, got {self.low}, {self.value}, {self.high}")
        if not 0 < self.level < 1:
            raise ValueError(f"expected a level between 0 and 1, got {self.level}")

    def __contains__(self, x: float) -> bool:
        return self.low <= x <= self.high

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def overlaps(self, other: Interval) -> bool:
        """Whether two intervals share a point."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Verdict:
    """How far an answer may be trusted: `ok`, `weak` or `refuse`, and why.

    Example:
        >>> Verdict("ok").worse(Verdict("weak", "one seed"))
        Verdict(status='weak', reason='one seed')
    """

    status: Status
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.reason}" if self.reason else self.status

    def worse(self, other: Verdict) -> Verdict:
        """The less trusting of the two; reasons of equally bad ones are joined."""
        mine, theirs = _ORDER.index(self.status), _ORDER.index(other.status)
        if mine != theirs:
            return self if mine > theirs else other
        reasons = [r for r in dict.fromkeys((self.reason, other.reason)) if r]
        return Verdict(self.status, "; ".join(reasons))


@dataclass(frozen=True)
class Estimate:
    """A measured number: its value, its standard error, what it cost, and which quantity it is.

    Args:
        value: the estimate, in the unit of the quantity.
        stderr: standard error of the value in the same unit; 0.0 for a value that was computed rather than sampled,
            NaN where too few samples were drawn to tell.
        products: operator products spent; cheaper samples count as the fraction of a product that they cost.
        converged: whether the requested accuracy was reached.
        convention: which matrix of which loss this belongs to.

    Example:
        >>> trace = Estimate(12.4, 0.3, 96)
        >>> print(trace)
        12.4 ± 0.3 (96 products)
        >>> float(trace)
        12.4
        >>> print(Estimate(12.4, 3.1, 8, converged=False))
        12.4 ± 3.1 (8 products, not converged)
        >>> trace.interval().low < 12.4 < trace.interval().high
        True
    """

    value: float
    stderr: float = 0.0
    products: float = 0.0
    converged: bool = True
    convention: str = ""

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        count = f"{self.products:,.0f}" if self.products >= 100 else f"{self.products:.3g}"
        cost = f"{count} products" + ("" if self.converged else ", not converged")
        if not self.stderr:
            return f"{self.value:.4g} ({cost})"
        return f"{_to_the_digit_of(self.value, self.stderr)} ± {self.stderr:.2g} ({cost})"

    def interval(self, level: float = 0.95) -> Interval:
        """The normal confidence interval of the value.

        Raises:
            ValueError: if the standard error is not a number.
        """
        if not math.isfinite(self.stderr):
            raise ValueError(f"expected a finite standard error, got {self.stderr}; draw more samples")
        half = NormalDist().inv_cdf((1 + level) / 2) * self.stderr
        return Interval(self.value, self.value - half, self.value + half, level)


def _to_the_digit_of(value: float, stderr: float) -> str:
    if not (math.isfinite(value) and math.isfinite(stderr) and value):
        return f"{value:.4g}"
    digits = math.floor(math.log10(abs(value))) - math.floor(math.log10(stderr)) + 2
    return f"{value:.{min(max(digits, 2), 12)}g}"


def finite(x: float | None) -> bool:
    """Whether `x` is a usable number (not None, NaN or infinite)."""
    return x is not None and math.isfinite(x)
