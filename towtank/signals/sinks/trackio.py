"""Trackio as a sink."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from towtank.record.lines import End
from towtank.signals.alarm import Alarm
from towtank.signals.sinks.sink import described, load


class Trackio:
    """Readings as metrics; alarms, notes and the end as alerts.

    Args:
        run: an existing run, which stays open; by default a new one.
        **options: of `trackio.init` for a new one: `project` (by default "towtank"), `name`, `config`, ...

    Raises:
        ImportError: if trackio is not installed.
    """

    def __init__(self, run: Any = None, **options: Any) -> None:
        library = load("trackio", "trackio")
        self._level = library.AlertLevel
        self._own = run is None
        self.run = library.init(**{"project": "towtank", **options}) if run is None else run

    def write(self, step: int, time_s: float, readings: Mapping[str, float]) -> None:
        """Log the readings of a step."""
        self.run.log(dict(readings), step=step)

    def alarm(self, alarm: Alarm) -> None:
        """Send an alert."""
        level = self._level.ERROR if alarm.severity == "critical" else self._level.WARN
        self.run.alert(alarm.name, described(alarm), level=level, step=alarm.step)

    def note(self, step: int, probe: str, text: str) -> None:
        """Send an alert of the lowest level."""
        self.run.alert(f"note of {probe}", text, level=self._level.INFO, step=step)

    def close(self, status: End = "done") -> None:
        """Finish a run of our own."""
        if self._own:
            self.run.finish()
