"""From an `Answer` to plotly figures: pure functions, one a section of the page; an empty tuple when nothing is to show."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import plotly.graph_objects as go

from towtank.estimate import Interval, finite
from towtank.report import drawing, text, traces
from towtank.report.answer import Answer, Arm, Backtest

Figures = tuple[go.Figure, ...]


def dark_twins(answer: Answer) -> dict[str, str]:
    """For every colour of the figures its twin on a dark page."""
    return drawing.dark_twins(len(traces.all_sizes(answer)), len(traces.attention_laws(answer)), len(answer.arms))


def loss_against_rate(answer: Answer) -> Figures:
    """Loss against learning rate: a panel per arm, a curve per size, one vertical range for all.

    Args:
        answer: what was found out.

    Example:
        >>> from towtank.estimate import Verdict
        >>> empty = Answer(study="s", question="q", sentence="", verdict=Verdict("refuse"), size_axis="width",
        ...                target=None, arms=(), runs=(), counts={})
        >>> loss_against_rate(empty)
        ()
    """
    limits = traces.loss_limits(answer)
    if limits is None:
        return ()
    x = drawing.rate_axis(p.lr for arm in answer.arms for _, points in traces.curves(arm) for p in points)
    y = {"title": {"text": "held-out loss (nats)"}, "range": limits}
    arms = [arm for arm in answer.arms if any(points for _, points in traces.curves(arm))]
    return traces.share_legend([_loss_panel(answer, arm, x, y) for arm in arms])


def optimum_against_size(answer: Answer) -> Figures:
    """The best learning rate against size, log-log: law, interval, prediction and what the verification measured."""
    arms = [arm for arm in answer.arms if traces.optima(arm)]
    if not arms:
        return ()
    shown = [point for arm in arms for point in traces.optima(arm)]
    shown += [point for arm in arms if arm.lr_law for point in arm.lr_law.line]
    shown += [(arm.prediction.size, arm.prediction.lr) for arm in arms if arm.prediction and arm.prediction.lr]
    shown += [(v.size, v.measured) for arm in arms if (v := arm.verification) and v.measured]
    ends = drawing.reach([v for _, v in shown], factor=16)
    y = drawing.rate_axis(ends, title="best learning rate", pad=0.12)
    y["ticktext"] = [label.replace("<br>", " = ") for label in y["ticktext"]]
    fig = drawing.figure("", _size_axis(answer, (s for s, _ in shown)), y, height=430)
    for arm in arms:
        fig.add_traces(traces.law_traces(answer, arm, arm.lr_law, traces.optima(arm)))
        fig.add_traces(traces.forecast(answer, arm))
    return (fig,)


def sensitivity_by_size(answer: Answer) -> Figures:
    """Learning-rate sensitivity against size, a line per arm."""
    rows = [(arm, [(s.size, s.sensitivity) for s in arm.sizes if s.sensitivity is not None]) for arm in answer.arms]
    rows = [(arm, found) for arm, found in rows if any(finite(v) for _, v in found)]
    if not rows:
        return ()
    x = _size_axis(answer, (s for _, found in rows for s, _ in found))
    fig = drawing.figure("", x, {"title": {"text": "learning-rate sensitivity (nats)"}, "rangemode": "tozero"})
    for arm, found in rows:
        rank, name = answer.arms.index(arm), text.plotly_text(arm.name)
        hover = [f"{name}, {traces.size_name(answer, s)}<br>{text.number(v)} nats" for s, v in found]
        style = {"marker": {"symbol": drawing.SYMBOLS[rank % len(drawing.SYMBOLS)]}}
        sizes, values = zip(*found, strict=True)
        fig.add_trace(traces.line(sizes, values, drawing.arm_colour(rank), name, hover, **style))
    return (fig,)


def attention_logits(answer: Answer) -> Figures:
    """The largest attention logit against learning rate (per size) and against size (per learning rate), per arm."""
    every = [p for arm in answer.arms for _, rates in traces.curves(arm) for p in rates]
    points = [p for p in every if traces.positive(p.attention_logit_max)]
    if not points:
        return ()
    logits = [p.attention_logit_max or 1.0 for p in points]
    laws = [law for arm in answer.arms for law in arm.attention_laws]
    most = 100 * max(logits)  # an extrapolation may leave the chart
    logits += [min(v.value, most) for law in laws for _, v in law.line]
    y = drawing.decade_axis("largest attention logit", [*logits, traces.ATTENTION_LIMIT])
    by_rate = drawing.rate_axis(p.lr for p in points)
    by_size = _size_axis(answer, traces.all_sizes(answer))
    rows = [
        (
            _panel(arm, by_rate, y, traces.logits_by_rate(answer, arm)),
            _panel(arm, by_size, y, traces.logits_by_size(answer, arm)),
        )
        for arm in answer.arms
    ]
    for column in zip(*rows, strict=True):
        traces.share_legend([fig for fig in column if fig is not None])
    return tuple(_with_limit(fig) for row in rows for fig in row if fig is not None)


def best_loss_against_size(answer: Answer) -> Figures:
    """The loss at the best learning rate against size, with its law."""
    rows = [(arm, [(s.size, s.best_loss) for s in arm.sizes if s.best_loss]) for arm in answer.arms]
    rows = [(arm, found) for arm, found in rows if found]
    if not rows:
        return ()
    shown = [point for _, found in rows for point in found]
    sizes = [s for s, _ in shown] + [s for arm, _ in rows if arm.loss_law for s, _ in arm.loss_law.line]
    shown += [point for arm, _ in rows if arm.loss_law for point in arm.loss_law.line]
    y = {"title": {"text": "best held-out loss (nats)"}, "range": drawing.room([v for _, v in shown])}
    fig = drawing.figure("", _size_axis(answer, sizes), y)
    for arm, found in rows:
        fig.add_traces(traces.law_traces(answer, arm, arm.loss_law, found))
    return (fig,)


def backtests(answer: Answer) -> Figures:
    """Predicted over measured for every value that was hidden and predicted, and for every verification."""
    rows = [row for row in backtest_rows(answer) if row[2].measured.low > 0 and row[2].predicted.low > 0]
    if not rows:
        return ()
    measured = [_scaled(b.measured, b.measured.value) for _, _, b in rows]
    predicted = [_scaled(b.predicted, b.measured.value) for _, _, b in rows]
    ends = drawing.reach([*measured, *predicted], factor=4)
    x = drawing.decade_axis("predicted / measured", [*ends, 1.0])
    labels = [f"{text.plotly_text(what, 40)}<br>{text.plotly_text(arm, 24)}" for arm, what, _ in rows]
    y: dict[str, Any] = {"tickmode": "array", "tickvals": list(range(len(rows))), "ticktext": labels}
    fig = drawing.figure("", x, y | {"range": (len(rows) - 0.5, -0.5)}, height=150 + 46 * len(rows))
    fig.add_shape(drawing.rule(drawing.INK, x0=1, x1=1, y0=0, y1=1, yref="paper"))
    for values, word, shift, colour, symbol in (
        (predicted, "predicted", -0.14, drawing.FORECAST, "diamond"),
        (measured, "measured", 0.14, drawing.INK, "star"),
    ):
        hover = [f"{n}<br>{word} {text.interval(getattr(b, word))}" for n, (_, _, b) in zip(labels, rows, strict=True)]
        style: dict[str, Any] = {"mode": "markers", "error_x": drawing.errors(values) | {"color": colour[0]}}
        at = [i + shift for i in range(len(rows))]
        mark = {"symbol": symbol, "size": 10}
        fig.add_trace(traces.line([v.value for v in values], at, colour, word, hover, marker=mark, **style))
    return (fig,)


def backtest_rows(answer: Answer) -> Iterator[tuple[str, str, Backtest]]:
    """(arm, what was predicted, backtest): hidden sizes first, then the verifications."""
    axis = answer.size_axis
    for arm in answer.arms:
        for law in (arm.lr_law, arm.loss_law, *arm.attention_laws):
            if law and law.backtest:
                yield arm.name, f"{law.name}, {axis} {text.size(law.backtest.size)}", law.backtest
    for arm in answer.arms:
        v = arm.verification
        if v and v.measured and v.factor:
            test = Backtest(
                size=v.size, predicted=v.predicted, measured=v.measured, factor=v.factor, hit=v.held is True
            )
            yield arm.name, f"verification, {axis} {text.size(v.size)}", test


def _size_axis(answer: Answer, sizes: Iterable[float]) -> dict[str, Any]:
    ticks = set(traces.all_sizes(answer)) | ({answer.target} if answer.target else set())
    return drawing.size_axis(answer.size_axis, sizes, sorted(ticks))


def _loss_panel(answer: Answer, arm: Arm, x: dict[str, Any], y: dict[str, Any]) -> go.Figure:
    fig = drawing.figure(text.plotly_text(arm.name, 40), x, y, height=420)
    top = y["range"][1]
    for size, rates in traces.curves(arm):
        fig.add_traces(traces.loss_curve(answer, arm, size, rates, top))
    for size in arm.sizes:
        fig.add_traces(traces.fit_curve(answer, size))
    return fig.add_traces(traces.diverged_marks(answer, arm, top))


def _panel(arm: Arm, x: dict[str, Any], y: dict[str, Any], drawn: list[go.Scatter]) -> go.Figure | None:
    return drawing.figure(text.plotly_text(arm.name, 40), x, y).add_traces(drawn) if drawn else None


def _with_limit(fig: go.Figure) -> go.Figure:
    """The rule of thumb at 1e4, drawn and named."""
    fig.add_shape(
        drawing.rule(drawing.ALERT, x0=0, x1=1, xref="paper", y0=traces.ATTENTION_LIMIT, y1=traces.ATTENTION_LIMIT)
    )
    note = {
        "text": "10,000: trouble was seen above",
        "showarrow": False,
        "font": {"size": 11, "color": drawing.ALERT[0]},
    }
    return fig.add_annotation(x=0, xref="paper", xanchor="left", y=4, yanchor="bottom", **note)


def _scaled(v: Interval, by: float) -> Interval:
    return Interval(v.value / by, v.low / by, v.high / by, v.level)
