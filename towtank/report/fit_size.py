"""From a fitted law of one size (points in log-log) to its answer."""

from __future__ import annotations

import numpy as np

from towtank.estimate import Interval
from towtank.laws.size_fit import SizeFit
from towtank.report import text
from towtank.report.fit_answer import (
    Asked,
    FitAnswer,
    FitPoint,
    Forecast,
    Hidden,
    LeftOut,
    Slice,
    Tested,
    described,
    overall,
    percent,
    residuals,
    sentence,
    warned,
)

LINE_POINTS = 61


def answer_size(fit: SizeFit, asked: Asked) -> FitAnswer:
    """Everything that can be told of a law of one size.

    Args:
        fit: the fit.
        asked: what was asked of it.

    Raises:
        ValueError: if a size to predict is not positive, or `hold_out` is not "largest".
    """
    (name,) = asked.columns
    forecasts = tuple(_forecast(fit, name, at[name]) for at in asked.predict)
    backtest = _backtest(fit, name, asked) if fit.coefficients else None
    points = _points(fit, name)
    return FitAnswer(
        **described(asked), rows=len(fit.measured), groups=None, relative=True, unit="size", verdict=fit.verdict, overall=overall(fit.verdict, forecasts),
        sentence=sentence(asked, _fitted_in_words(fit, points), forecasts, backtest, "size"),
        coefficients=_coefficients(fit, asked), residuals=residuals(np.array([p.residual for p in points]), True, lambda i: points[i].name), backtest=backtest, forecasts=forecasts,
        influence=_influence(fit, name), confounded=fit.identifiability().pairs,
        points=points, slices=_slices(fit, name, points, [f.x[name] for f in forecasts]), warnings=warned(asked, ()),
    )  # fmt: skip


def _coefficients(fit: SizeFit, asked: Asked) -> dict[str, Interval]:
    """Those of the law; where it tells at which size training fails, that size."""
    fails = getattr(asked.law, "fails", None)
    at = fails(fit) if fails and fit.coefficients else None
    return {**fit.coefficients, **({"fails at": at} if at else {})}


def _fitted_in_words(fit: SizeFit, points: tuple[FitPoint, ...]) -> str:
    if not points:
        return f"The law {fit.law!r} cannot be fitted to these rows."
    off = percent(float(np.median([abs(p.residual) for p in points])), True)
    return f"The law fits {len(points)} sizes, half of them within {off:.2g} %."


def _forecast(fit: SizeFit, name: str, size: float) -> Forecast:
    verdict = fit.judge(size)
    value = None if verdict.status == "refuse" else fit.predict(size)
    return Forecast(x={name: size}, value=value, run=value, verdict=verdict)


def _backtest(fit: SizeFit, name: str, asked: Asked) -> Tested | None:
    test = fit.backtest(asked.hold_out)
    if test is None:
        return None
    held = [
        Hidden(
            name=f"{name} {text.size(p.x['size'])}", x={name: p.x["size"]}, predicted=p.predicted, measured=p.measured
        )
        for p in test.points
    ]
    return Tested.of(held, test.factor, test.hit)


def _influence(fit: SizeFit, name: str) -> dict[str, LeftOut]:
    return {
        coefficient: LeftOut(
            rows=tuple(f"{name} {text.size(fit.used[i].size)}" for i in m.rows),
            coefficients=m.coefficients,
            factor=m.factor,
        )
        for coefficient, m in fit.influence().items()
    }


def _points(fit: SizeFit, name: str) -> tuple[FitPoint, ...]:
    if not fit.coefficients:
        return ()
    log = np.log(2.0)
    return tuple(
        FitPoint(
            name=f"{name} {text.size(p.size)}",
            x={name: p.size},
            measured=p.value,
            fitted=p.value * 2.0**-r,
            residual=float(r * log),
        )
        for p, r in zip(fit.used, fit.residuals, strict=True)
    )


def _slices(fit: SizeFit, name: str, points: tuple[FitPoint, ...], asked: list[float]) -> tuple[Slice, ...]:
    if not points:
        return ()
    sizes = [p.x[name] for p in points] + [s for s in asked if not fit.refuses(s)]
    line = fit.predict_many([float(s) for s in np.geomspace(min(sizes), max(sizes), LINE_POINTS)])
    return (Slice(variable=name, title="", line=line, points=tuple((p.x[name], p.measured) for p in points)),)
