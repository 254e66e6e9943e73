"""The run folder as a sink: the stream while the run goes on, and its record when it ends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from towtank.record.lines import End
from towtank.record.stream import FILE, StreamWriter, save_record
from towtank.signals.alarm import Alarm


class JSONL:
    """Writes `<folder>/stream.jsonl`, and at the end `<folder>/records/<id>.json`.

    Args:
        folder: of the run; made where it is missing. `towtank watch FOLDER` shows it.
        **run: what the first line says: `config`, `environment`, `parameters`, `id`; see `StreamWriter`.

    Raises:
        FolderError: if another process writes there, or nobody can.

    Example:
        >>> import tempfile
        >>> from towtank.record.record import load_records
        >>> folder = tempfile.TemporaryDirectory()
        >>> sink = JSONL(folder.name, config={"lr": 0.1})
        >>> sink.write(1, 0.5, {"train/loss": 2.0})
        >>> sink.close("done")
        >>> load_records(folder.name)[0][0].loss.final
        2.0
        >>> folder.cleanup()
    """

    def __init__(self, folder: Path | str, **run: Any) -> None:
        self.folder = Path(folder)
        self._writer = StreamWriter(self.folder / FILE, **run)
        self._closed = False

    def write(self, step: int, time_s: float, readings: Mapping[str, float]) -> None:
        """Append the readings of a step."""
        self._writer.step(step, time_s, readings)

    def alarm(self, alarm: Alarm) -> None:
        """Append an alarm."""
        self._writer.alarm(alarm.to_json() | {"value": alarm.value, "limit": alarm.limit})

    def note(self, step: int, probe: str, text: str) -> None:
        """Append a note."""
        self._writer.note(step, probe, text)

    def close(self, status: End = "done") -> None:
        """Append the end and write the run's record; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._writer.close(status)
        save_record(self.folder)
