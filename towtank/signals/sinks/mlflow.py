"""MLflow as a sink."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from towtank.record.lines import End
from towtank.signals.alarm import Alarm
from towtank.signals.sinks.sink import described, load

_BATCH, _NAME, _TEXT = 1000, 250, 5000  # most metrics in a request, longest key, longest tag
_WAITING = 64  # requests under way before a step waits for the oldest
_END = {"done": "FINISHED", "stopped": "KILLED", "diverged": "FAILED", "failed": "FAILED"}


class MLflow:
    """Readings as metrics, one request a step, sent in the background; alarms and notes as tags.

    MLflow allows letters, digits and `/ _ - . : ` and spaces in keys, as long as they also are clean relative paths; what does
    not fit is replaced by `_`. Servers with a database keep infinity as the largest number. How long a server that is down may
    hold up a tag is MLflow's own setting, MLFLOW_HTTP_REQUEST_MAX_RETRIES.

    Args:
        run: an existing run (or its id), which stays open; by default a new one.
        tracking_uri: of the server or folder; by default MLflow's own choice.
        experiment: name of the experiment of a new run.
        name: of a new run.

    Raises:
        ImportError: if MLflow is not installed.
    """

    def __init__(
        self, run: Any = None, *, tracking_uri: str | None = None, experiment: str = "towtank", name: str | None = None
    ) -> None:
        self._mlflow = load("mlflow", "mlflow")
        self._entities = load("mlflow.entities", "mlflow")
        self.client = self._mlflow.MlflowClient(tracking_uri=tracking_uri)
        self._own = run is None
        if run is None:
            found = self.client.get_experiment_by_name(experiment)
            number = found.experiment_id if found else self.client.create_experiment(experiment)
            run = self.client.create_run(number, run_name=name)
        self._waiting: deque[Any] = deque()
        self.run_id: str = run if isinstance(run, str) else run.info.run_id

    def write(self, step: int, time_s: float, readings: Mapping[str, float]) -> None:
        """Log the readings of a step."""
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(mlflow_key(key), float(v), now, step) for key, v in readings.items()]
        for begin in range(0, len(metrics), _BATCH):
            sent = self.client.log_batch(self.run_id, metrics=metrics[begin : begin + _BATCH], synchronous=False)
            self._waiting.append(sent)
        while len(self._waiting) > _WAITING:
            self._waiting.popleft().wait()

    def alarm(self, alarm: Alarm) -> None:
        """Set a tag; the newest alarm of a name is kept."""
        self._tag(f"towtank.alarm.{alarm.name}", f"step {alarm.step}: {alarm.severity}: {described(alarm)}")

    def note(self, step: int, probe: str, text: str) -> None:
        """Set a tag; the newest note of a probe is kept."""
        self._tag(f"towtank.note.{probe}", f"step {step}: {text}")

    def close(self, status: End = "done") -> None:
        """Wait for what is under way, and end a run of our own."""
        try:
            while self._waiting:
                self._waiting.popleft().wait()
        finally:
            self._tag("towtank.status", status)
            if self._own:
                self.client.set_terminated(self.run_id, status=_END[status])

    def _tag(self, key: str, text: str) -> None:
        self.client.set_tag(self.run_id, mlflow_key(key), text[:_TEXT])


@lru_cache(maxsize=16384)
def mlflow_key(key: str) -> str:
    """The key as MLflow accepts it.

    Example:
        >>> mlflow_key("grad/norm"), mlflow_key("update/ratio/a[0]<b>"), mlflow_key("../a//b")
        ('grad/norm', 'update/ratio/a_0__b_', '_/a/b')
    """
    clean = re.sub(r"[^\w./ -]", "_", key)  # a colon is refused on Windows
    clean = "/".join(re.sub(r"^\.+", "_", part) for part in clean.split("/") if part) or "_"
    return clean if len(clean) <= _NAME else f"{clean[: _NAME // 2 - 2]}...{clean[1 - _NAME // 2 :]}"
