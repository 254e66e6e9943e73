"""A task that costs nothing: losses from a formula, so that sweeps can be tested without torch.

The learning rate with the least loss is 0.1 / width; a rate above 0.5 diverges.
"""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Result:
    """As `towtank.train.cells.Result`."""

    status: str
    steps: int
    reason: str = ""
    initial: float | None = None
    final: float | None = None
    curve: list = field(default_factory=list)
    signals: dict = field(default_factory=dict)
    time_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Description:
    """As `towtank.train.cells.Description`."""

    corpus: str
    parameters: int
    member_bytes: int
    flops_per_step: float


def bowl(
    *, width: int, depth: int = 2, kind: str = "plain", sleep: float = 0.0, trace: str = "", fault: str = ""
) -> None:
    """A task function: only its signature is used.

    Args:
        width: size.
        depth: of no consequence.
        kind: of no consequence.
        sleep: seconds an ensemble takes.
        trace: file to which each trained member adds a line.
        fault: what goes wrong; see `work`.
    """


TASK = "light_task:bowl"


def describe(cell: dict) -> Description:
    """Describe a cell, refusing odd widths as a task would."""
    if cell["width"] % 2:
        raise ValueError(f"width = {cell['width']}: expected a multiple of 2")
    return Description(
        corpus="light", parameters=cell["width"] ** 2, member_bytes=cell["width"], flops_per_step=cell["width"]
    )


def work(cells: list[dict], *, device: str = "cpu", on_step=None) -> list[Result]:
    """Train nothing; leave a trace; go wrong as the cells' `fault` says."""
    cell = cells[0]
    if cell["trace"]:
        with open(cell["trace"], "a") as file:
            file.writelines(f"{c['width']} {c['lr']} {c['seed']} {os.getpid()}\n" for c in cells)
    if cell["fault"]:
        _go_wrong(cell["fault"], cells)
    for _ in range(10):
        time.sleep(cell["sleep"] / 10)
        if on_step:
            on_step(1, len(cells))
    return [_result(c) for c in cells]


def loss(cell: dict) -> float:
    """Held-out loss of a cell: a parabola in log2 of the rate, best at 0.1 / width."""
    away = math.log2(cell["lr"] * cell["width"] / 0.1)
    noise = 0.001 * math.sin(17 * cell["seed"] + 3 * away)
    return 2.0 + 0.02 * away**2 + 1.0 / cell["width"] + noise


def _result(cell: dict) -> Result:
    if cell["lr"] > 0.5:
        return Result(
            status="diverged", steps=3, reason="loss is NaN at step 3", initial=5.5, curve=[(0, 5.5), (3, math.nan)]
        )
    final = loss(cell)
    steps = int(cell["steps"])
    curve = [(0, 5.5), (steps, final)]
    signals = {"attention_logit_max": [(0, 1.0), (steps, 10.0 * cell["width"] * cell["lr"])]}
    return Result(status="done", steps=steps, initial=5.5, final=final, curve=curve, signals=signals, time_s=0.01)


def _go_wrong(fault: str, cells: list[dict]) -> None:
    """`kill-once:FILE` kills its process unless FILE is there; `kill`; `raise`; `oom:N` if more than N members."""
    kind, _, argument = fault.partition(":")
    if kind == "kill-once" and not Path(argument).exists():
        Path(argument).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "raise":
        raise RuntimeError("the task\nis broken")
    if kind == "oom" and len(cells) > int(argument):
        raise MemoryError("not enough of it")
