"""What the terminal, the JSON and the page show of a fitted law: one structure, three views."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from towtank.estimate import Interval, Verdict
from towtank.laws.diagnose import Selection
from towtank.laws.fit import Confounded
from towtank.laws.law import Law
from towtank.laws.table import Floats
from towtank.report import text

LISTED = 500  # hidden rows listed
_NUMBERED = re.compile(r"\brows?\b[^:]*: \d")  # a warning that names rows by their numbers


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked of a fit.

    Args:
        law: the law.
        table: where the rows came from.
        columns: column of each variable.
        y: column of the measured quantity.
        predict: points to forecast, values by variable.
        hold_out: what the backtest hides: "largest", a number of runs, or a fraction of them.
        rows: number in the source of every row of the fitted table; None: its position.
        warnings: what to tell besides those of the fit.
        reproduce: the command that does it again.
        stage: called with the name of every stage that begins.
    """

    law: Law
    table: str
    columns: Mapping[str, str]
    y: str
    predict: Sequence[Mapping[str, float]] = ()
    hold_out: str | int | float = "largest"
    rows: Sequence[int] | None = None
    warnings: Sequence[str] = ()
    reproduce: str = ""
    stage: Callable[[str], None] = lambda name: None


@dataclass(frozen=True, kw_only=True)
class FitPoint:
    """One row of the table: what was measured, what the law says."""

    name: str  # "row 3", counted from 0 without the header; "size 128" where it stands for several
    x: dict[str, float]
    measured: float
    fitted: float
    residual: float  # log measured - log fitted, or the difference over the range of y


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The law along one variable."""

    variable: str
    title: str  # where the other variables are held, or which curve this is
    line: tuple[tuple[float, Interval], ...]
    points: tuple[tuple[float, float], ...]  # rows moved to the held values: the law there, times their residual
    log: bool = True  # whether the variable is drawn by its logarithm


@dataclass(frozen=True, kw_only=True)
class ProfileCurve:
    """How much worse the best fit is when one coefficient is held at a value."""

    name: str
    points: tuple[tuple[float, float], ...]  # (value, objective over that of the fit)
    interval: Interval | None  # of likelihood, where the fit tells one


@dataclass(frozen=True, kw_only=True)
class Residuals:
    """The residuals in brief: absolute values as fractions (of y, or of the range of y)."""

    median: float
    rms: float
    worst: float
    worst_at: str  # name of that point


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """The few rows without which one coefficient moves most, and all coefficients fitted without them."""

    rows: tuple[str, ...]
    coefficients: dict[str, float]
    factor: float  # by which that coefficient moves


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """A row that was hidden, and what the law fitted to the others says of it."""

    name: str
    x: dict[str, float]
    predicted: Interval
    measured: float

    @property
    def inside(self) -> bool:
        """Whether it lies in the interval of its prediction."""
        return self.measured in self.predicted


@dataclass(frozen=True, kw_only=True)
class Tested:
    """The backtest: what was hidden, by which factor the worst prediction is off, and whether the law passed."""

    points: tuple[Hidden, ...]  # the largest first; of very many not all
    count: int
    inside: int
    factor: float
    hit: bool

    @staticmethod
    def of(points: Sequence[Hidden], factor: float, hit: bool) -> Tested:
        """The backtest of these points."""
        inside = sum(p.inside for p in points)
        return Tested(points=tuple(points[:LISTED]), count=len(points), inside=inside, factor=factor, hit=hit)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What the law says of a point, and how far to trust it."""

    x: dict[str, float]
    value: Interval | None  # of the law
    run: Interval | None  # of one new run there, with its noise
    verdict: Verdict
    name: str = ""  # of the curve, where curves are predicted


