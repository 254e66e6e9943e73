"""The stream of a run that is being watched: written line by line, readable meanwhile, whole after a crash."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from towtank.record.errors import FolderError, plain
from towtank.record.lines import Alarm, Damaged, End, Ended, Entry, Note, Run, Step, read_stream
from towtank.record.record import Curve, Loss, Record, RunStatus, write_record
from towtank.record.thin import thin
from towtank.record.writer import StreamWriter

__all__ = [
    "FILE",
    "Stream",
    "StreamReader",
    "StreamWriter",
    "load_stream",
    "read_stream",
    "record_of",
    "save_record",
    "stream_file",
]

FILE = "stream.jsonl"
LOSS = "train/loss"
LOSS_POINTS, SIGNAL_POINTS = 1000, 200
_CHUNK = 1 << 23
_RECENT = 32
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
Series = list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """A run as far as its stream tells.

    Args:
        header: the run's first line (the newest one where it was resumed).
        series: {key: [(step, value)]}, NaN and infinity included.
        alarms: oldest first.
        notes: oldest first.
        status: "running" as long as the run has not said that it ended; a killed run never says.
        step: the last step.
        time_s: seconds of training, over all resumptions.
        recent: (step, seconds) of the last steps.
        damaged: lines that could not be read.
    """

    header: Run
    series: Mapping[str, Series]
    alarms: tuple[Alarm, ...]
    notes: tuple[Note, ...]
    status: Literal["running"] | End
    step: int
    time_s: float
    recent: tuple[tuple[int, float], ...]
    damaged: tuple[Damaged, ...]


class StreamReader:
    """Follows a stream while it grows.

    Where a run was resumed from an earlier step, what it did after that step the first time is forgotten.

    Args:
        path: the file.
        points: thin each series to at most twice this many points, extremes kept; None keeps all.
    """

    def __init__(self, path: Path | str, *, points: int | None = None) -> None:
        self.path, self.points = Path(path), points
        self._begin()

    def _begin(self) -> None:
        self._offset, self._inode = 0, 0
        self._header: Run | None = None
        self._series: dict[str, Series] = {}
        self._alarms: list[Alarm] = []
        self._notes: list[Note] = []
        self._damaged: list[Damaged] = []
        self._recent: deque[tuple[int, float]] = deque(maxlen=_RECENT)
        self._status: Literal["running"] | End = "running"
        self._step, self._time, self._earlier = 0, 0.0, 0.0
        self._before: tuple[int, int] | None = (
            None  # alarms and notes of the earlier sessions, until their last step is known
        )

    def read(self) -> Stream:
        """Read what is new; the series of the result grow with later calls.

        Raises:
            OSError: if the file cannot be read.
            FolderError: if it is no stream, or has no line yet.
            NewerRecordError: if a later towtank wrote it.
        """
        found = os.stat(self.path)
        if found.st_ino != self._inode or found.st_size < self._offset:  # another run has taken its place
            self._begin()
            self._inode = found.st_ino
        while True:
            entries, offset = read_stream(self.path, self._offset, limit=_CHUNK)
            if offset == self._offset:
                break
            self._offset = offset
            for entry in entries:
                self._take(entry)
        return self._stream()

    def _stream(self) -> Stream:
        name = plain(str(self.path))
        if self._header is None and not self._series:
            if self._damaged:
                raise FolderError(f"{name}: expected a stream of a run, got {self._damaged[0].reason}")
            raise FolderError(f"{name}: expected the lines of a run, got an empty file; the run has not begun")
        return Stream(
            header=self._header or Run(id=""), series=dict(self._series), alarms=tuple(self._alarms),
            notes=tuple(self._notes), status=self._status, step=self._step, time_s=self._earlier + self._time,
            recent=tuple(self._recent), damaged=tuple(self._damaged),
        )  # fmt: skip

    def _take(self, entry: Entry) -> None:
        match entry:
            case Run():
                self._header, self._status = entry, "running"
                self._before = len(self._alarms), len(self._notes)
                self._earlier, self._time = self._earlier + self._time, 0.0
                self._recent.clear()
            case Step():
                self._take_step(entry)
            case Alarm():
                self._alarms.append(entry)
            case Note():
                self._notes.append(entry)
            case Ended():
                self._status = entry.status
            case Damaged():
                self._damaged.append(entry)

    def _take_step(self, entry: Step) -> None:
        if self._before is not None:
            self._rewind(entry.step, *self._before)
            self._before = None
        self._step, self._time = entry.step, entry.time_s
        self._recent.append((entry.step, entry.time_s))
        most = float("inf") if self.points is None else 2 * self.points
        for key, value in entry.values.items():
            series = self._series.get(key)
            if series is None:
                series = self._series[key] = []
            series.append((entry.step, value))
            if len(series) > most:
                series[:] = thin(series, len(series) // 2)

    def _rewind(self, step: int, alarms: int, notes: int) -> None:
        for series in self._series.values():
            while series and series[-1][0] >= step:
                series.pop()
        self._series = {key: series for key, series in self._series.items() if series}
        self._alarms[:alarms] = [a for a in self._alarms[:alarms] if a.step < step]
        self._notes[:notes] = [n for n in self._notes[:notes] if n.step < step]


def load_stream(folder: Path | str, *, points: int | None = None) -> Stream:
    """The stream in a run's folder, as far as it is written.

    Args:
        folder: with `stream.jsonl` in it.
        points: as in `StreamReader`.

    Raises:
        FolderError: if there is none.
        NewerRecordError: if a later towtank wrote it.
    """
    return StreamReader(stream_file(folder), points=points).read()


def stream_file(folder: Path | str) -> Path:
    """Where a run's folder has its stream.

    Raises:
        FolderError: if there is no such folder, or no stream in it.
    """
    path = Path(folder)
    shown = plain(str(path))
    if not path.is_dir():
        raise FolderError(
            f"{shown}: expected the folder of a run, got {'a file' if path.exists() else 'nothing there'}"
        )
    if not (path / FILE).is_file():
        other = "; `towtank report` answers a sweep" if (path / "records").is_dir() else ""
        raise FolderError(f"{shown}: expected {FILE} in it, which towtank.Monitor(..., out=FOLDER) writes{other}")
    return path / FILE


def record_of(stream: Stream, *, reason: str = "") -> Record:
    """The record of a run that was watched, as studies write them.

    Its loss is that of single training steps, not a held-out one, which `environment["loss"]` says. A run that was stopped, or
    never said that it ended, is "failed": laws must not take its last loss for that of the whole run.

    Args:
        stream: the run.
        reason: why it ended as it did; by default what the status tells.

    Example:
        >>> from towtank.record.lines import Run
        >>> run = Stream(header=Run(id="a"), series={"train/loss": [(1, 3.0), (2, 2.0)]}, alarms=(), notes=(), status="done",
        ...              step=2, time_s=0.5, recent=(), damaged=())
        >>> record_of(run).loss
        Loss(initial=3.0, final=2.0, curve=[(1, 3.0), (2, 2.0)])
    """
    header, status = stream.header, stream.status
    known: RunStatus = status if status in ("done", "diverged") else "failed"
    signals = {key: _curve(series, SIGNAL_POINTS) for key, series in stream.series.items() if key != LOSS}
    return Record(
        id=_file_name(header.id), config={k: _number(v) for k, v in header.config.items()}, status=known,
        steps=stream.step, loss=_loss(stream.series.get(LOSS, []), known), signals=signals,
        environment=header.environment | {"loss": f"{LOSS} of single steps, not held out"}, time_s=stream.time_s,
        parameters=header.parameters, reason=reason or _reason(stream),
    )  # fmt: skip


def save_record(folder: Path | str, *, reason: str = "") -> Record:
    """Write the record of a run's folder to `<folder>/records/<id>.json`, where `load_records` finds it.

    Args:
        folder: with `stream.jsonl` in it.
        reason: as in `record_of`.

    Raises:
        FolderError: if there is no stream.
        OSError: if the file system refuses.
    """
    record = record_of(load_stream(folder, points=LOSS_POINTS), reason=reason)
    records = Path(folder) / "records"
    records.mkdir(exist_ok=True)
    write_record(records, record)
    return record


def _loss(series: Series, status: RunStatus) -> Loss:
    if not series:
        return Loss()
    (first, initial), (_, final) = series[0], series[-1]
    ended = status == "done" and math.isfinite(final)
    started = first <= 1 and math.isfinite(initial)  # the loss of step 1 is that before the first update
    return Loss(initial=initial if started else None, final=final if ended else None, curve=_curve(series, LOSS_POINTS))


def _curve(series: Series, limit: int) -> Curve:
    return [(step, value if math.isfinite(value) else None) for step, value in thin(series, limit)]


def _reason(stream: Stream) -> str:
    if stream.status == "running":
        return f"it has not said that it ended; its last step is {stream.step}"
    critical = [a for a in stream.alarms if a.severity == "critical"]
    why = f"; {critical[0].name} at step {critical[0].step}: {critical[0].message}" if critical else ""
    return "" if stream.status == "done" else f"{stream.status} at step {stream.step}{why}"


def _file_name(id: str) -> str:
    """The id where it is a plain file name, else its hash."""
    return id if _NAME.fullmatch(id) else hashlib.sha256(id.encode("utf-8", "replace")).hexdigest()[:16]


def _number(value: str | int | float | bool | None) -> str | int | float | bool | None:
    return float(value) if isinstance(value, str) and value in ("inf", "-inf", "nan") else value
