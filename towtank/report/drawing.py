"""The look of the figures: colours, symbols, axes. Nothing here knows what an answer is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import plotly.graph_objects as go

from towtank.estimate import Interval
from towtank.report import text

# A figure is drawn in the light palette; the page swaps every colour for its dark twin where the reader's system is dark.
_SIZE_STOPS = (("#58b2a0", "#5f7fd0"), ("#2b8a96", "#4aa3d6"), ("#23628a", "#55c9bd"), ("#2a1e5c", "#e3ef9f"))
_RATE_STOPS = (("#e0a458", "#8d5a9c"), ("#d1603d", "#d8608a"), ("#8f2d56", "#f29e6e"), ("#43113f", "#fbe3a1"))
_ARMS = (
    ("#c8500a", "#ff9a56"),
    ("#5546c8", "#a99cff"),
    ("#c2477f", "#ff9fd2"),
    ("#1d8a99", "#6fd3e0"),
    ("#5a5f66", "#c3c9d1"),
    ("#2f7d3b", "#7fd48b"),
)
INK, MUTED, ALERT = ("#1b2430", "#e8edf4"), ("#8a94a3", "#7f8b9c"), ("#b3261e", "#ff8a80")
FORECAST = ("#5546c8", "#a99cff")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "hexagon", "star-triangle-up", "bowtie")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MAX_TICKS = 6

Colour = tuple[str, str]


def _mix(a: str, b: str, t: float) -> str:
    parts = [(int(a[i : i + 2], 16), int(b[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(x + (y - x) * t):02x}" for x, y in parts)


def _scale(stops: Sequence[Colour], index: int, count: int) -> Colour:
    """Colour `index` of `count` along a sequential scale, light and dark."""
    place = (len(stops) - 1) * (index / (count - 1) if count > 1 else 0.5)
    left = min(int(place), len(stops) - 2)
    (a, b), (c, d) = stops[left], stops[left + 1]
    return _mix(a, c, place - left), _mix(b, d, place - left)


def size_colour(index: int, count: int) -> Colour:
    """Colour of a size by its rank: the larger, the stronger."""
    return _scale(_SIZE_STOPS, index, count)


def rate_colour(index: int, count: int) -> Colour:
    """Colour of a learning rate by its rank."""
    return _scale(_RATE_STOPS, index, count)


def arm_colour(index: int) -> Colour:
    """Colour of an arm, told apart with all common colour-vision deficiencies for the first three."""
    return _ARMS[index % len(_ARMS)]


def faded(colour: Colour, alpha: float) -> str:
    """The light colour, transparent; `dark_twins` knows its twin."""
    r, g, b = (int(colour[0][i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{alpha})"


def dark_twins(sizes: int, rates: int, arms: int) -> dict[str, str]:
    """Light colour to dark colour, six hexadecimal digits each, for every colour a report of this shape may use.

    Example:
        >>> dark_twins(1, 1, 1)[INK[0]] == INK[1]
        True
    """
    colours = [INK, MUTED, ALERT, FORECAST, *(arm_colour(i) for i in range(arms))]
    colours += [size_colour(i, sizes) for i in range(sizes)] + [rate_colour(i, rates) for i in range(rates)]
    return dict(colours)


def errors(values: Iterable[Interval]) -> dict[str, Any]:
    """Asymmetric error bars that span the intervals."""
    listed = list(values)
    return {
        "type": "data",
        "symmetric": False,
        "array": [v.high - v.value for v in listed],
        "arrayminus": [v.value - v.low for v in listed],
        "thickness": 1.4,
        "width": 4,
    }


def reach(values: Sequence[Interval], *, factor: float) -> list[float]:
    """Ends of the intervals for a log axis; intervals may leave it by no more than `factor` beyond the values.

    Args:
        values: what is shown; at least one of it positive.
        factor: largest room beyond the values.

    Example:
        >>> reach([Interval(1.0, 1e-9, 1.5)], factor=4)
        [0.25, 1.5]
    """
    centres = [v.value for v in values if 0 < v.value < math.inf] or [1.0]
    low, high = min(centres) / factor, max(centres) * factor
    return [min(max(end, low), high) for v in values for end in (v.low, v.high)]


def room(values: Sequence[Interval]) -> tuple[float, float]:
    """Range of a linear axis: all values, and of their intervals as much as leaves the values half of the room."""
    centres = [v.value for v in values if math.isfinite(v.value)] or [0.0]
    spread = max(centres) - min(centres) or 0.1 * abs(centres[0]) or 1.0
    low, high = min(centres) - spread / 2, max(centres) + spread / 2
    ends = [min(max(end, low), high) for v in values for end in (v.low, v.high) if not math.isnan(end)]
    return min(ends) - 0.05 * spread, max(ends) + 0.05 * spread


def size_axis(name: str, sizes: Iterable[float], ticks: Sequence[float]) -> dict[str, Any]:
    """A log axis with a tick at every size, or at every second one where there are many.

    Args:
        name: what sizes are called.
        sizes: everything the axis must show.
        ticks: sizes to label, ascending.
    """
    listed = sorted(set(sizes))
    inside = [t for t in ticks if listed[0] <= t <= listed[-1]] or [listed[0], listed[-1]]
    shown = inside[::-1][:: math.ceil(len(inside) / MAX_TICKS)][::-1]
    ends = (math.log10(listed[0]) - 0.12, math.log10(listed[-1]) + 0.12)
    labels = {"tickmode": "array", "tickvals": shown, "ticktext": [text.size(s) for s in shown]}
    return {"type": "log", "title": {"text": text.plotly_text(name)}, "range": ends, **labels}


def rate_axis(rates: Iterable[float], *, title: str = "learning rate", pad: float = 0.15) -> dict[str, Any]:
    """A log axis with ticks at powers of two, or at the rates themselves when they are no powers of two.

    Args:
        rates: everything the axis must show.
        title: axis title.
        pad: margin at both ends, decades.
    """
    listed = sorted({r for r in rates if r > 0 and math.isfinite(r)}) or [1.0]
    first, last = math.floor(math.log2(listed[0])), math.ceil(math.log2(listed[-1]))
    step = max(1, math.ceil((last - first + 1) / MAX_TICKS))
    shown = [2.0**k for k in range(last, first - 1, -step)][::-1]
    labels = [f"{text.rate_label(v)}<br>{v:.2g}" for v in shown]
    ends = (math.log10(listed[0]) - pad, math.log10(listed[-1]) + pad)
    ticks = {"tickmode": "array", "tickvals": shown, "ticktext": labels}
    return {"type": "log", "title": {"text": title}, "range": ends, **ticks}


def decade_axis(title: str, values: Iterable[float], *, pad: tuple[float, float] = (0.15, 0.25)) -> dict[str, Any]:
    """A log axis labelled at the decades, or finer where they are few. `pad`: room at both ends, decades."""
    listed = [math.log10(v) for v in values if v > 0 and math.isfinite(v)] or [0.0]
    low, high = min(listed) - pad[0], max(listed) + pad[1]
    powers = range(math.floor(low), math.ceil(high) + 1)
    steps = (1,) if high - low > 1.2 else (1, 2, 5) if high - low > 0.7 else (1, 1.2, 1.5, 2, 3, 5, 7)
    marks = [m * 10.0**p for p in powers for m in steps]
    ticks = {"tickmode": "array", "tickvals": marks, "ticktext": [text.decimal(m) for m in marks]}
    return {"type": "log", "title": {"text": title}, "range": (low, high), **ticks}


def band(line: Sequence[tuple[float, Interval]], colour: Colour, group: str) -> list[go.Scatter]:
    """A line with its interval as a shaded band; hover tells both."""
    x = [s for s, _ in line]
    edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False, "legendgroup": group}
    return [
        go.Scatter(x=x, y=[v.low for _, v in line], **edge),
        go.Scatter(x=x, y=[v.high for _, v in line], fill="tonexty", fillcolor=faded(colour, 0.16), **edge),
    ]


def rule(colour: Colour, **where: Any) -> dict[str, Any]:
    """A dashed line across a figure. `where`: its ends, x0 to y1, and what they refer to."""
    return {"type": "line", "layer": "below", "line": {"color": colour[0], "width": 1.2, "dash": "dash"}} | where


def figure(title: str, x: dict[str, Any], y: dict[str, Any], *, height: int = 380) -> go.Figure:
    """An empty figure in the house style.

    Args:
        title: already safe for plotly.
        x: horizontal axis.
        y: vertical axis.
        height: pixels.
    """
    axis = {"showline": True, "ticks": "outside", "ticklen": 4, "zeroline": False, "automargin": True}
    axis |= {"linecolor": MUTED[0], "tickcolor": MUTED[0], "gridcolor": faded(MUTED, 0.22), "title_standoff": 8}
    layout = go.Layout(
        template=go.layout.Template(),
        title={
            "text": title,
            "x": 0,
            "xref": "paper",
            "y": 0.985,
            "yanchor": "top",
            "font": {"size": 15, "weight": 600},
        },
        font={"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 12.5, "color": INK[0]},
        xaxis=axis | x,
        yaxis=axis | y,
        legend={"orientation": "h", "x": 0, "y": -68 / (height - 150), "yanchor": "top", "font": {"size": 12}},
        margin={"l": 58, "r": 14, "t": 38 if title else 12, "b": 64},
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hovermode="closest",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": MUTED[0], "activecolor": INK[0]},
        hoverlabel={"align": "left", "font": {"size": 12.5}},
    )
    return go.Figure(layout=layout)
