"""Weights & Biases as a sink."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from towtank.record.lines import End
from towtank.signals.alarm import Alarm
from towtank.signals.sinks.sink import described, load

STEP = "towtank/step"


class WandB:
    """Readings as history, alarms as alerts, notes in the summary.

    A run of your own keeps its own step: readings are drawn over "towtank/step", so that no row is refused whatever else you
    log. Slashes in keys make the sections of a workspace; wandb can sort and filter runs only by keys of letters, digits and
    `_`.

    Args:
        run: an existing run, which stays open; by default a new one.
        **options: of `wandb.init` for a new one: `project`, `name`, `config`, `mode="offline"`, ...

    Raises:
        ImportError: if there is no run given, and wandb is not installed.
    """

    def __init__(self, run: Any = None, **options: Any) -> None:
        self._own = run is None
        self.run = load("wandb", "wandb").init(**options) if run is None else run
        self._known: set[str] = set()
        self.run.define_metric(STEP, hidden=True)

    def write(self, step: int, time_s: float, readings: Mapping[str, float]) -> None:
        """Log the readings of a step as one row."""
        for key in readings.keys() - self._known:
            self.run.define_metric(key, step_metric=STEP)
            self._known.add(key)
        self.run.log({**readings, STEP: step})

    def alarm(self, alarm: Alarm) -> None:
        """Send an alert."""
        level = "ERROR" if alarm.severity == "critical" else "WARN"
        self.run.alert(f"{alarm.name} at step {alarm.step}", described(alarm), level)

    def note(self, step: int, probe: str, text: str) -> None:
        """Put a note into the summary."""
        self.run.summary[f"towtank/note/{probe}"] = f"step {step}: {text}"

    def close(self, status: End = "done") -> None:
        """Finish a run of our own."""
        self.run.summary["towtank/status"] = status
        if self._own:
            self.run.finish(exit_code=0 if status in ("done", "stopped") else 1)
