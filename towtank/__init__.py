"""Know how a network will train before you pay for the big run.

Names here are imported on first use, so that `import towtank` stays light:

    measure, landscape          one call: the curvature of a model, the loss around it
    Problem                     a model, a loss and data; makes operators:
    Hessian, GaussNewton, Fisher, NTK, Preconditioned, KFAC, EKFAC, LinearOperator
    eigsh, spectral_density, trace, diagonal, inverse_diagonal, frobenius_norm, logdet, solve
                                matrix-free algorithms on any operator
    adam_preconditioner         the diagonal of an Adam-like optimizer, for Preconditioned
    Monitor                     watch your own training loop: probes, alarms, forecasts
    Study, load_study, sweep    a study and how to run it
    load_records                the records of a folder
    answer, predict             from records to the answer, or to a learning rate at a size
    Task                        what a task function returns
    Estimate, Interval, Verdict what a number is

Scaling laws are in `towtank.laws`, optimizers in `towtank.optim`, probes in `towtank.signals`, callbacks for other people's
trainers in `towtank.integrations`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from towtank.curvature import (
        EKFAC,
        KFAC,
        NTK,
        Fisher,
        GaussNewton,
        Hessian,
        Preconditioned,
        adam_preconditioner,
        landscape,
        measure,
    )
    from towtank.estimate import Estimate, Interval, Verdict
    from towtank.linalg import (
        LinearOperator,
        diagonal,
        eigsh,
        frobenius_norm,
        inverse_diagonal,
        logdet,
        solve,
        spectral_density,
        trace,
    )
    from towtank.problem import Problem
    from towtank.record.record import load_records
    from towtank.report.answer import answer, predict
    from towtank.signals.monitor import Monitor
    from towtank.study.config import Study
    from towtank.study.load import load_study
    from towtank.study.run import sweep
    from towtank.train.task import Task

__version__ = "0.1.0"
__all__ = [
    "EKFAC",
    "KFAC",
    "NTK",
    "Estimate",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "Interval",
    "LinearOperator",
    "Monitor",
    "Preconditioned",
    "Problem",
    "Study",
    "Task",
    "Verdict",
    "adam_preconditioner",
    "answer",
    "diagonal",
    "eigsh",
    "frobenius_norm",
    "inverse_diagonal",
    "landscape",
    "load_records",
    "load_study",
    "logdet",
    "measure",
    "predict",
    "solve",
    "spectral_density",
    "sweep",
    "trace",
]
_MODULES = ("integrations", "laws", "optim", "signals")

_NAMES = {
    "curvature": "EKFAC KFAC NTK Fisher GaussNewton Hessian Preconditioned adam_preconditioner landscape measure",
    "estimate": "Estimate Interval Verdict",
    "linalg": "LinearOperator diagonal eigsh frobenius_norm inverse_diagonal logdet solve spectral_density trace",
    "problem": "Problem",
    "report.answer": "answer predict",
    "signals.monitor": "Monitor",
    "study.config": "Study",
    "study.load": "load_study",
    "record.record": "load_records",
    "study.run": "sweep",
    "train.task": "Task",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"towtank.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'towtank' has no attribute {name!r}")
    return getattr(importlib.import_module(f"towtank.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
