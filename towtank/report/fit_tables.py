"""The tables and cards of a fit as plain data, the same on the page and in the terminal."""

from __future__ import annotations

from towtank.estimate import Interval
from towtank.report import text
from towtank.report.fit_answer import FitAnswer, percent
from towtank.report.tables import Card, Cell, Table, value, verdict, words

DIGITS = 4
CARDS = 5


def coefficients(answer: FitAnswer) -> Table:
    """Every coefficient, its interval by bootstrap and by likelihood, and how far a few rows move it."""
    profiles = {p.name: p.interval for p in answer.profiles if p.interval}
    moved = {name: left.factor for name, left in answer.influence.items()}
    head = ["coefficient", "value", "interval", *["by likelihood"] * bool(profiles), *["moves by"] * bool(moved)]
    rows = []
    for name, v in answer.coefficients.items():
        cells = [words(name, 40), value(v.value, DIGITS), span(v)]
        cells += [span(profiles.get(name))] * bool(profiles)
        cells += [_factor(moved.get(name))] * bool(moved)
        rows.append(tuple(cells))
    return Table(tuple(head), tuple(rows))


def forecasts(answer: FitAnswer, *, brief: bool = False) -> Table:
    """What the law says where it was asked; `brief`: without the reasons of the verdicts."""
    names = list(answer.forecasts[0].x) if answer.forecasts else []
    named = any(f.name for f in answer.forecasts)
    rows = []
    for f in answer.forecasts:
        at = (*[words(f.name, 40)] * named, *(value(f.x[name], DIGITS) for name in names))
        told = (value(f.value.value if f.value else None, DIGITS), span(f.value), span(f.run))
        judged = Cell(f.verdict.status, None, f.verdict.status) if brief else verdict(f.verdict)
        rows.append((*at, *told, judged))
    y = text.clean(answer.y, 30)
    return Table((*["curve"] * named, *names, y, "interval", "of one run", "verdict"), tuple(rows))


def backtest(answer: FitAnswer) -> Table:
    """The rows that were hidden, and what the others said of them."""
    if answer.backtest is None:
        return Table((), ())
    names = list(answer.backtest.points[0].x)
    rows = []
    for p in answer.backtest.points:
        away = percent(p.predicted.value / p.measured - 1, False) if p.measured else None
        told = (value(p.measured, DIGITS), Cell(text.interval(p.predicted, DIGITS)), _percent(away))
        hit = Cell("yes" if p.inside else "no", None, "ok" if p.inside else "weak")
        rows.append((words(p.name, 40), *(value(p.x[n], DIGITS) for n in names), *told, hit))
    return Table(("hidden", *names, "measured", "predicted", "off by", "inside"), tuple(rows))


def influence(answer: FitAnswer) -> Table:
    """For each coefficient the rows that move it most, and all coefficients fitted without them."""
    names = list(answer.influence)
    rows = [
        (words(name), words(", ".join(left.rows)), *(value(left.coefficients[n], DIGITS) for n in names))
        for name, left in answer.influence.items()
    ]
    return Table(("most moved", f"without {answer.unit}s", *names), tuple(rows))


def selection(answer: FitAnswer) -> Table:
    """The coefficients without a share of the rows at either end of every column."""
    names = list(answer.selection[0].coefficients) if answer.selection else []
    rows = [
        (words(f"the {text.percent(s.share)} {s.end} {s.column}"), *(value(s.coefficients[n], DIGITS) for n in names))
        for s in answer.selection
    ]
    return Table(("left out", *names), tuple(rows))


def confounded(answer: FitAnswer) -> Table:
    """Coefficients that the rows do not tell apart, and what they determine instead."""
    rows = [
        (words(f"{p.first}, {p.second}"), value(p.correlation), words(p.combination), Cell(text.interval(p.value)))
        for p in answer.confounded
    ]
    return Table(("not told apart", "correlation", "what is determined", "its value"), tuple(rows))


def facts(answer: FitAnswer) -> list[tuple[str, str]]:
    """What was fitted and how well, by name."""
    columns = ", ".join(f"{name} = {column}" for name, column in answer.columns.items())
    told = [("table", answer.table), ("columns", f"{columns}; {answer.y}"), ("rows", f"{answer.rows:,}")]
    if answer.groups is not None:
        told.append(("independent runs", f"{answer.groups:,}"))
    if answer.objective is not None:
        told.append(("objective", f"{answer.objective:.8g}"))
    if answer.residuals is not None:
        r = answer.residuals
        of = "" if answer.relative else f" of the range of {answer.y}"
        sizes = f"median {100 * r.median:.3g} %, rms {100 * r.rms:.3g} %, worst {100 * r.worst:.3g} % ({r.worst_at})"
        told.append((f"residuals{of}", sizes))
    told += [(name, what) for name, what in answer.meaning.items() if name in answer.coefficients]
    if answer.at_bound:
        told.append(("at a bound", ", ".join(answer.at_bound)))
    return [(text.clean(name, 60), text.clean(what, 300)) for name, what in told]


def cards(answer: FitAnswer) -> list[Card]:
    """The first forecasts, the backtest, the exponents or whatever comes first."""
    found = [_forecast_card(answer, i) for i in range(min(CARDS - 2, len(answer.forecasts)))]
    b = answer.backtest
    if b is not None:
        told = f"{b.count} hidden {answer.unit}s, at worst" if b.count > 1 else f"the hidden {answer.unit}"
        away = f"{100 * (b.factor - 1):.2g} %" if b.factor < 2 else f"factor {b.factor:.3g}"
        foot = "inside the intervals" if b.hit else "outside the intervals"
        found.append(Card(label="backtest: off by", value=away, detail=told, foot=foot, tone="ok" if b.hit else "weak"))
    if answer.residuals is not None:
        worst = f"worst {100 * answer.residuals.worst:.2g} % ({text.clean(answer.residuals.worst_at, 40)})"
        value_ = f"{100 * answer.residuals.median:.2g} %"
        found.append(Card(label="median residual", value=value_, detail=worst, foot=f"{answer.rows:,} rows"))
    for name, v in list(answer.coefficients.items())[: max(0, CARDS - len(found))]:
        found.append(Card(label=text.clean(name, 40), value=text.number(v.value), detail=_between(v)))
    return found


def span(v: Interval | None) -> Cell:
    """The ends of an interval."""
    return Cell("-" if v is None else f"{text.number(v.low, DIGITS)} to {text.number(v.high, DIGITS)}")


def _forecast_card(answer: FitAnswer, index: int) -> Card:
    f = answer.forecasts[index]
    label = f"{text.clean(answer.y, 30)} at {text.clean(f.name, 40)} {text.place(f.x)}"
    if f.value is None:
        return Card(label=label, value="cannot tell", detail=text.clean(f.verdict.reason, 200), tone="refuse")
    foot = text.VERDICT_WORDS[f.verdict.status]
    return Card(
        label=label,
        value=text.number(f.value.value, DIGITS),
        detail=_between(f.value),
        foot=foot,
        tone=f.verdict.status,
    )


def _between(v: Interval) -> str:
    return f"{text.number(v.low, DIGITS)} to {text.number(v.high, DIGITS)} ({text.percent(v.level)} interval)"


def _factor(x: float | None) -> Cell:
    if x is None:
        return Cell("-")
    return Cell(f"{100 * (x - 1):.2g} %" if x < 2 else f"factor {x:.3g}", x)


def _percent(x: float | None) -> Cell:
    return Cell("-" if x is None else f"{x:+.2g} %", x)
