"""One run, one file: the record is there, or the run is not done."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

SCHEMA = 1
Scalar = str | int | float | bool | None
RunStatus = Literal["done", "diverged", "failed", "oom"]
Stage = Literal["grid", "refine", "verify"]
Curve = list[tuple[int, float | None]]


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out loss of a run in nats: before the first step, after the last (None if diverged), and in between."""

    initial: float | None = None
    final: float | None = None
    curve: Curve = []


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """One run: what was asked, what came out, where and with what it was measured."""

    id: str
    config: dict[str, Scalar]
    status: RunStatus
    steps: int
    loss: Loss
    signals: dict[str, Curve] = {}
    corpus: str = ""
    environment: dict[str, Scalar] = {}
    time_s: float = 0.0
    stage: Stage = "grid"
    study: str = ""
    parameters: int | None = None
    reason: str = ""
    schema: int = SCHEMA
    checksum: str = ""
