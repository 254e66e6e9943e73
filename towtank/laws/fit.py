"""What every fitted law can be asked, whatever it was fitted to, and the answers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from scipy.special import bdtrik

from towtank.estimate import Interval, Verdict
from towtank.laws.table import Floats


@runtime_checkable
class Fit(Protocol):
    """A fitted law: of a size (`SizeFit`), of a formula (`FormulaFit`), of loss curves (`CurveFit`).

    A point is given as the law has it: a number, the variables by name, or the learning rate of every step.
    """

    @property
    def law(self) -> str:
        """Name of the law."""
        ...

    @property
    def verdict(self) -> Verdict:
        """How far to trust it within its data."""
        ...

    @property
    def level(self) -> float:
        """Coverage of the intervals."""
        ...

    @property
    def coefficients(self) -> Mapping[str, Interval]:
        """Coefficients with their intervals; empty if the fit is refused."""
        ...

    @property
    def residuals(self) -> Sequence[float] | Floats:
        """What the law leaves unexplained, one number a row or point."""
        ...

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd about the data."""
        ...

    def predict(self, *point: Any, **variables: Any) -> Interval:
        """What the law says at a point."""
        ...

    def judge(self, *point: Any, **variables: Any) -> Verdict:
        """How far to trust that: the verdict, and what the extrapolation adds."""
        ...

    def backtest(self, hold_out: str = "largest") -> Backtested | None:
        """Hide the largest, fit the others, predict it; None if the others are too few."""
        ...

    def identifiability(self) -> Identifiability:
        """Which coefficients the data cannot separate, and the combination that is determined."""
        ...

    def influence(self) -> Collection[Any]:
        """How far the coefficients move without what moves them most."""
        ...


class Backtested(Protocol):
    """The least that a backtest tells."""

    @property
    def predicted(self) -> Interval:
        """What the others said of the largest that was hidden."""
        ...

    @property
    def hit(self) -> bool:
        """Whether no more than chance was missed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Backtest:
    """The largest sizes or rows were hidden and predicted from the others; the fields tell of the largest."""

    size: float
    predicted: Interval
    measured: Interval
    factor: float  # max(predicted/measured, measured/predicted), the worst of the rows held out
    hit: bool  # the interval of the prediction contains the measured value
    points: tuple[HeldOut, ...] = ()  # every row held out, largest first, where rows are fitted one by one


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A row that was hidden, and what the others said of it."""

    x: dict[str, float]
    predicted: Interval
    measured: float
    row: int  # its number in the table

    @property
    def hit(self) -> bool:
        """Whether the interval contains the measured value, but for rounding."""
        rounding = 1e-9 * abs(self.measured)
        return self.predicted.low - rounding <= self.measured <= self.predicted.high + rounding

    @property
    def factor(self) -> float:
        """Larger of predicted / measured and its inverse."""
        ratio = abs(self.predicted.value / self.measured) if self.measured else np.inf
        return max(ratio, 1 / ratio) if ratio else np.inf


@dataclass(frozen=True)
class Identifiability:
    """Pairs of coefficients that the data do not separate, what they determine instead, and coefficients at a bound."""

    pairs: tuple[Confounded, ...]
    at_bound: tuple[str, ...]


@dataclass(frozen=True)
class Confounded:
    """Two coefficients whose errors go together, and the combination of them that is determined."""

    first: str
    second: str
    correlation: float
    combination: str
    value: Interval


@dataclass(frozen=True)
class Moved:
    """The few rows without which one coefficient moves most.

    Args:
        rows: their numbers in the table.
        value: the coefficient with all rows.
        coefficients: all coefficients refitted without these rows.
        factor: how far this one moves: the larger of the ratio of both values and its inverse.
    """

    rows: tuple[int, ...]
    value: float
    coefficients: dict[str, float]
    factor: float


def hidden_count(hold_out: str | int | float, total: int, what: str) -> int:
    """How many of `total` a backtest hides.

    Raises:
        ValueError: if `hold_out` is neither a number nor a fraction of them that leaves any.

    Example:
        >>> hidden_count(3, 10, "runs"), hidden_count(0.25, 10, "runs")
        (3, 3)
    """
    if isinstance(hold_out, bool) or not isinstance(hold_out, (int, float)):
        raise ValueError(f"hold_out = {hold_out!r}: expected 'largest', a number of {what} or a fraction of them")
    count = hold_out if isinstance(hold_out, int) else int(np.ceil(hold_out * total))
    if not 0 < count < total:
        raise ValueError(f"hold_out = {hold_out!r}: expected 1 to {total - 1} {what}, or a fraction between 0 and 1")
    return count


def allowed_misses(count: int, level: float) -> int:
    """How many of `count` intervals may miss before chance is no excuse.

    Example:
        >>> allowed_misses(1, 0.95), allowed_misses(100, 0.95)
        (0, 8)
    """
    return int(bdtrik(level, count, 1 - level))
