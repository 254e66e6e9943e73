"""The command `watch`: a run's stream as a table that follows it."""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from towtank.cli.main import OK, RUNS_FAILED
from towtank.cli.output import console, print_json
from towtank.cli.watch_rows import Health, Row, change, health, rows
from towtank.record.errors import FolderError, plain
from towtank.record.lines import split_nonfinite
from towtank.record.stream import Stream, StreamReader, stream_file

POINTS = 1000  # of each series, kept while watching
PLAIN_S = 10.0  # between lines where there is no terminal


@dataclass(frozen=True, kw_only=True)
class View:
    """What to show, and how."""

    folder: Path
    reader: StreamReader
    everything: bool
    every_s: float


def watch(
    folder: Path, *, follow: bool | None = None, everything: bool = False, every_s: float = 1.0, json: bool = False
) -> int:
    """Show a run; returns the exit code.

    Args:
        folder: of the run.
        follow: until the run ends; None follows on a terminal only.
        everything: show every tensor and module, not only the worst.
        every_s: seconds between looks.
        json: print one JSON object in place of text.

    Raises:
        FolderError: if there is no stream to read.
    """
    view = View(folder=folder, reader=StreamReader(stream_file(folder), points=POINTS), everything=everything, every_s=every_s)  # fmt: skip
    out = console()
    if json:
        return _print_json(view)
    terminal = out.is_terminal and not out.is_dumb_terminal
    if follow is False or (follow is None and not terminal):
        stream, how = look(view)
        _show(view, stream, how)
        return exit_code(stream, how)
    try:
        return _live(view) if terminal else _lines(view)
    except KeyboardInterrupt:  # the way to stop watching; the run goes on
        return OK


def look(view: View) -> tuple[Stream, Health]:
    """The run as it is now.

    Raises:
        FolderError: if its stream cannot be read, or is none.
    """
    try:
        stream = view.reader.read()
        written = os.stat(view.reader.path).st_mtime
    except OSError as error:
        raise FolderError(
            f"{plain(str(view.reader.path))}: expected a file that can be read, got: {error.strerror}"
        ) from None
    return stream, health(stream, time.time() - written)


def exit_code(stream: Stream, how: Health) -> int:
    """3 for a run that failed or whose process is gone without a word; a run that diverged is a result."""
    return RUNS_FAILED if stream.status == "failed" or how.gone else OK


def _show(view: View, stream: Stream, how: Health) -> None:
    from towtank.cli.watch_view import frame

    out = console()
    out.print(frame(stream, how, out, folder=view.folder, everything=view.everything))


def _live(view: View) -> int:
    """Redraw until the run ends; its last picture stays."""
    from rich.live import Live

    from towtank.cli.watch_view import frame

    out = console()
    stream, how = look(view)
    try:
        with Live(console=out, screen=True, auto_refresh=False) as live:
            while True:
                live.update(
                    frame(stream, how, out, folder=view.folder, everything=view.everything, height=out.height),
                    refresh=True,
                )
                if stream.status != "running" or how.gone:
                    break
                time.sleep(view.every_s)
                stream, how = look(view)
    finally:
        _show(view, stream, how)
    return exit_code(stream, how)


def _lines(view: View) -> int:
    """Without a terminal: one plain line now and then, alarms and notes as they come."""
    from towtank.cli.watch_view import alarm_line, status

    out, alarms, notes, due = console(), 0, 0, 0.0
    while True:
        stream, how = look(view)
        for alarm in stream.alarms[alarms:]:
            _line(f"alarm: {alarm_line(alarm)}; {alarm.suggestion}")
        for note in stream.notes[notes:]:
            _line(f"note: step {note.step:,}  {note.probe}: {note.text}")
        alarms, notes = len(stream.alarms), len(stream.notes)
        ended = stream.status != "running" or bool(how.gone)
        if ended or time.monotonic() >= due:
            loss = stream.series.get("train/loss", [(0, math.nan)])[-1][1]
            _line(f"{' '.join(line.plain for line in status(stream, how, out))}, train/loss {loss:.4g}")
            due = time.monotonic() + PLAIN_S
        if ended:
            return exit_code(stream, how)
        time.sleep(view.every_s)


def _line(said: str) -> None:
    from towtank.report.text import clean, encodable

    print(encodable(clean(said, 600), sys.stdout.encoding or "ascii"), flush=True)


def _print_json(view: View) -> int:
    stream, how = look(view)
    code = exit_code(stream, how)
    print_json(
        "watch", folder=str(view.folder), id=stream.header.id, status=stream.status, step=stream.step, time_s=stream.time_s,
        steps_per_s=how.per_s, age_s=how.age_s, process_gone=how.gone, config=stream.header.config,
        environment=stream.header.environment, readings=[_reading(r) for r in rows(stream, few=None if view.everything else 3)],
        alarms=stream.alarms, notes=stream.notes, damaged=stream.damaged, exit_code=code,
    )  # fmt: skip
    return code


def _reading(row: Row) -> dict[str, Any]:
    finite, lost = split_nonfinite({"value": row.value})
    told = {"key": row.key, "step": row.step, **finite, "change": change(row.series), "limit": row.limit}
    return told | {"low": row.low, "high": row.high, "over": row.over, "nonfinite": lost.get("value")}
