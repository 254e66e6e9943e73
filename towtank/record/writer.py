"""Who writes a stream: every line is one write to a file opened for appending.

Lines reach the operating system at once, so that they survive the death of their process; they are synced to the disk when
the run ends, so that power failure can cost the last seconds.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from towtank.record.errors import FolderError, NewerRecordError, plain
from towtank.record.lines import SCHEMA, End, Run, encode_line, read_stream, scalars, split_nonfinite
from towtank.record.record import canonical


class StreamWriter:
    """Appends the lines of one run; a context manager.

    The same run again (the same `id`) goes on in its file: a torn last line is cut off. The file of another run is set aside
    as `stream-<its id>.jsonl`.

    Args:
        path: the file, usually `<folder>/stream.jsonl`; missing folders are made.
        config: what the run was asked to do, as flat scalars.
        environment: where and with what it runs.
        parameters: number of trained parameters.
        id: of the run; by default the hash of its configuration.

    Raises:
        FolderError: if another process writes this file, or it cannot be written.
        NewerRecordError: if a later towtank wrote it.

    Example:
        >>> import tempfile
        >>> from towtank.record.stream import load_stream
        >>> folder = tempfile.TemporaryDirectory()
        >>> with StreamWriter(Path(folder.name) / "stream.jsonl", config={"lr": 0.1}) as writer:
        ...     writer.step(1, 0.5, {"train/loss": 2.0})
        >>> load_stream(folder.name).series
        {'train/loss': [(1, 2.0)]}
        >>> folder.cleanup()
    """

    def __init__(
        self, path: Path | str, *, config: Mapping[str, Any] | None = None, environment: Mapping[str, Any] | None = None,
        parameters: int | None = None, id: str | None = None,
    ) -> None:  # fmt: skip
        self.path = Path(path)
        told = scalars(config or {})
        self.id = id or hashlib.sha256(canonical(told).encode()).hexdigest()[:16]
        self._file: int | None = None
        self._step = 0
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"), thread_local=False)
        self._acquire()
        try:
            self.resumed = _make_way(self.path, self.id)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            run = {
                "schema": SCHEMA,
                "kind": "run",
                "id": self.id,
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            where = {"host": socket.gethostname(), "pid": os.getpid()}
            self._append(run | where | {
                "parameters": parameters, "config": told, "environment": scalars(environment or {}),
            })  # fmt: skip
        except OSError as error:
            self._release()
            raise FolderError(_unusable(self.path, error)) from None
        except NewerRecordError:
            self._release()
            raise

    def step(self, step: int, time_s: float, readings: Mapping[str, float]) -> None:
        """Append the readings of a step.

        Args:
            step: optimizer steps so far.
            time_s: seconds since this process began to train.
            readings: {key: number}; NaN and infinity are kept by name.

        Raises:
            OSError: if the disk is full; the file then ends with its last whole line.
        """
        finite, lost = split_nonfinite(readings)
        line = {"kind": "step", "step": int(step), "time_s": round(float(time_s), 6), "readings": finite}
        self._append(line | ({"nonfinite": lost} if lost else {}))
        self._step = int(step)

    def alarm(self, fields: Mapping[str, Any]) -> None:
        """Append an alarm, given as its fields: at least `step` and `name`.

        Raises:
            OSError: if the disk is full.
        """
        numbers = {k: fields[k] for k in ("value", "limit") if isinstance(fields.get(k), float)}
        finite, lost = split_nonfinite(numbers)
        self._append({"kind": "alarm", **fields, **finite} | ({"nonfinite": lost} if lost else {}))

    def note(self, step: int, probe: str, text: str) -> None:
        """Append what a probe has to say in words.

        Raises:
            OSError: if the disk is full.
        """
        self._append({"kind": "note", "step": int(step), "probe": probe, "text": text})

    def close(self, status: End = "done") -> None:
        """Append the end, sync to the disk, let others write; a second call does nothing.

        Raises:
            OSError: if the disk is full; the file is closed all the same.
        """
        if self._file is None:
            return
        try:
            self._append({"kind": "end", "step": self._step, "status": status})
            os.fsync(self._file)
        finally:
            self._release()

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt | SystemExit)
        self.close("stopped" if stopped else "failed" if kind else "done")

    def _append(self, content: Mapping[str, Any]) -> None:
        if self._file is None:
            raise ValueError(f"expected an open stream, got {self.path} after close(); make a new writer")
        line = encode_line(content)
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written < len(line):  # the disk is full, or a limit is reached
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, size)
            raise

    def _acquire(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            lock = plain(self._lock.lock_file)
            raise FolderError(
                f"{plain(str(self.path))} is being written: lock file {lock} is held by {_writer(self.path)}; "
                "give each run, and each process of a run, its own folder"
            ) from None
        except (OSError, ValueError) as error:
            raise FolderError(_unusable(self.path, error)) from None

    def _release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
        self._lock.release()


def _make_way(path: Path, id: str) -> bool:
    """Leave a file that can be appended to; returns whether it holds the beginning of this run."""
    if not path.exists() or not path.stat().st_size:
        return False
    entries, _ = read_stream(path, limit=1)
    first = entries[0] if entries else None
    if isinstance(first, Run) and first.id == id:
        _cut_torn_line(path)
        return True
    if first is None and path.read_bytes()[:10] == b'{"schema":':  # a first line that was never finished
        os.truncate(path, 0)
        return False
    _set_aside(path, first.id if isinstance(first, Run) else "damaged")
    return False


def _cut_torn_line(path: Path) -> None:
    with open(path, "r+b") as file:
        at = file.seek(0, os.SEEK_END)
        while at:
            begin = max(0, at - 65536)
            file.seek(begin)
            newline = file.read(at - begin).rfind(b"\n")
            if newline >= 0:
                file.truncate(begin + newline + 1)
                return
            at = begin


def _set_aside(path: Path, name: str) -> None:
    safe = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:40] or "run"
    number = 1
    while (to := path.with_name(f"{path.stem}-{safe}{f'-{number}' if number > 1 else ''}{path.suffix}")).exists():
        number += 1
    path.rename(to)


def _writer(path: Path) -> str:
    try:
        runs = [entry for entry in read_stream(path)[0] if isinstance(entry, Run)]
    except (OSError, FolderError):
        runs = []
    return plain(f"process {runs[-1].pid} on host {runs[-1].host}") if runs else "another process"


def _unusable(path: Path, error: Exception) -> str:
    why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"{plain(str(path))}: expected a file that can be written, got: {plain(why)}; give another folder"
