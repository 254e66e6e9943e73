"""Know how a network will train before you pay for the big run.

Names here are imported on first use, so that `import towtank` stays light:

    Study, load_study, sweep    a study and how to run it
    load_records                the records of a folder
    answer, predict             from records to the answer, or to a learning rate at a size
    Task                        what a task function returns
    Interval, Verdict           what a number is
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from towtank.estimate import Interval, Verdict
    from towtank.report.answer import answer, predict
    from towtank.study.config import Study
    from towtank.study.load import load_study
    from towtank.study.record import load_records
    from towtank.study.run import sweep
    from towtank.train.task import Task

__version__ = "0.1.0"
__all__ = ["Interval", "Study", "Task", "Verdict", "answer", "load_records", "load_study", "predict", "sweep"]

_HOME = {
    "Interval": "estimate",
    "Verdict": "estimate",
    "answer": "report.answer",
    "predict": "report.answer",
    "Study": "study.config",
    "load_study": "study.load",
    "load_records": "study.record",
    "sweep": "study.run",
    "Task": "train.task",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'towtank' has no attribute {name!r}")
    return getattr(importlib.import_module(f"towtank.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
