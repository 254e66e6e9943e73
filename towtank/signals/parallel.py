"""Data-parallel training: which process writes, and how the parts of a step are brought together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from towtank.signals.step import MicroGradients


def rank() -> int:
    """Number of this process; 0 where there is one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world(model: nn.Module) -> int:
    """How many processes average the gradients of a model."""
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
    return dist.get_world_size() if wrapped and dist.is_initialized() else 1


def gathered(micro: MicroGradients | None) -> MicroGradients | None:
    """The parts of all processes, in the unit in which their mean is the total; None where a process has none.

    Every process of the group must call it at the same step.

    Args:
        micro: the parts of this process.
    """
    mine = None if micro is None else _plain(micro)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if micro is None or any(one is None for one in everyone):
        return None
    share = 1.0 / len(everyone) ** 2  # of a squared norm: the mean over processes is the sum of their R-th parts
    squares = tuple(
        {n: torch.tensor(x * share) for n, x in part.items()} for one in everyone for part in one["squares"]
    )
    sizes = [one["sizes"] for one in everyone]
    known = None if any(s is None for s in sizes) else tuple(n for s in sizes for n in s)
    return MicroGradients(squares=squares, sizes=known, total=micro.total)


def _plain(micro: MicroGradients) -> dict[str, Any]:
    return {"squares": [{n: float(x) for n, x in part.items()} for part in micro.squares], "sizes": micro.sizes}
