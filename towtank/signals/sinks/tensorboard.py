"""TensorBoard as a sink."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from towtank.record.lines import End
from towtank.signals.alarm import Alarm
from towtank.signals.sinks.sink import described, load


class TensorBoard:
    """Scalars by their keys; alarms and notes on the text page.

    TensorBoard keeps 32-bit numbers, and draws NaN and infinity as marks.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter` or one like it, which stays open; or the folder for a new one
            (by default, TensorBoard's own choice below `runs/`).

    Raises:
        ImportError: if there is no writer given, and TensorBoard is not installed.
    """

    def __init__(self, writer: Any = None) -> None:
        self._own = writer is None or isinstance(writer, str | Path)
        if self._own:
            load("tensorboard", "tensorboard")
            writer = load("torch.utils.tensorboard", "tensorboard").SummaryWriter(writer and str(writer))
        self.writer: Any = writer

    def write(self, step: int, time_s: float, readings: Mapping[str, float]) -> None:
        """Add the readings of a step as scalars."""
        for key, value in readings.items():
            self.writer.add_scalar(key, value, step)

    def alarm(self, alarm: Alarm) -> None:
        """Add an alarm as text."""
        self.writer.add_text(f"alarm/{alarm.name}", f"**{alarm.severity}** {described(alarm)}", alarm.step)
        self.writer.flush()

    def note(self, step: int, probe: str, text: str) -> None:
        """Add a note as text."""
        self.writer.add_text(f"note/{probe}", text, step)

    def close(self, status: End = "done") -> None:
        """Close a writer of our own, flush a given one."""
        if self._own:
            self.writer.close()
        else:
            self.writer.flush()
