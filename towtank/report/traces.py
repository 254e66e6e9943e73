"""The parts the figures are made of: walks over an `Answer`, and curves, bands and marks for plotly."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from towtank.estimate import Interval, finite
from towtank.report import drawing, text
from towtank.report.answer import Answer, Arm, LawResult, RatePoint, SizeResult
from towtank.report.drawing import ALERT, INK, Colour

ATTENTION_LIMIT = 1e4  # the logit above which training was seen to fail


def all_sizes(answer: Answer) -> list[float]:
    """Every size of the answer, ascending, verified ones included; the rank of a size decides its colour."""
    return sorted({size for arm in answer.arms for size, _ in curves(arm)})


def attention_laws(answer: Answer) -> list[str]:
    """Names of the attention-logit laws, in order of appearance; the rank decides the colour."""
    return list(dict.fromkeys(law.name for arm in answer.arms for law in arm.attention_laws))


def curves(arm: Arm) -> list[tuple[float, tuple[RatePoint, ...]]]:
    """(size, points) of an arm; a verification at a size of its own counts as one."""
    own = [(s.size, s.rates) for s in arm.sizes]
    verified = arm.verification
    if verified and verified.size not in {s for s, _ in own}:
        own.append((verified.size, verified.rates))
    return own


def optima(arm: Arm) -> list[tuple[float, Interval]]:
    """(size, best learning rate) where it can be told."""
    return [(s.size, s.optimum) for s in arm.sizes if s.optimum and s.optimum.low > 0]


def positive(x: float | None) -> bool:
    """Whether `x` can be put on a log axis."""
    return x is not None and finite(x) and x > 0


def loss_limits(answer: Answer) -> tuple[float, float] | None:
    """One vertical range for all panels; a few very bad runs do not flatten the rest. None without any loss."""
    found = [p.loss for arm in answer.arms for _, points in curves(arm) for p in points]
    losses = sorted(x for x in found if x is not None and finite(x))
    if not losses:
        return None
    typical = statistics.median(losses) - losses[0]
    low, high = losses[0], min(losses[-1], losses[0] + 5 * typical) if typical > 0 else losses[-1]
    pad = 0.07 * (high - low) or 0.05
    return low - pad, high + 2 * pad


def size_style(answer: Answer, size: float) -> tuple[Colour, str]:
    """Colour and symbol of a size, the same in every figure."""
    sizes = all_sizes(answer)
    rank = sizes.index(size)
    return drawing.size_colour(rank, len(sizes)), drawing.SYMBOLS[rank % len(drawing.SYMBOLS)]


def size_name(answer: Answer, size: float) -> str:
    """`width 128`, safe for plotly."""
    return f"{text.plotly_text(answer.size_axis, 24)} {text.size(size)}"


def line(
    x: Sequence[float], y: Sequence[float], colour: Colour, name: str, hover: Sequence[str], **more: Any
) -> go.Scatter:
    """Markers joined by a line. `more`: further arguments of `go.Scatter`."""
    style = {"mode": "lines+markers", "hoverinfo": "text", "hovertext": list(hover), "legendgroup": name} | more
    marker = {"size": 8, "color": colour[0]} | style.pop("marker", {})
    stroke = {"color": colour[0], "width": 1.8} | style.pop("line", {})
    return go.Scatter(x=list(x), y=list(y), name=name, marker=marker, line=stroke, **style)


def point_hover(p: RatePoint) -> str:
    """What a point of a curve says."""
    label, plain = text.rate_label(p.lr), text.number(p.lr)
    parts = [f"learning rate {label}" + (f" = {plain}" if plain != label else "")]
    if p.loss is not None:
        error = f" ± {text.number(p.stderr, 2)}" if p.stderr is not None else ""
        parts.append(f"loss {text.number(p.loss, 4)}{error} nats")
    parts.append(f"{p.runs} run{'s' * (p.runs != 1)}" + (f", {p.diverged} diverged" if p.diverged else ""))
    if p.attention_logit_max is not None:
        parts.append(f"largest attention logit {text.number(p.attention_logit_max)}")
    return "<br>".join(parts)


def loss_curve(answer: Answer, arm: Arm, size: float, rates: Sequence[RatePoint], top: float) -> list[go.Scatter]:
    """Measured losses of one size with standard errors; what lies above the chart is put at its upper edge."""
    points = [p for p in rates if p.loss is not None and finite(p.loss)]
    if not points:
        return []
    colour, symbol = size_style(answer, size)
    fitted = size in {s.size for s in arm.sizes}
    name = size_name(answer, size) + ("" if fitted else " (verification)")
    bars = {"type": "data", "array": [p.stderr or 0.0 for p in points], "thickness": 1.2, "width": 3}
    return [
        line(
            [p.lr for p in points],
            [min(p.loss or 0.0, top) for p in points],
            colour,
            name,
            [f"{name}<br>{point_hover(p)}" for p in points],
            error_y=bars | {"color": colour[0]},
            line={"width": 1, "dash": "dot"},
            marker={"symbol": symbol if fitted else f"{symbol}-open", "line": {"width": 1.6, "color": colour[0]}},
        )
    ]


def fit_curve(answer: Answer, size: SizeResult) -> list[go.Scatter]:
    """The fitted parabola and the optimum with its interval."""
    colour, symbol = size_style(answer, size.size)
    shared = {"legendgroup": size_name(answer, size.size), "showlegend": False}
    drawn = []
    if size.fitted:
        x, y = zip(*size.fitted, strict=True)
        stroke = {"color": colour[0], "width": 2.6}
        drawn.append(go.Scatter(x=x, y=y, mode="lines", line=stroke, hoverinfo="skip", **shared))
    if size.optimum and size.best_loss and size.optimum.low > 0:
        told = f"optimum {text.interval(size.optimum)}<br>loss {text.interval(size.best_loss, 4)} nats"
        drawn.append(
            go.Scatter(
                x=[size.optimum.value],
                y=[size.best_loss.value],
                error_x=drawing.errors([size.optimum]) | {"color": INK[0], "thickness": 1.8, "width": 5},
                mode="markers",
                marker={"symbol": "star", "size": 14, "color": colour[0], "line": {"width": 1.2, "color": INK[0]}},
                hovertext=[f"{size_name(answer, size.size)}: {told}"],
                hoverinfo="text",
                **shared,
            )
        )
    return drawn


def diverged_marks(answer: Answer, arm: Arm, top: float) -> list[go.Scatter]:
    """A cross at the upper edge for every size and learning rate with diverged runs."""
    bad = [(size, p) for size, points in curves(arm) for p in points if p.diverged]
    if not bad:
        return []
    hover = [f"{size_name(answer, size)}<br>{point_hover(p)}" for size, p in bad]
    marker = {"symbol": "x", "size": 9, "color": ALERT[0]}
    x, y = [p.lr for _, p in bad], [top] * len(bad)
    return [line(x, y, ALERT, "diverged", hover, mode="markers", marker=marker, cliponaxis=False)]


def law_traces(
    answer: Answer, arm: Arm, law: LawResult | None, points: Sequence[tuple[float, Interval]]
) -> list[go.Scatter]:
    """Measured points with intervals, and the line of the law with its band, in the colour of the arm."""
    rank = answer.arms.index(arm)
    colour, name = drawing.arm_colour(rank), text.plotly_text(arm.name)
    drawn: list[go.Scatter] = []
    if law and law.line:
        dash = drawing.DASHES[rank % len(drawing.DASHES)]
        hover = [f"{name}, law at {size_name(answer, s)}<br>{text.interval(v)}" for s, v in law.line]
        drawn += drawing.band(law.line, colour, name)
        x, y = [s for s, _ in law.line], [v.value for _, v in law.line]
        drawn.append(line(x, y, colour, name, hover, mode="lines", line={"dash": dash}, showlegend=False))
    hover = [f"{name}, {size_name(answer, s)}<br>measured {text.interval(v)}" for s, v in points]
    drawn.append(
        line(
            [s for s, _ in points],
            [v.value for _, v in points],
            colour,
            name,
            hover,
            mode="markers",
            error_y=drawing.errors(v for _, v in points) | {"color": colour[0]},
            marker={"symbol": drawing.SYMBOLS[rank % len(drawing.SYMBOLS)], "size": 9},
        )
    )
    return drawn


def forecast(answer: Answer, arm: Arm) -> list[go.Scatter]:
    """The predicted learning rate (open) and, where it was verified, the measured one (star)."""
    rank = answer.arms.index(arm)
    colour, name = drawing.arm_colour(rank), text.plotly_text(arm.name)
    prediction, verified = arm.prediction, arm.verification
    marks: list[tuple[float, Interval, str, dict[str, Any]]] = []
    if prediction and prediction.lr and prediction.lr.low > 0:
        symbol = drawing.SYMBOLS[rank % len(drawing.SYMBOLS)] + "-open"
        marks.append((prediction.size, prediction.lr, "predicted", {"symbol": symbol, "size": 13}))
    if verified and verified.measured and verified.measured.low > 0:
        marks.append((verified.size, verified.measured, "verified", {"symbol": "star", "size": 14}))
    return [
        line(
            [size * 1.03 if word == "verified" else size],  # aside, so that neither hides the other
            [value.value],
            colour,
            f"{name}, {word}",
            [f"{name}, {size_name(answer, size)}<br>{word}: {text.interval(value)}"],
            mode="markers",
            error_y=drawing.errors([value]) | {"color": colour[0]},
            marker=marker | {"line": {"width": 2 if word == "predicted" else 1, "color": colour[0]}},
        )
        for size, value, word, marker in marks
    ]


def logits_by_rate(answer: Answer, arm: Arm) -> list[go.Scatter]:
    """Largest attention logit against learning rate, a curve per size."""
    drawn = []
    for size, rates in curves(arm):
        points = [p for p in rates if positive(p.attention_logit_max)]
        colour, symbol = size_style(answer, size)
        name = size_name(answer, size)
        x, y = [p.lr for p in points], [p.attention_logit_max or 1.0 for p in points]
        hover = [f"{name}<br>{point_hover(p)}" for p in points]
        if points:
            drawn.append(line(x, y, colour, name, hover, marker={"symbol": symbol}))
    return drawn


def logits_by_size(answer: Answer, arm: Arm) -> list[go.Scatter]:
    """Largest attention logit against size, a law per learning rate."""
    names = attention_laws(answer)
    drawn: list[go.Scatter] = []
    for law in arm.attention_laws:
        rank = names.index(law.name)
        colour = drawing.rate_colour(rank, len(names))
        label = text.plotly_text(law.name.removeprefix("attention logit at "))
        points = [(s, v) for s, v in law.points if v.value > 0]
        hover = [f"{label}, {size_name(answer, s)}<br>measured {text.interval(v)}" for s, v in points]
        symbol = drawing.SYMBOLS[rank % len(drawing.SYMBOLS)]
        x, y = [s for s, _ in points], [v.value for _, v in points]
        drawn.append(line(x, y, colour, label, hover, mode="markers", marker={"symbol": symbol}))
        x, y = [s for s, _ in law.line], [v.value for _, v in law.line]
        hover = [f"{label}, law at {size_name(answer, s)}<br>{text.interval(v)}" for s, v in law.line]
        drawn.append(line(x, y, colour, label, hover, mode="lines", showlegend=False))
    return drawn


def drawn(fig: go.Figure) -> list[Any]:
    """The traces of a figure."""
    return list(fig.select_traces())


def share_legend(panels: Sequence[go.Figure]) -> tuple[go.Figure, ...]:
    """Every panel gets the legend entries of all, in one order, so that legends and plots take the same room."""
    entries: dict[str, Any] = {t.name: t for fig in panels for t in drawn(fig) if t.name and t.showlegend is not False}
    ranks = {name: rank for rank, name in enumerate(entries)}
    for fig in panels:
        own = {t.name for t in drawn(fig)}
        missing = [entry for name, entry in entries.items() if name not in own]
        fig.add_traces([go.Scatter(entry).update(x=[None], y=[None], hovertext=None) for entry in missing])
        fig.for_each_trace(lambda t: t.update(legendrank=1000 + ranks.get(t.name, 0)))
    return tuple(panels)
