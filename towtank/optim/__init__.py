"""Optimizers as torch knows them, each made of one pure rule: `towtank.optim.Lion(model.parameters(), lr=3e-4)`."""

from __future__ import annotations

import functools
import importlib
from typing import Any

# public name -> module of towtank.optim.rules (and the name of its rule there)
OPTIMIZERS = {
    "AdaBelief": "adabelief.RULE",
    "AdaHessian": "adahessian.RULE",
    "AdamP": "adamp.RULE",
    "AdamW": "adamw.RULE",
    "DiffGrad": "diffgrad.RULE",
    "EXAdam": "exadam.RULE",
    "Lion": "lion.RULE",
    "Nero": "nero.RULE",
    "SCALE": "scale.RULE",
    "SGD": "sgd.RULE",
    "SGDP": "sgdp.RULE",
    "SGDSaI": "sgd_sai.RULE",
    "SophiaG": "sophia.G",
    "SophiaH": "sophia.H",
}


@functools.cache
def rule_of(name: str) -> Any:
    """The rule behind a public name, such as `Lion`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r}: expected one of {', '.join(OPTIMIZERS)}")
    module, attribute = OPTIMIZERS[name].split(".")
    return getattr(importlib.import_module(f"towtank.optim.rules.{module}"), attribute)


@functools.cache
def _class(name: str) -> type:
    from towtank.optim.optimizer import optimizer_class

    return optimizer_class(name, rule_of(name))


def __getattr__(name: str) -> Any:
    if name in OPTIMIZERS:
        return _class(name)
    raise AttributeError(f"module 'towtank.optim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *OPTIMIZERS])
