"""The answer in a terminal: plain ASCII around the user's own text, as a table where it fits and as a list where not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich import table as rich_table
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from towtank.estimate import Verdict
from towtank.report import readings, tables, text
from towtank.report.answer import Answer, Arm, Prediction
from towtank.report.tables import Cell, Table

STYLES = {"ok": "green", "weak": "yellow", "refuse": "red", "": ""}
_RULE = box.Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)


def show_answer(answer: Answer, console: Console) -> None:
    """Print question, answer, and the numbers behind it.

    Args:
        answer: what was found out.
        console: where to; its width and encoding are respected.
    """
    say(console, answer.question or answer.study, limit=300, style="bold")
    say(console, f"{answer.verdict.status.upper()}: {answer.sentence}", limit=900, style=STYLES[answer.verdict.status])
    if answer.verdict.reason and answer.verdict.reason not in answer.sentence:
        say(console, answer.verdict.reason, limit=600)
    for warning in answer.warnings:
        say(console, f"warning: {warning}", limit=400, style="yellow")
    grows = answer.comparison is None or any(len(arm.sizes) > 1 for arm in answer.arms)
    for arm in answer.arms if grows else ():
        show_table(console, arm.name, _sizes(answer, arm))
    explain(console, ((f"{arm.name}, {text.size(s.size)}", s.verdict) for arm in answer.arms for s in arm.sizes))
    if grows:
        show_table(console, "Laws of the learning rate", _laws(answer))
        explain(console, ((arm.name, arm.lr_law.verdict) for arm in answer.arms if arm.lr_law))
    show_table(console, "The arms compared", _comparison(answer))
    if answer.comparison:
        say(console, f"  {readings.comparison(answer)}", limit=400)
    show_predictions([arm.prediction for arm in answer.arms if arm.prediction], console, size_axis=answer.size_axis)
    show_table(console, "Verification", _verifications(answer))
    for arm in answer.arms:
        if arm.verification and arm.verification.reason:
            say(console, f"  {arm.name}: {readings.held(arm.verification)}, {arm.verification.reason}", limit=400)
    counts = ", ".join(f"{n} {text.clean(status, 20)}" for status, n in answer.counts.items()) or "none"
    say(console, f"Runs: {counts}; {text.duration(answer.time_s)} of training.", blank=True)


def show_predictions(predictions: Sequence[Prediction], console: Console, *, size_axis: str = "size") -> None:
    """Print what each arm says about a size.

    Args:
        predictions: one an arm.
        console: where to.
        size_axis: what sizes are called.
    """
    head = ("arm", text.clean(size_axis, 20), "learning rate", "loss", "max logit", "stable", "verdict")
    rows = []
    for p in predictions:
        stable = Cell({True: "yes", False: "no", None: "-"}[p.stable])
        loss, logit = p.loss and p.loss.value, p.attention_logit_max and p.attention_logit_max.value
        numbers = (Cell(text.interval(p.lr)), _short(loss, 4), _short(logit))
        rows.append((tables.words(p.arm, 40), Cell(text.size(p.size), p.size), *numbers, stable, _status(p.verdict)))
    show_table(console, "Predictions", Table(head, tuple(rows)))
    explain(console, ((p.arm, p.verdict) for p in predictions))


def _sizes(answer: Answer, arm: Arm) -> Table:
    axis = text.clean(answer.size_axis, 20)
    rows = []
    for s in arm.sizes:
        logits = [p.attention_logit_max for p in s.rates if p.attention_logit_max is not None]
        best = _short(s.best_loss and s.best_loss.value, 4)
        numbers = (Cell(text.interval(s.optimum)), best, _short(s.sensitivity), _short(max(logits, default=None)))
        rows.append((Cell(text.size(s.size), s.size), *numbers, _status(s.verdict)))
    return Table((axis, "best learning rate", "best loss", "sensitivity", "max logit", "verdict"), tuple(rows))


def _laws(answer: Answer) -> Table:
    rows = [_law(arm) for arm in answer.arms if arm.lr_law]
    return Table(("arm", "octaves per doubling", "backtest", "verdict"), tuple(rows))


def _law(arm: Arm) -> tuple[Cell, ...]:
    assert arm.lr_law is not None
    test = arm.lr_law.backtest
    told = f"factor {test.factor:.2f}, {'inside' if test.hit else 'outside'}" if test else "-"
    slope = text.interval(arm.lr_law.coefficients.get("slope"))
    return tables.words(arm.name, 40), Cell(slope), Cell(told), _status(arm.lr_law.verdict)


def _comparison(answer: Answer) -> Table:
    """As on the page, with less of each arm, so that a row fits a line."""
    rows = []
    for row, r in zip(
        tables.comparison(answer).rows, answer.comparison.rivals if answer.comparison else (), strict=True
    ):
        arm, rate, _, above, _, _, step, state, outcome = row
        rows.append((arm, rate, _short(r.loss.value, 4), above, step, state, outcome))
    return Table(("arm", "rate", "loss", "above the best", "ms", "state B", "outcome"), tuple(rows))


def _verifications(answer: Answer) -> Table:
    rows = []
    for arm in answer.arms:
        if v := arm.verification:
            values = (_short(v.predicted.value), Cell(text.interval(v.measured)))
            tone = {True: "ok", False: "refuse", None: "weak"}[v.held]
            end = (_short(v.factor), Cell(readings.held(v), None, tone))
            rows.append((tables.words(arm.name, 40), Cell(text.size(v.size), v.size), *values, *end))
    head = ("arm", text.clean(answer.size_axis, 20), "predicted", "measured", "factor", "outcome")
    return Table(head, tuple(rows))


def _short(x: float | None, digits: int = 3) -> Cell:
    return Cell(text.number(x, digits), x)


def _status(v: Verdict) -> Cell:
    return Cell(v.status, None, v.status)


def say(console: Console, said: str, *, limit: int = 400, style: str = "", blank: bool = False) -> None:
    """Print user text: nothing in it is markup, an escape code, or a character the terminal cannot write.

    Args:
        console: where to.
        said: one paragraph; one that begins with two spaces is indented.
        limit: longest text, characters.
        style: as rich has it.
        blank: leave an empty line before it.
    """
    if blank:
        console.print()
    line = Text(encode(said, console, limit), style=style)
    console.print(Padding(line, (0, 0, 0, 2 if said.startswith("  ") else 0), expand=False), highlight=False)


def encode(said: str, console: Console, limit: int = 400) -> str:
    """Text that is safe and writable on this console.

    Args:
        said: any text.
        console: where it will be printed.
        limit: longest result, characters.
    """
    return text.encodable(text.clean(said, limit), console.encoding)


def explain(console: Console, verdicts: Iterable[tuple[str, Verdict]]) -> None:
    """Print the reasons of verdicts that are not plain ok; the same reason is told once.

    Args:
        console: where to.
        verdicts: what each is of, and the verdict.
    """
    told: dict[str, list[str]] = {}
    for name, verdict in verdicts:
        if verdict.reason and verdict.status != "ok":
            told.setdefault(f"{verdict.status}, {verdict.reason}", []).append(text.clean(name, 40))
    for reason, names in told.items():
        say(console, f"  {'; '.join(names)}: {reason}", limit=600)


def show_table(console: Console, title: str, table: Table) -> None:
    """Print a table if every row fits in a line, else one short list a row; nothing if it has no rows.

    Args:
        console: where to.
        title: its heading.
        table: what it holds.
    """
    if not table.rows:
        return
    columns = zip(table.head, *([cell.shown for cell in row] for row in table.rows), strict=True)
    needed = sum(max(Text(encode(shown, console)).cell_len for shown in column) + 2 for column in columns)
    say(console, title, style="bold", blank=True)
    if needed <= console.width:
        console.print(_grid(console, table))
    else:
        _list(console, table)


def _grid(console: Console, table: Table) -> rich_table.Table:
    grid = rich_table.Table(box=_RULE, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="")
    for i, name in enumerate(table.head):
        grid.add_column(Text(encode(name, console)), justify="right" if table.numeric(i) else "left", no_wrap=True)
    for row in table.rows:
        grid.add_row(*(Text(encode(cell.shown, console), style=STYLES[cell.tone]) for cell in row))
    return grid


def _list(console: Console, table: Table) -> None:
    named = 1 if table.rows[0][0].numeric else 2 if len(table.head) > 1 and table.rows[0][1].numeric else 1
    for row in table.rows:
        say(console, ", ".join(_named(name, cell) for name, cell in zip(table.head, row[:named], strict=False)))
        for name, cell in zip(table.head[named:], row[named:], strict=True):
            if cell.shown != "-":
                say(console, f"  {name}: {cell.shown}", style=STYLES[cell.tone])


def _named(name: str, cell: Cell) -> str:
    return f"{name} {cell.shown}" if cell.numeric else cell.shown
