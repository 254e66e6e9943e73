"""Probes of a training step, alarms, and the monitor around anybody's loop.

    monitor = Monitor(model, optimizer, loss=loss_fn, out="runs/today")
    ...
    monitor.step(loss, batch)

A probe is a function of a `Step` to named numbers; `every`, `log_spaced` give it a cadence. `look` makes a step without a loop.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from towtank.signals.alarm import Alarm, Stop
    from towtank.signals.cadence import every, log_spaced
    from towtank.signals.defaults import default_probes, default_rules
    from towtank.signals.history import History
    from towtank.signals.monitor import Monitor
    from towtank.signals.once import look
    from towtank.signals.rules import Limit, Rule
    from towtank.signals.step import CannotTell, NotRecorded, Probe, Step

_NAMES = {
    "alarm": "Alarm Stop",
    "cadence": "every log_spaced",
    "defaults": "default_probes default_rules",
    "history": "History",
    "once": "look",
    "monitor": "Monitor",
    "rules": "Limit Rule",
    "step": "CannotTell NotRecorded Probe Step",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = [
    "Alarm",
    "CannotTell",
    "History",
    "Limit",
    "Monitor",
    "NotRecorded",
    "Probe",
    "Rule",
    "Step",
    "Stop",
    "default_probes",
    "default_rules",
    "every",
    "log_spaced",
    "look",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'towtank.signals' has no attribute {name!r}")
    return getattr(importlib.import_module(f"towtank.signals.{_HOME[name]}"), name)
