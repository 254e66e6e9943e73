"""Numbers of a step on their way from the device to the history."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from towtank.signals.step import Step


def basics(step: Step, norm: Tensor | None, *, told: bool) -> Iterator[tuple[str, Any]]:
    """What every step tells; `norm` where the gradient norm is known already, `told` whether the loss is."""
    if told:
        yield "train/loss", step.loss
    if step.optimizer is not None:
        yield "train/lr", step.lr
    norm = gradient_norm(step.model) if norm is None else norm
    if norm is not None:
        yield "grad/norm", norm


def gradient_norm(model: nn.Module) -> Tensor | None:
    """Norm () of all gradients together, as the optimizer finds them; None where there are none."""
    found = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    if not found:
        return None
    each = norms(found)
    return torch.linalg.vector_norm(torch.stack([n.to(each[0].device, torch.float32) for n in each]))


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Norm () of each tensor in few kernels; of half precision in float32, since squares leave its range."""
    dense = [x.coalesce().values() if x.is_sparse else x for x in (t.detach() for t in tensors)]
    wide = [x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in dense]
    return list(torch._foreach_norm(wide)) if wide else []  # pyright: ignore[reportPrivateImportUsage]


def numbers(found: Any) -> dict[str, float | Tensor]:
    """What a probe returned, if it is what a probe may return.

    Raises:
        TypeError: if it is no mapping of names to numbers.
    """
    if not isinstance(found, Mapping):
        raise TypeError(f"expected a mapping of names to numbers, got {type(found).__name__}")
    for key, value in found.items():
        single = isinstance(value, Tensor) and value.numel() == 1
        if not isinstance(key, str) or not (single or hasattr(value, "__float__")) or isinstance(value, str):
            raise TypeError(f"expected a name and a single number, got {key!r}: {type(value).__name__}")
    return {k: v if isinstance(v, Tensor) else float(v) for k, v in found.items()}


def floats(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Readings as numbers: every tensor of every row is brought over in one transfer a device."""
    there = lambda v: isinstance(v, Tensor) and v.device.type != "cpu"  # noqa: E731
    places = [(i, k, v) for i, row in enumerate(rows) for k, v in row.items() if there(v)]
    found = [{k: math.nan if there(v) else float(v) for k, v in row.items()} for row in rows]
    for device in {v.device for _, _, v in places}:
        here = [p for p in places if p[2].device == device]
        values = torch.stack([v.detach().reshape(()).double() for _, _, v in here]).tolist()
        for (i, k, _), value in zip(here, values, strict=True):
            found[i][k] = value
    return found
