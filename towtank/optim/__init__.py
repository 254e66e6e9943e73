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
    "Fira": "fira.RULE",
    "GaLore": "galore.RULE",
    "Lion": "lion.RULE",
    "MFAC": "mfac.RULE",
    "Muon": "muon.RULE",
    "Nero": "nero.RULE",
    "SCALE": "scale.RULE",
    "SGD": "sgd.RULE",
    "SGDP": "sgdp.RULE",
    "SGDSaI": "sgd_sai.RULE",
    "SNTASGD": "snt_asgd.RULE",
    "SophiaG": "sophia.G",
    "SophiaH": "sophia.H",
}

# what goes with them -> its module
COMPANIONS = {
    "gauss_newton_bartlett_diagonal": "diagonals",
    "hutchinson_diagonal": "diagonals",
    "newton": "newton",
    "param_groups": "groups",
    "roles": "groups",
    "compensated": "transforms",
    "orthograd": "transforms",
    "quantized": "transforms",
    "rounded": "transforms",
    "stochastic": "transforms",
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
    from towtank.optim.classes import optimizer_class

    return optimizer_class(name, rule_of(name))


def __getattr__(name: str) -> Any:
    if name in OPTIMIZERS:
        return _class(name)
    if name in COMPANIONS:
        return getattr(importlib.import_module(f"towtank.optim.{COMPANIONS[name]}"), name)
    raise AttributeError(f"module 'towtank.optim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *OPTIMIZERS, *COMPANIONS])
