"""From a `FitAnswer` to plotly figures: pure functions, one a section of the page; an empty tuple when nothing is to show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from towtank.estimate import Interval
from towtank.report import drawing, text
from towtank.report.fit_answer import FitAnswer, FitPoint, Forecast, ProfileCurve, Slice, percent
from towtank.report.traces import line

Figures = tuple[go.Figure, ...]
LAW = drawing.arm_colour(3)
PAD = (0.05, 0.05)  # room at the ends of an axis, decades
ALIKE = 2.0  # ratio below which a logarithm is no different from the value
HEIGHT = 420  # of a panel of the law, pixels
MOST_HIDDEN = 12  # hidden rows drawn with their names


def dark_twins() -> dict[str, str]:
    """For every colour of the figures its twin on a dark page."""
    return drawing.dark_twins(0, 0, 4)


def law_along(answer: FitAnswer) -> Figures:
    """The law with its interval along each variable, the other ones held; rows are moved along the law to those values."""
    return tuple(_slice(answer, s) for s in answer.slices)


def residuals(answer: FitAnswer) -> Figures:
    """Residuals against each variable."""
    if not answer.points:
        return ()
    sizes = [percent(p.residual, answer.relative) for p in answer.points]
    what = "measured over law, less 1 (%)" if answer.relative else "measured less law (% of the range)"
    y = _linear(what, [*sizes, 0.0])
    return tuple(_residuals(answer, name, y) for name in answer.points[0].x)


def backtests(answer: FitAnswer) -> Figures:
    """Predicted over measured for the rows that were hidden."""
    test = answer.backtest
    if test is None or not answer.relative:
        return ()
    rows = test.points[:MOST_HIDDEN]
    ratios = [_scaled(p.predicted, p.measured) for p in rows]
    y: dict[str, Any] = {"tickmode": "array", "tickvals": list(range(len(rows)))}
    y |= {"ticktext": [text.plotly_text(p.name, 40) for p in rows], "range": (len(rows) - 0.5, -0.5)}
    most = 4 * max(1.0, *(abs(v.value) for v in ratios))  # an interval may leave the figure
    ends = [min(max(end, -most), most) for v in ratios for end in (v.low, v.high, 0.0)]
    x = _linear("predicted over measured, less 1 (%)", ends)
    fig = drawing.figure("", x, y, height=150 + 34 * max(3, len(rows)))
    fig.add_shape(drawing.rule(drawing.INK, x0=0, x1=0, y0=0, y1=1, yref="paper"))
    hover = [
        f"{text.plotly_text(p.name, 40)}: {text.place(p.x)}<br>measured {text.number(p.measured, 4)}, predicted {text.interval(p.predicted, 4)}"
        for p in rows
    ]
    style: dict[str, Any] = {"mode": "markers", "error_x": drawing.errors(ratios) | {"color": drawing.FORECAST[0]}}
    at = list(range(len(rows)))
    mark = {"symbol": "diamond", "size": 10}
    values = [v.value for v in ratios]
    return (
        fig.add_trace(line(values, at, drawing.FORECAST, "predicted", hover, marker=mark, showlegend=False, **style)),
    )


def profiles(answer: FitAnswer) -> Figures:
    """How much worse the fit becomes when a coefficient is held at another value."""
    return tuple(_profile(p, p.interval or answer.coefficients[p.name]) for p in answer.profiles if len(p.points) > 2)


def _slice(answer: FitAnswer, s: Slice) -> go.Figure:
    told = [f for f in answer.forecasts if f.value and not f.name] if len(answer.columns) == 1 else []
    values = [v.value for _, v in s.line] + [y for _, y in s.points]
    x = (_axis if s.log else _linear)(answer.columns[s.variable], [x for x, _ in (*s.points, *s.line)])
    y = (_axis if answer.relative else _linear)(answer.y, values)
    fig = drawing.figure(text.plotly_text(s.title, 60), x, y, height=HEIGHT if len(answer.slices) < 5 else HEIGHT - 120)
    fig.add_traces(drawing.band(s.line, LAW, "law"))
    hover = [f"law at {s.variable} = {text.number(x)}<br>{text.interval(v, 4)}" for x, v in s.line]
    at, law = [x for x, _ in s.line], [v.value for _, v in s.line]
    fig.add_trace(line(at, law, LAW, "law", hover, mode="lines", line={"width": 2.4}, showlegend=False))
    fig.add_trace(_rows(answer, [x for x, _ in s.points], [y for _, y in s.points]))
    return fig.add_traces([_forecast(f, s.variable) for f in told])


def _axis(name: str, values: Sequence[float]) -> dict[str, Any]:
    """A log axis, or a linear one where a value has no logarithm or all are much alike."""
    if min(values) > 0 and max(values) > ALIKE * min(values):
        return drawing.decade_axis(text.plotly_text(name), values, pad=PAD)
    return _linear(name, values)


def _linear(name: str, values: Sequence[float]) -> dict[str, Any]:
    return {"title": {"text": text.plotly_text(name)}, "range": drawing.room([Interval(v, v, v) for v in values])}


def _residuals(answer: FitAnswer, name: str, y: dict[str, Any]) -> go.Figure:
    fig = drawing.figure("", _axis(answer.columns[name], [p.x[name] for p in answer.points]), y, height=340)
    fig.add_shape(drawing.rule(drawing.INK, x0=0, x1=1, xref="paper", y0=0, y1=0))
    values = [percent(p.residual, answer.relative) for p in answer.points]
    return fig.add_trace(_rows(answer, [p.x[name] for p in answer.points], values))


def _rows(answer: FitAnswer, x: Sequence[float], y: Sequence[float]) -> go.Scatter:
    """The rows of the table; those that move the coefficients most stand out."""
    deciding = {f"row {row}" for left in answer.influence.values() for row in left.rows}
    marks = [p.name in deciding for p in answer.points]
    style = {
        "symbol": ["diamond" if m else "circle" for m in marks],
        "size": [10 if m else 6 for m in marks],
        "color": [drawing.ALERT[0] if m else drawing.INK[0] for m in marks],
        "opacity": 0.75 if len(marks) < 300 else 0.4,
    }
    hover = [_told(answer, p) for p in answer.points]
    return line(x, y, drawing.INK, "rows", hover, mode="markers", marker=style, showlegend=False)


def _told(answer: FitAnswer, p: FitPoint) -> str:
    away = f"{percent(p.residual, answer.relative):+.2g} %"
    return f"{text.plotly_text(p.name, 40)}: {text.place(p.x)}<br>measured {text.number(p.measured, 4)}, law {text.number(p.fitted, 4)} ({away})"


def _forecast(f: Forecast, variable: str) -> go.Scatter:
    assert f.value is not None
    hover = [f"predicted at {text.place(f.x)}<br>{text.interval(f.value, 4)}"]
    style: dict[str, Any] = {"error_y": drawing.errors([f.value]) | {"color": drawing.FORECAST[0]}}
    mark = {"symbol": "diamond-open", "size": 13, "line": {"width": 2, "color": drawing.FORECAST[0]}}
    return line(
        [f.x[variable]], [f.value.value], drawing.FORECAST, "predicted", hover, mode="markers", marker=mark, **style
    )


def _profile(p: ProfileCurve, interval: Interval) -> go.Figure:
    values, worse = zip(*[(v, 100 * (o - 1)) for v, o in p.points], strict=True)
    x: dict[str, Any] = {"title": {"text": text.plotly_text(p.name)}}
    most = 100 * max(_at(p, interval.low), _at(p, interval.high), 1e-6) - 100
    y: dict[str, Any] = {"title": {"text": "objective over its least (%)"}, "range": (-0.12 * most, 3 * most)}
    inside = [v for v, o in zip(values, worse, strict=True) if o <= 3 * most]
    fig = drawing.figure("", x | {"range": (min(inside), max(inside))}, y, height=300)
    band = {"type": "rect", "layer": "below", "line": {"width": 0}, "fillcolor": drawing.faded(LAW, 0.16)}
    fig.add_shape(band | {"x0": interval.low, "x1": interval.high, "yref": "paper", "y0": 0, "y1": 1})
    fig.add_shape(drawing.rule(drawing.INK, x0=interval.value, x1=interval.value, yref="paper", y0=0, y1=1))
    hover = [
        f"{text.plotly_text(p.name)} = {text.number(v, 4)}<br>{o:.3g} % worse"
        for v, o in zip(values, worse, strict=True)
    ]
    return fig.add_trace(line(values, worse, LAW, "profile", hover, showlegend=False, marker={"size": 4}))


def _at(p: ProfileCurve, value: float) -> float:
    """The profile at a value, between its points."""
    values, objective = np.array(p.points).T
    return float(np.interp(value, values, objective))


def _scaled(v: Interval, by: float) -> Interval:
    """Percent over a measured value."""
    return Interval(100 * (v.value / by - 1), 100 * (v.low / by - 1), 100 * (v.high / by - 1), v.level)
