"""The page of a fit: one self-contained HTML file in the style of the report of a study."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from towtank.report import document, fit_figures, fit_tables
from towtank.report.document import Section
from towtank.report.fit_answer import FitAnswer

LIMITS = (
    "The intervals tell how well these rows determine the law. They do not tell whether the law goes on beyond them: the "
    "backtest is the only evidence of that here, and it reaches only as far as the rows do.",
    "Coefficients that go together are not facts about networks: another set of rows, as good as this one, may give quite "
    "other values and the same predictions.",
    "Rows of one run are not independent. Name the column of the run as groups, or the intervals are too narrow.",
)


def write_fit(answer: FitAnswer, path: Path) -> Path:
    """Write the page, whole or not at all.

    Args:
        answer: what was found out.
        path: the file; its folder must exist.

    Returns:
        `path`.

    Raises:
        OSError: if the file cannot be written; an older page then stays as it was.
    """
    return document.write(render(answer), path)


def render(answer: FitAnswer) -> str:
    """The page as one HTML document.

    Args:
        answer: what was found out.
    """
    parts: tuple[tuple[str, str, Callable[[FitAnswer], fit_figures.Figures], list[str]], ...] = (
        ("fit", "The law", fit_figures.law_along, _law(answer)),
        ("residuals", "What it leaves unexplained", fit_figures.residuals, _residuals(answer)),
        ("backtest", "Would it have predicted what we know?", fit_figures.backtests, _backtest(answer)),
        ("profiles", "How well each coefficient is determined", fit_figures.profiles, _profiles(answer)),
    )
    sections = [Section(name, heading, draw(answer), reading) for name, heading, draw, reading in parts]
    return document.render(
        "fit.html.j2", sections, fit_figures.dark_twins(), answer=answer, tables=fit_tables,
        cards=fit_tables.cards(answer), limits=LIMITS,
    )  # fmt: skip


def _law(answer: FitAnswer) -> list[str]:
    told = ["Shaded: interval of the law."]
    if any(left.rows for left in answer.influence.values()) and answer.unit == "row":
        told = ["Shaded: interval of the law. Red diamonds: the rows that move its coefficients most."]
    if answer.unit == "row" and len(answer.columns) > 1:
        moved = (
            "Along one variable, the others held at their median; every row is moved along the law to those values, "
        )
        return [moved + "its residual kept.", *told]
    return told


def _residuals(answer: FitAnswer) -> list[str]:
    if answer.residuals is None:
        return []
    r = answer.residuals
    told = [
        f"Half of the {answer.rows:,} rows lie within {100 * r.median:.2g} % of the law; the worst is {r.worst_at}."
    ]
    if len(answer.points) < answer.rows:
        told.append(f"{len(answer.points):,} rows are drawn, the worst among them.")
    return [*told, "A bend or a funnel here means that the law, or equal trust in all rows, is wrong."]


def _backtest(answer: FitAnswer) -> list[str]:
    b = answer.backtest
    if b is None:
        return []
    told = f"{b.inside} of {b.count} hidden {answer.unit}s lie in their intervals, which hold for one new run."
    more = b.count - fit_figures.MOST_HIDDEN
    rest = [f"{more} more are in the table below."] if more > 0 else []
    return [
        f"The largest {answer.unit}s were hidden, the law fitted to the others, and the hidden ones predicted.",
        told,
        *rest,
    ]


def _profiles(answer: FitAnswer) -> list[str]:
    told = ["Each coefficient is held in turn and all the others are fitted again. Shaded: interval by likelihood."]
    pairs = [
        f"{p.first} and {p.second} are hardly told apart (correlation {p.correlation:.2f})." for p in answer.confounded
    ]
    return [*told, *pairs[:3]]