@dataclass(frozen=True, kw_only=True)
class FitAnswer:
    """Everything the terminal, the JSON and the page show of a fit."""

    law: str
    formula: str
    source: str
    table: str  # where the rows came from
    columns: dict[str, str]  # column of each variable
    y: str
    rows: int
    groups: int | None  # independent runs; None: every row is one
    relative: bool  # residuals are of logarithms
    unit: str = "row"  # what is independent, hidden and left out
    sentence: str
    overall: Verdict  # of what the sentence says
    verdict: Verdict  # of the law within its rows
    coefficients: dict[str, Interval]
    meaning: dict[str, str] = field(default_factory=dict)  # of derived coefficients, in words
    objective: float | None = None
    residuals: Residuals | None = None
    confounded: tuple[Confounded, ...] = ()
    at_bound: tuple[str, ...] = ()
    influence: dict[str, LeftOut] = field(default_factory=dict)  # by coefficient
    selection: tuple[Selection, ...] = ()
    hold_out: str = "largest"
    backtest: Tested | None = None
    forecasts: tuple[Forecast, ...] = ()
    points: tuple[FitPoint, ...] = ()
    slices: tuple[Slice, ...] = ()
    profiles: tuple[ProfileCurve, ...] = ()
    warnings: tuple[str, ...] = ()
    reproduce: str = ""


def percent(residual: float, relative: bool) -> float:
    """A residual in percent: of the fitted value, or of the range of y.

    Example:
        >>> percent(0.0, True), percent(0.02, False)
        (0.0, 2.0)
    """
    return 100 * float(np.expm1(residual) if relative else residual)


def residuals(residual: Floats, relative: bool, name: Callable[[int], str]) -> Residuals | None:
    """The residuals in brief; None without any. `name`: of the row at a position."""
    if not residual.size:
        return None
    size = np.abs(np.expm1(residual) if relative else residual)
    worst, rms = int(np.argmax(size)), float(np.sqrt(np.mean(size**2)))
    return Residuals(median=float(np.median(size)), rms=rms, worst=float(size[worst]), worst_at=name(worst))


def described(asked: Asked) -> dict[str, Any]:
    """The fields of an answer that what was asked already tells."""
    law = asked.law
    return {
        "law": law.name, "formula": law.formula, "source": law.source, "table": asked.table, "y": asked.y,
        "columns": dict(asked.columns), "hold_out": str(asked.hold_out), "reproduce": asked.reproduce,
    }  # fmt: skip


def warned(asked: Asked, warnings: Sequence[str]) -> tuple[str, ...]:
    """All warnings; those of the fit count rows among the ones it was given."""
    among = " (rows counted among those kept)" if asked.rows is not None else ""
    return (*asked.warnings, *(w + among * bool(_NUMBERED.search(w)) for w in warnings))


def sentence(
    asked: Asked, fitted: str, forecasts: Sequence[Forecast], backtest: Tested | None, unit: str = "row"
) -> str:
    """The answer in words: the forecast if there is one, else how well the law fits; then the backtest."""
    first = next((f for f in forecasts if f.value), None)
    parts = [fitted, *(["It cannot tell what was asked."] if forecasts and first is None else [])]
    if first is not None and first.value is not None:
        where, v = f"{first.name} {text.place(first.x)}".strip(), first.value
        level = text.percent(v.level)
        parts = [f"At {where} the law says {v.value:.4g}, between {v.low:.4g} and {v.high:.4g} ({level} interval)."]
    return " ".join([*parts, *([tested(backtest, unit)] if backtest else [])])


def overall(verdict: Verdict, forecasts: Sequence[Forecast]) -> Verdict:
    """The verdict of what `sentence` says: of the forecast it tells, else of the law."""
    told = [f.verdict for f in forecasts if f.value] or [f.verdict for f in forecasts]
    return told[0] if told else verdict


def tested(backtest: Tested, unit: str) -> str:
    """How well the rows that were hidden would have been predicted, in a sentence."""
    away = f"{100 * (backtest.factor - 1):.2g} %" if backtest.factor < 2 else f"a factor {backtest.factor:.3g}"
    count = backtest.count
    if count == 1:
        said = "predicts it within its interval" if backtest.hit else "misses it"
        return f"Fitted without the largest {unit}, it {said} (off by {away})."
    return f"Fitted without the {count} largest {unit}s, it predicts {backtest.inside} of them within their intervals (at worst off by {away})."
