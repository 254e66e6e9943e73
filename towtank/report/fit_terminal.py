"""A fit in a terminal."""

from __future__ import annotations

from rich.console import Console

from towtank.report import fit_tables, text
from towtank.report.fit_answer import FitAnswer
from towtank.report.terminal import STYLES, explain, say, show_table

SHOWN = 8  # hidden rows listed; the page has them all
TABLES = (
    ("coefficients", "Coefficients"),
    ("confounded", "What the {unit}s do not tell apart"),
    ("influence", "Without the most influential {unit}s"),
    ("backtest", "Backtest: the largest {unit}s hidden"),
)


def show_fit(answer: FitAnswer, console: Console) -> None:
    """Print a fit: the answer, then what it rests on.

    Args:
        answer: what was found out.
        console: where to; its width and encoding are respected.
    """
    say(console, f"{answer.law}: {answer.formula}", style="bold")
    say(console, f"{answer.overall.status.upper()}: {answer.sentence}", limit=900, style=STYLES[answer.overall.status])
    if answer.overall.reason:
        say(console, answer.overall.reason, limit=600)
    for warning in answer.warnings:
        say(console, f"warning: {warning}", limit=400, style="yellow")
    for name, what in fit_tables.facts(answer):
        say(console, f"  {name}: {what}")
    for name, title in TABLES:
        table = getattr(fit_tables, name)(answer)
        show_table(console, title.format(unit=answer.unit), table.first(SHOWN))
        if len(table.rows) > SHOWN:
            say(console, f"  and {len(table.rows) - SHOWN} more, on the page")
    show_table(console, "Predictions", fit_tables.forecasts(answer, brief=True))
    explain(console, ((f"{f.name} {text.place(f.x)}".strip(), f.verdict) for f in answer.forecasts))
