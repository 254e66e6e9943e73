"""From a fitted law of loss curves to its answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from towtank.estimate import Interval
from towtank.laws.curve_data import Curve
from towtank.laws.curve_fit import CurveFit
from towtank.laws.schedules import Schedule
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

LINE_STEPS, DRAWN = 40, 150  # steps of a drawn law, rows drawn of each curve
PANELS = 12  # curves drawn


def answer_curves(fit: CurveFit, asked: Asked, schedules: Mapping[str, Schedule]) -> FitAnswer:
    """Everything that can be told of a fitted law of loss curves.

    Args:
        fit: the fit.
        asked: what was asked of it.
        schedules: runs to predict, by name.

    Raises:
        ValueError: if there is no curve of the name to hold out.
    """
    told = _told(fit, asked) if fit.coefficients else {}
    asked.stage("forecasting")
    forecasts = tuple(_forecast(fit, name, schedule) for name, schedule in schedules.items())
    return FitAnswer(
        **described(asked), **told, rows=fit.points.log_loss.size, groups=len(fit.points.curves), relative=True, unit="curve",
        overall=overall(fit.verdict, forecasts), verdict=fit.verdict, coefficients=fit.coefficients, forecasts=forecasts,
        sentence=sentence(asked, _fitted_in_words(fit), forecasts, told.get("backtest"), "curve"),
        slices=_slices(fit, schedules), warnings=warned(asked, fit.warnings),
    )  # fmt: skip


def _fitted_in_words(fit: CurveFit) -> str:
    if not fit.coefficients:
        return f"The law {fit.law!r} cannot be fitted to these curves."
    off = percent(float(np.median(np.abs(fit.residuals))), True)
    return (
        f"The law fits {len(fit.points.curves)} curves, half of their {fit.residuals.size:,} rows within {off:.2g} %."
    )


def _told(fit: CurveFit, asked: Asked) -> dict[str, Any]:
    asked.stage("backtest")
    test = fit.backtest(str(asked.hold_out))
    asked.stage("influence of single curves")
    influence, determined = _influence(fit), fit.identifiability()
    asked.stage("profiles")
    return {
        "objective": fit.objective,
        "points": _points(fit),
        "residuals": residuals(fit.residuals, True, lambda i: _name(fit, i)),
        "backtest": None if test is None else _tested(fit, test),
        "influence": influence,
        "confounded": determined.pairs,
        "at_bound": determined.at_bound,
        "profiles": tuple(_profile(fit, p.name) for p in fit.form.parameters),
    }


def _tested(fit: CurveFit, test: Any) -> Tested:
    last = next(int(c.steps[-1]) for c in fit.points.curves if c.name == test.curve)
    hidden = Hidden(name=test.curve, x={"step": float(last)}, predicted=test.predicted, measured=test.measured)
    ratio = test.predicted.value / test.measured
    return Tested.of([hidden], max(ratio, 1 / ratio), test.hit)


def _influence(fit: CurveFit) -> dict[str, LeftOut]:
    """For each coefficient the curve without which it moves most."""
    without = fit.influence()

    def moved(values: Mapping[str, float], name: str) -> float:
        ratio = values[name] / fit.values[name] if fit.values[name] else np.inf
        return max(ratio, 1 / ratio) if ratio > 0 else np.inf

    found = {}
    for name in fit.values if without else ():
        most = max(without, key=lambda w: moved(w.coefficients, name))
        found[name] = LeftOut(rows=(most.curve,), coefficients=most.coefficients, factor=moved(most.coefficients, name))
    return found


def _profile(fit: CurveFit, name: str) -> ProfileCurve:
    found = fit.profile(name)
    points = tuple(
        (float(v), float(o / (fit.objective or 1.0))) for v, o in zip(found.values, found.objective, strict=True)
    )
    return ProfileCurve(name=name, points=points, interval=None)


def _points(fit: CurveFit) -> tuple[FitPoint, ...]:
    curve_R = fit.points.curve
    drawn = [np.flatnonzero(curve_R == c)[_thin(curve.steps.size, DRAWN)] for c, curve in enumerate(fit.points.curves)]
    loss_R, fitted_R = np.exp(fit.points.log_loss), np.exp(fit.points.log_loss - fit.residuals)
    steps_R = np.concatenate([c.steps for c in fit.points.curves])
    return tuple(
        FitPoint(
            name=_name(fit, i), x={"step": float(steps_R[i])}, measured=float(loss_R[i]), fitted=float(fitted_R[i]),
            residual=float(fit.residuals[i]),
        )
        for i in np.concatenate(drawn)
    )  # fmt: skip


def _name(fit: CurveFit, row: int) -> str:
    """Curve and step of a row."""
    c = int(fit.points.curve[row])
    curve = fit.points.curves[c]
    first = int(np.argmax(fit.points.curve == c))
    return f"{text.clean(curve.name, 40)}, step {curve.steps[row - first]}"


def _slices(fit: CurveFit, schedules: Mapping[str, Schedule]) -> tuple[Slice, ...]:
    """Predicted curves first, then the fitted ones."""
    if not fit.coefficients:
        return ()
    asked = [
        _line(fit, f"{name} (predicted)", run, np.nan, _steps(fit, len(run)))
        for name, run in schedules.items()
        if fit.judge(run).status != "refuse"
    ]
    known = [
        _line(fit, c.name, c.schedule, c.size, c.steps[_thin(c.steps.size, LINE_STEPS)], c) for c in fit.points.curves
    ]
    return tuple([*asked, *known][:PANELS])


def _steps(fit: CurveFit, length: int) -> Any:
    """Steps of a predicted curve, from the first step that was ever fitted."""
    first = min(int(c.steps[0]) for c in fit.points.curves)
    return np.unique(np.linspace(min(first, length - 1), length - 1, LINE_STEPS).astype(np.int64))


def _line(fit: CurveFit, title: str, run: Schedule, size: float, steps: Any, curve: Curve | None = None) -> Slice:
    values = zip(*fit.forecast([run], steps, size, False), strict=True)
    line = tuple(
        (float(s), Interval(float(v), float(low), float(high), fit.level))
        for s, (v, low, high) in zip(steps, values, strict=True)
    )
    points = ()
    if curve is not None:
        at = _thin(curve.steps.size, DRAWN)
        points = tuple((float(s), float(v)) for s, v in zip(curve.steps[at], curve.loss[at], strict=True))
    return Slice(variable="step", title=title, line=line, points=points, log=False)


def _thin(size: int, count: int) -> Any:
    return np.unique(np.linspace(0, size - 1, min(size, count)).astype(np.int64))


def _forecast(fit: CurveFit, name: str, run: Schedule) -> Forecast:
    last = len(run) - 1
    verdict = fit.judge(run)
    if verdict.status == "refuse":
        return Forecast(name=name, x={"step": float(last)}, value=None, run=None, verdict=verdict)
    law, one = (fit.predict_curve([last], run, scatter=scatter).final for scatter in (False, True))
    return Forecast(name=name, x={"step": float(last)}, value=law, run=one, verdict=verdict)
