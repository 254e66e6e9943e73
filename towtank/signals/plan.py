"""What a monitor is going to cost, probe by probe, and what a run is called."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from towtank.problem import Problem
from towtank.record.record import canonical
from towtank.signals.cadence import Slot, attribute
from towtank.signals.clock import Clock


def plan(slots: Sequence[Slot], clock: Clock, budget: float, problem: Problem | None) -> str:
    """A table of probes: cadence, expected cost, what it took so far.

    Args:
        slots: the probes.
        clock: of the monitor.
        budget: share of the loop's time.
        problem: on the probe batch, by which dear probes tell their cost; None where there is none yet.
    """
    rows = [("probe", "cadence", "expected cost", "runs", "last s", "total s")]
    for slot in slots:
        cost = attribute(slot.probe, "cost")
        told = cost(problem) if cost is not None and problem is not None else None
        expected = "" if cost is None else "not known yet" if told is None else f"{told:.3g} gradients"
        rows.append((slot.name, slot.said, expected, str(slot.runs), f"{slot.last_s:.3f}", f"{slot.spent_s:.3f}"))
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(row, wide, strict=True)).rstrip() for row in rows]
    lines.append(f"rules, recording and stream: {1e3 * clock.every_s:.2f} ms of every step")
    share = f"{clock.overhead:.1%} of the loop so far" if clock.loop_s else "nothing timed yet"
    return "\n".join(
        [*lines, f"budget {budget:.1%} of the loop's time; {share}, a step of the loop {1e3 * clock.step_s:.1f} ms"]
    )


def described(model: nn.Module, optimizer: torch.optim.Optimizer | None, loss: Any) -> dict[str, Any]:
    """What a run is, as scalars for its record."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found: dict[str, Any] = {
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch.") if parameters else "none",
        "device": str(parameters[0].device) if parameters else "none",
    }
    if optimizer is not None:
        numbers = {k: v for k, v in optimizer.param_groups[0].items() if isinstance(v, int | float | bool)}
        found |= {"optimizer": type(optimizer).__name__} | {f"optimizer.{k}": v for k, v in numbers.items()}
    if loss is not None:
        found["loss"] = getattr(loss, "__name__", type(loss).__name__)
    return found


def environment() -> dict[str, Any]:
    """With what a run is made."""
    from towtank import __version__

    return {"towtank": __version__, "torch": torch.__version__, "python": platform.python_version()}


def run_id(config: dict[str, Any]) -> str:
    """A name that no other run has: the hash of its settings and of the moment it began."""
    return hashlib.sha256(f"{canonical(config)} {time.time_ns()}".encode()).hexdigest()[:16]
