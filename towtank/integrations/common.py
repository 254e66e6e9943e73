"""What the integrations share: parts of a step as one loss, and a stop on which all processes agree."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from towtank.signals.alarm import Stop
from towtank.signals.monitor import Monitor


def joined(losses: Sequence[Tensor], *, mean: bool) -> Tensor | None:
    """The loss () of a step from those of its parts; None where there are none.

    Args:
        losses: of the parts (), detached.
        mean: whether each is a mean of its part, and the step's loss their mean; otherwise it is their sum.

    Example:
        >>> joined([torch.tensor(1.0), torch.tensor(3.0)], mean=True)
        tensor(2.)
    """
    if not losses:
        return None
    total = torch.stack([loss.float() for loss in losses]).sum()
    return total / len(losses) if mean else total


def stops(monitor: Monitor, loss: Tensor | None, batch: Any, *, processes: int) -> bool:
    """Look at a step; whether training has to stop after it.

    Alarms are raised in one process. Where the others go on, they wait for it for ever, so all agree after each step; where
    alarms are only logged, nothing is exchanged.

    Args:
        monitor: that is running.
        loss: of the step, or None.
        batch: of the step, or None.
        processes: that train together.
    """
    stop = False
    try:
        monitor.step(loss, batch)
    except Stop:
        stop = True
        monitor.close("stopped")
    if processes == 1 or not dist.is_initialized() or not monitor.may_stop:
        return stop
    device = next((p.device for p in monitor.model.parameters()), torch.device("cpu"))
    flag = torch.tensor(float(stop), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    if flag.item() > 0:
        monitor.close("stopped")
    return bool(flag.item() > 0)


def newest(monitor: Monitor, globs: Iterable[str]) -> dict[str, float]:
    """The newest readings whose keys match one of the globs."""
    wanted = tuple(globs)
    if not wanted:
        return {}
    return {key: points[-1][1] for key, points in monitor.history.items() if any(fnmatchcase(key, g) for g in wanted)}
