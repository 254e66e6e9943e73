"""Parameters that processes share (DTensor, as FSDP2 makes them): how much of one a rule is shown, and putting it back.

An elementwise rule is shown this process's part, and a row-wise one too where rows are whole: no communication, and every
engine works. Any other rule is shown the whole tensor, gathered for the step from the processes that share it: each of
them then takes the same step and keeps its own part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from towtank.optim.rule import Reach

if TYPE_CHECKING or dist.is_available():
    from torch.distributed.tensor import DTensor, Replicate, Shard
else:  # a build of PyTorch without torch.distributed has no such tensors

    class DTensor:  # noqa: D101
        pass


def whole(t: Tensor) -> Tensor:
    """All of a tensor, gathered from the processes that share it."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def mine(t: Tensor) -> Tensor:
    """This process's part of a tensor; to write to it is to write to the tensor."""
    return t.to_local() if isinstance(t, DTensor) else t


def cut_too_far(reach: Reach, param: Tensor) -> bool:
    """Whether a rule of this reach needs more of a parameter than this process has."""
    if reach == "element" or not isinstance(param, DTensor):
        return False
    dims = _cut_dims(param)
    return bool(dims) and (reach == "tensor" or dims != {0})


def shared_out(t: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, cut as another one is where the two agree in size, else as it is."""
    if not isinstance(like, DTensor) or isinstance(t, DTensor):
        return t
    if not all(d < t.ndim and t.shape[d] == like.shape[d] for d in _cut_dims(like)) or not t.ndim:
        return t
    copies = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(t, like.device_mesh, copies, run_check=False).redistribute(placements=like.placements)


def alike(grad: Tensor, param: Tensor) -> Tensor:
    """A gradient cut as its parameter is.

    Raises:
        TypeError: for a plain gradient of a shared parameter.
    """
    if not isinstance(param, DTensor):
        return grad
    if not isinstance(grad, DTensor):
        raise TypeError("expected the gradient of a DTensor to be one, got a plain tensor; use DTensor.from_local")
    return grad if grad.placements == param.placements else grad.redistribute(placements=param.placements)


def counted_everywhere(counts: Sequence[int], params: Sequence[Tensor], reach: Reach) -> list[int]:
    """Counts per parameter, added up over the processes where each has seen its part only."""
    parts = [i for i, p in enumerate(params) if _cut_dims(p) and not cut_too_far(reach, p)]
    told = list(counts)
    for mesh in {p.device_mesh for p in (params[i] for i in parts) if isinstance(p, DTensor)}:
        here = [i for i in parts if params[i].device_mesh == mesh]  # pyright: ignore[reportAttributeAccessIssue]
        sums = torch.tensor([counts[i] for i in here], device=mesh.device_type)
        for dim in range(mesh.ndim):
            dist.all_reduce(sums, group=mesh.get_group(dim))
        for i, n in zip(here, sums.tolist(), strict=True):
            told[i] = n // _copies(params[i])
    return told


def _cut_dims(t: Tensor) -> set[int]:
    return {p.dim for p in t.placements if isinstance(p, Shard)} if isinstance(t, DTensor) else set()


def _copies(t: Tensor) -> int:
    """How many processes have each number."""
    assert isinstance(t, DTensor)
    return math.prod(t.device_mesh.size(d) for d, p in enumerate(t.placements) if not isinstance(p, Shard))
