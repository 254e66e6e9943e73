"""How a watched run looks in a terminal of any width, with or without Unicode."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from towtank.cli.watch_rows import Health, Row, change, rows, sparkline
from towtank.record.lines import Alarm
from towtank.record.stream import Stream
from towtank.report import text

BARS, ASCII_BARS = "▁▂▃▄▅▆▇█×", "_.-:=+*#x"
STYLES = {"critical": "red", "warning": "yellow", "": ""}
FEW = 3  # tensors or modules of a kind
_KEY_LEAST, _BARS_LEAST, _BARS_MOST = 26, 10, 48
_DROPPED = (5, 4, 3)  # columns that go where the terminal is narrow, in this order


def frame(
    stream: Stream, how: Health, console: Console, *, folder: Path, everything: bool = False, height: int | None = None
) -> Text:
    """All that is shown of a run.

    Args:
        stream: the run.
        how: whether it still writes.
        console: where it is shown; its width and encoding are respected.
        folder: of the run.
        everything: show every tensor and module.
        height: lines there are; None shows all.
    """
    head = [*_said(console, f"{folder}  run {stream.header.id or '?'}", "bold"), *status(stream, how, console)]
    if stream.damaged:
        head += _said(console, f"{len(stream.damaged)} damaged lines were skipped", "yellow")
    alarms, notes = _alarms(stream, console), _notes(stream, console)
    if height is None:
        table = _table(stream, None if everything else FEW, console)
        return Text("\n").join([*head, Text(), *table, *alarms, *notes])
    alarms, notes = _first(alarms, max(5, height // 3), console), _first(notes, max(4, height // 6), console)
    room = max(4, height - len(head) - len(alarms) - len(notes) - 1)
    table = _table(stream, None if everything else FEW, console)
    for few in (2, 1):
        if len(table) > room and not everything:
            table = _table(stream, few, console)
    return Text("\n").join([*head, Text(), *_first(table, room, console), *alarms, *notes])


def status(stream: Stream, how: Health, console: Console) -> list[Text]:
    """Whether the run goes on, how fast, and how old its last line is.

    Args:
        stream: the run.
        how: whether it still writes.
        console: where it is shown.
    """
    parts = [f"step {stream.step:,}", age(stream.time_s)]
    if stream.status != "running":
        style = "green" if stream.status == "done" else "red" if stream.status in ("failed", "diverged") else "yellow"
        return _said(console, f"ended: {stream.status}, {', '.join(parts)}", style)
    if how.gone:
        dead = f"process {stream.header.pid} is gone, it was killed or crashed"
        return _said(console, f"not running: {dead}; last line {age(how.age_s)} ago, {', '.join(parts)}", "red")
    pace = [] if how.per_s is None else [f"{text.number(how.per_s)} steps/s"]
    if how.silent:
        return _said(
            console, f"no line for {age(how.age_s)}: stuck, killed, or in a slow step; {', '.join(parts)}", "yellow"
        )
    return _said(console, f"running, {', '.join([*parts, *pace])}, last line {age(how.age_s)} ago", "green")


def age(seconds: float) -> str:
    """A time in whole seconds, minutes, hours.

    Example:
        >>> age(2.4), age(70.0)
        ('2 s', '1 min 10 s')
    """
    return f"{seconds:.0f} s" if seconds < 59.5 else text.duration(float(round(seconds)))


def alarm_line(alarm: Alarm) -> str:
    """An alarm in one line."""
    return f"step {alarm.step:,}  {alarm.name}: {alarm.message}"


def _alarms(stream: Stream, console: Console) -> list[Text]:
    """The newest alarm of each kind, newest on top."""
    newest: dict[tuple[str, str], Alarm] = {}
    for alarm in reversed(stream.alarms):
        newest.setdefault((alarm.name, alarm.key), alarm)
    if not newest:
        return []
    lines = [Text(), Text(f"Alarms ({len(stream.alarms)}), newest first", style="bold")]
    for (name, key), alarm in newest.items():
        times = sum((a.name, a.key) == (name, key) for a in stream.alarms)
        again = f" ({times} times)" if times > 1 else ""
        mark = "!!" if alarm.severity == "critical" else "! "
        style = STYLES["critical" if alarm.severity == "critical" else "warning"]
        lines += _said(console, f"{mark} {alarm_line(alarm)}{again}", style, indent=3)
        if alarm.suggestion:
            lines += _said(console, alarm.suggestion, indent=3, first=3)
    return lines


def _notes(stream: Stream, console: Console) -> list[Text]:
    newest = {(note.probe, note.text): note for note in stream.notes}
    if not newest:
        return []
    lines = [Text(), Text("Notes", style="bold")]
    for note in sorted(newest.values(), key=lambda note: -note.step):
        lines += _said(console, f"step {note.step:,}  {note.probe}: {note.text}", indent=3)
    return lines


def _table(stream: Stream, few: int | None, console: Console) -> list[Text]:
    shown = rows(stream, few=few)
    reading = "reading (worst of a kind)" if few == 1 and any(row.kind > 1 for row in shown) else "reading"
    cells = [("", reading, "last", "limit", "change", "step"), *(_cells(row, few, console) for row in shown)]
    kept, widths, bars = _layout(cells, console.width)
    marks = BARS if encode(BARS, console) == BARS else ASCII_BARS
    lines = [_table_line(cells[0], kept, widths, "history"[:bars], "dim")]
    heading = ""
    for row, line in zip(shown, cells[1:], strict=True):
        if row.kind and few != 1 and row.begin != heading:
            heading = row.begin
            lines += _said(console, _heading(row, few), indent=3, first=1)
        style = STYLES[row.alarmed or ("warning" if row.over else "")]
        lines.append(_table_line(line, kept, widths, sparkline(row.series, bars, marks), style))
    return lines


def _layout(cells: Sequence[Sequence[str]], width: int) -> tuple[list[int], dict[int, int], int]:
    """Which columns there is room for, how wide they are, and how wide the history is."""
    kept = [i for i in range(len(cells[0])) if i != 3 or any(row[3] for row in cells[1:])]
    widths = {i: max(len(row[i]) for row in cells) for i in kept}
    while True:
        others = widths[0] + sum(widths[i] + 2 for i in kept if i > 1)
        spare = width - others - 2 - _BARS_LEAST
        droppable = [i for i in _DROPPED if i in kept]
        if spare >= min(widths[1], _KEY_LEAST) or not droppable:
            break
        kept.remove(droppable[0])
    widths[1] = max(min(widths[1], max(spare, _KEY_LEAST), width - others), 8)
    bars = min(width - others - 2 - widths[1], _BARS_MOST)
    return kept, widths, bars if bars >= 4 else 0


def _heading(row: Row, few: int | None) -> str:
    count = f"{row.kind}" if few is None or row.kind <= few else f"worst {few} of {row.kind}"
    return f"{row.begin}* ({count})"


def _cells(row: Row, few: int | None, console: Console) -> tuple[str, ...]:
    rest = row.key.removeprefix(row.begin)
    kind = "/".join(row.key.split("/")[:2])
    label = row.key if not row.kind else f"  {rest}" if few != 1 else f"{kind}/{rest}"
    limit = "" if row.limit is None else f"{'>' if row.floor else '<'} {row.limit:.4g}".replace("e+0", "e")
    spread = "" if row.low is None or row.high is None else f" [{text.number(row.low)}, {text.number(row.high)}]"
    digits = 4 if row.key.endswith("loss") else 3
    last = text.number(row.value, digits) if math.isfinite(row.value) else str(row.value)
    mark = "!" if row.over or row.alarmed else " "
    return (
        mark,
        encode(label, console) if not label.startswith(" ") else f"  {encode(label, console)}",
        last + (spread if console.width >= 100 else ""),
        limit,
        _percent(row),
        f"{row.step:,}",
    )


def _table_line(cells: Sequence[str], kept: Sequence[int], widths: dict[int, int], bars: str, style: str) -> Text:
    key = _elided(cells[1], widths[1])
    numbers = "".join(f"  {cells[i]:>{widths[i]}}" for i in kept if i > 1)
    return Text(f"{cells[0]:{widths[0]}}{key:{widths[1]}}{numbers}  {bars}".rstrip(), style=style)


def _percent(row: Row) -> str:
    moved = change(row.series)
    if moved is None:
        return ""
    return f"{moved:+.1%}" if abs(moved) < 10 else f"x{1 + moved:.3g}" if moved > 0 else f"{moved:+.0%}"


def _elided(label: str, width: int) -> str:
    """A long label without its middle: the kind and the end of the name tell most."""
    if len(label) <= width:
        return label
    left = width // 2 - 2
    return f"{label[:left]}..{label[left + 2 - width :]}"


def _first(lines: list[Text], room: int, console: Console) -> list[Text]:
    """As many lines as there is room for, and how many more there are."""
    if len(lines) <= room:
        return lines
    more = f"... {len(lines) - room + 1} more lines; --once shows all"
    return [*lines[: room - 1], Text(more, style="dim")]


def encode(said: str, console: Console, limit: int = 400) -> str:
    """Text that steers nothing and can be written on this console."""
    return text.encodable(text.clean(said, limit), console.encoding)


def _said(console: Console, said: str, style: str = "", *, indent: int = 0, first: int = 0) -> list[Text]:
    """Text of the file or about it, clean, in lines that fit."""
    lines = textwrap.wrap(
        encode(said, console, 600), max(console.width, 20), initial_indent=" " * first, subsequent_indent=" " * indent
    )
    return [Text(line, style=style, no_wrap=True) for line in lines] or [Text()]
