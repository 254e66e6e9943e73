"""The report of a study: one self-contained HTML file."""

from __future__ import annotations

from pathlib import Path

from towtank.report import document, figures, readings, tables
from towtank.report.answer import Answer
from towtank.report.document import Section

# (name of the function in `figures` and in `readings`, heading)
SECTIONS = (
    ("loss_against_rate", "Loss against learning rate"),
    ("optimum_against_size", "Best learning rate against size"),
    ("backtests", "Would it have predicted what we know?"),
    ("sensitivity_by_size", "Learning-rate sensitivity"),
    ("attention_logits", "Attention logits"),
    ("best_loss_against_size", "Best loss against size"),
)


def write_report(answer: Answer, path: Path) -> Path:
    """Write the report, whole or not at all.

    Args:
        answer: what was found out.
        path: the file; its folder must exist.

    Returns:
        `path`.

    Raises:
        OSError: if the file cannot be written; an older report then stays as it was.
    """
    return document.write(render(answer), path)


def render(answer: Answer) -> str:
    """The report as one HTML document.

    Args:
        answer: what was found out.
    """
    return document.render(
        "report.html.j2",
        [_section(answer, name, heading) for name, heading in SECTIONS],
        figures.dark_twins(answer),
        answer=answer,
        tables=tables,
        cards=tables.cards(answer),
        limits=readings.LIMITS,
        evidence=readings.evidence(answer),
        comparison_caption=readings.comparison(answer),
    )


def _section(answer: Answer, name: str, heading: str) -> Section:
    drawn = getattr(figures, name)(answer)
    return Section(name, heading, drawn, getattr(readings, name)(answer) if drawn else ())
