"""The monitor in other people's loops; each name needs its library, and is imported on first use.

HFMonitor          a callback of `transformers.Trainer`
LightningMonitor   a callback of `lightning.Trainer`
AccelerateMonitor  the monitor beside an `accelerate.Accelerator`
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from towtank.integrations.accelerate import AccelerateMonitor
    from towtank.integrations.hugging_face import HFMonitor
    from towtank.integrations.lightning import LightningMonitor

__all__ = ["AccelerateMonitor", "HFMonitor", "LightningMonitor"]

_HOME = {"AccelerateMonitor": "accelerate", "HFMonitor": "hugging_face", "LightningMonitor": "lightning"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'towtank.integrations' has no attribute {name!r}")
    return getattr(importlib.import_module(f"towtank.integrations.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
