"""From a fitted formula to its answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from towtank.estimate import Interval
from towtank.laws.fit import Backtest
from towtank.laws.formula_fit import FormulaFit
from towtank.laws.table import Floats, Ints
from towtank.report import text
from towtank.report.fit_answer import (
    Asked,
    FitAnswer,
    FitPoint,
    Forecast,
    Hidden,
    LeftOut,
    ProfileCurve,
    Slice,
    Tested,
    described,
    overall,
    percent,
    residuals,
    sentence,
    warned,
)

DRAWN = 1500  # rows drawn; of more, an even choice and those that fit worst
WORST = 50  # rows that fit worst are always drawn
LINE_POINTS = 61
MANY = 100_000  # rows above which a profile is a parabola with the interval of the bootstrap, and takes minutes
INFLUENTIAL = 5  # rows left out together


def answer_formula(fit: FormulaFit, asked: Asked) -> FitAnswer:
    """Everything that can be told of a fitted formula.

    Args:
        fit: the fit.
        asked: what was asked of it.

    Raises:
        ValueError: if a point to predict lacks a variable, or `hold_out` is out of range.
    """
    told = _told(fit, asked) if fit.coefficients else {}
    asked.stage("forecasting")
    forecasts = tuple(_forecast(fit, at) for at in asked.predict)
    return FitAnswer(
        **{**described(asked), "y": fit.rows.columns[""]}, **told, meaning=dict(fit.form.meaning), unit=_unit(fit, asked), rows=len(fit.rows), groups=fit.rows.groups if fit.rows.grouped else None,
        relative=fit.form.link == "log", overall=overall(fit.verdict, forecasts), verdict=fit.verdict, coefficients=fit.coefficients, forecasts=forecasts,
        sentence=sentence(asked, _fitted_in_words(fit, _unit(fit, asked)), forecasts, told.get("backtest"), _unit(fit, asked)),
        slices=_slices(fit, [f.x for f in forecasts]), warnings=warned(asked, [*fit.warnings, *_unprofiled(fit)]),
    )  # fmt: skip


def _unit(fit: FormulaFit, asked: Asked) -> str:
    """What one row of the fit is: of the table, or one of the sweeps that the law first made of the table."""
    return "row" if fit.form is asked.law else "sweep"


def _fitted_in_words(fit: FormulaFit, unit: str) -> str:
    if not fit.coefficients:
        return f"The law {fit.law!r} cannot be fitted to these rows."
    off = percent(float(np.median(np.abs(fit.residuals))), fit.form.link == "log")
    return f"The law fits {len(fit.rows):,} {unit}s, half of them within {off:.2g} %."


def _told(fit: FormulaFit, asked: Asked) -> dict[str, Any]:
    """What a fit that was not refused rests on."""
    unit, stage = _unit(fit, asked), asked.stage
    number = _numbering(fit, asked.rows if unit == "row" else None)
    stage("backtest")
    backtest = fit.backtest(asked.hold_out)
    stage("influence of single rows")
    influence, determined = fit.influence(INFLUENTIAL).items(), fit.identifiability()
    stage("sensitivity to the choice of rows")
    selection = fit.selection()
    stage("profiles")
    free = [p.name for p in fit.form.parameters if p.name not in fit.form.fixed]
    names = free if len(fit.rows) <= MANY else []
    residual = np.asarray(fit.residuals, dtype=np.float64)
    relative, drawn = fit.form.link == "log", _drawn(residual)
    return {
        "objective": fit.objective,
        "backtest": _tested(backtest, number, unit) if backtest else None,
        "residuals": residuals(residual, relative, lambda i: f"{unit} {number[fit.rows.number[i]]}"),
        "influence": {
            name: LeftOut(rows=tuple(str(number[r]) for r in m.rows), coefficients=m.coefficients, factor=m.factor)
            for name, m in influence
        },
        "confounded": determined.pairs,
        "at_bound": determined.at_bound,
        "selection": selection,
        "profiles": tuple(_profile(fit, name) for name in names),
        "points": _points(fit, residual, number, drawn, unit),
    }


def _unprofiled(fit: FormulaFit) -> list[str]:
    if len(fit.rows) <= MANY:
        return []
    return [
        f"no profiles of {len(fit.rows):,} rows: with more than {MANY:,} they are parabolas and tell the same interval"
    ]


def _tested(test: Backtest, number: Ints, unit: str) -> Tested:
    points = [
        Hidden(name=f"{unit} {number[p.row]}", x=p.x, predicted=p.predicted, measured=p.measured) for p in test.points
    ]
    return Tested.of(points, test.factor, test.hit)


def _numbering(fit: FormulaFit, rows: Sequence[int] | None) -> Ints:
    """From a row of the fitted table to its number in the file."""
    last = int(fit.rows.number.max(initial=0))
    return np.arange(last + 1) if rows is None else np.asarray(rows)


def _points(fit: FormulaFit, residual: Floats, number: Ints, drawn: Iterable[int], unit: str) -> tuple[FitPoint, ...]:
    fitted = _fitted(fit, residual)
    return tuple(
        FitPoint(
            name=f"{unit} {number[fit.rows.number[i]]}", x={n: float(v[i]) for n, v in fit.rows.x.items()},
            measured=float(fit.rows.y[i]), fitted=float(fitted[i]), residual=float(residual[i]),
        )
        for i in drawn
    )  # fmt: skip


def _fitted(fit: FormulaFit, residual: Floats) -> Floats:
    if fit.form.link == "log":
        return fit.rows.y * np.exp(-residual)
    return fit.rows.y - residual * np.ptp(fit.rows.y)


def _drawn(residual: Floats) -> Any:
    """Rows to draw: all, or of many an even choice and the worst."""
    if residual.size <= DRAWN:
        return range(residual.size)
    even = np.linspace(0, residual.size - 1, DRAWN - WORST).astype(np.int64)
    return np.union1d(even, np.argsort(-np.abs(residual))[:WORST])


def _slices(fit: FormulaFit, forecasts: Sequence[Mapping[str, float]]) -> tuple[Slice, ...]:
    if not fit.coefficients:
        return ()
    residual = np.asarray(fit.residuals, dtype=np.float64)
    held = {name: float(np.median(values)) for name, values in fit.rows.x.items()}
    return tuple(_slice(fit, name, held, residual, [f[name] for f in forecasts if len(held) == 1]) for name in held)


def _slice(
    fit: FormulaFit, name: str, held: Mapping[str, float], residual: Floats, forecasts: Sequence[float]
) -> Slice:
    others = {n: v for n, v in held.items() if n != name}
    title = f"at {text.place(others)}" if others else ""
    x = fit.rows.x[name]

    def along(values: Floats) -> list[Interval]:
        return fit.forecast({n: values if n == name else np.full(values.size, held[n]) for n in held})

    drawn = np.asarray(_drawn(residual))
    ends = (min([float(x.min()), *forecasts]), max([float(x.max()), *forecasts]))
    grid = (np.geomspace if ends[0] > 0 else np.linspace)(*ends, LINE_POINTS)
    law = np.array([v.value for v in along(x[drawn])])
    moved = law * np.exp(residual[drawn]) if fit.form.link == "log" else law + residual[drawn] * np.ptp(fit.rows.y)
    line = tuple((float(g), v) for g, v in zip(grid, along(grid), strict=True))
    points = tuple((float(a), float(b)) for a, b in zip(x[drawn], moved, strict=True))
    return Slice(variable=name, title=title, line=line, points=points, log=bool(x.min() > 0))


def _profile(fit: FormulaFit, name: str) -> ProfileCurve:
    found = fit.profile(name)
    excess = np.asarray(found.objective) / fit.objective if fit.objective else np.asarray(found.objective)
    points = tuple((float(v), float(e)) for v, e in zip(found.values, excess, strict=True) if np.isfinite(e))
    return ProfileCurve(name=name, points=points, interval=found.interval)


def _forecast(fit: FormulaFit, at: Mapping[str, float]) -> Forecast:
    verdict = fit.judge(at)
    if verdict.status == "refuse":
        return Forecast(x=dict(at), value=None, run=None, verdict=verdict)
    return Forecast(x=dict(at), value=fit.predict(at), run=fit.predict(at, scatter=True), verdict=verdict)
