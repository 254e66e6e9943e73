"""The plan of a sweep as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from towtank.record.errors import plain, show
from towtank.study.progress import duration

if TYPE_CHECKING:
    from rich.console import Console

    from towtank.study.dry_run import DryRow, DryRun


def show_plan(planned: DryRun, console: Console) -> None:
    """Print the grid, what is done, and the time and memory of the rest."""
    for name, values in planned.axes.items():
        console.print(Text(plain(f"{name} = {show(values, limit=100)}")))
    _show_rows(planned.rows, console)
    left = planned.runs - planned.done
    console.print(Text(f"{planned.done} of {planned.runs} runs are done in {plain(str(planned.folder))}"))
    if left:
        about = f"about {duration(planned.time_s)} on {planned.workers} worker{'s' * (planned.workers > 1)}"
        console.print(Text(f"to do: at most {left} runs, {about}, {_bytes(planned.memory)} of memory"))
    for note in planned.notes:
        console.print(Text(plain(note)))


def _show_rows(rows: Sequence[DryRow], console: Console) -> None:
    """A table, or on a narrow terminal a line for each row."""
    names = ("stage", "size", "runs", "done", "parameters", "time", "memory")
    if console.width < 72:
        for row in rows:
            stage, size, *rest = _cells(row)
            said = ", ".join(f"{name} {value}" for name, value in zip(names[2:], rest, strict=True))
            console.print(Text(f"{stage} {size}: {said}"))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for name in names:
        table.add_column(name, justify="left" if name == "stage" else "right")
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)


def _cells(row: DryRow) -> list[str]:
    runs = f"<= {row.runs}" if row.bound else str(row.runs)
    time = duration(row.time_s) if row.time_s else "-"
    memory = _bytes(row.memory) if row.memory else "-"
    return [row.stage, f"{row.size:g}", runs, str(row.done), f"{row.parameters:,}", time, memory]


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
