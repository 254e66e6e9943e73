"""Batches: what counts as one, how a source of them is read, compared, merged and split.

A raw batch is a tuple or list (inputs, ..., targets), or a mapping with its targets under "labels" or "targets".
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import data as torch_data
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_TARGET_KEYS = ("labels", "targets")
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One batch, ready to be measured.

    Args:
        raw: the batch as the data source gave it, on the device of the model, half precision widened to float32.
        targets: what the loss compares the outputs with.
        weight: share of this batch in the full loss; the weights of all batches sum to 1.
        index: its place in the data source.
        count: number of loss terms that its mean runs over.
    """

    raw: Any
    targets: Any
    weight: float
    index: int
    count: float


def is_batch(x: Any) -> bool:
    """Whether `x` is one batch rather than a source of batches.

    Mappings and tuples are batches; a list is one if its elements are tensors, as default collation makes it.
    """
    if isinstance(x, list):
        return bool(x) and all(isinstance(e, Tensor) for e in x)
    return is_mapping(x) or isinstance(x, tuple)


def is_mapping(x: Any) -> bool:
    """Whether `x` maps names to tensors, as batches for Hugging Face models do."""
    return isinstance(x, Mapping)


def target_key(raw: Mapping[str, Any]) -> str | None:
    """The key of the targets in a mapping, or None."""
    return next((k for k in _TARGET_KEYS if k in raw), None)


def check_source(data: Any) -> None:
    """Refuse, without reading anything, sources that cannot give the same batches twice.

    Raises:
        TypeError: if it is no source of batches.
        ValueError: if it can be read only once, or shuffles.
    """
    if is_batch(data):
        return
    if isinstance(data, torch_data.Dataset) and not isinstance(data, torch_data.IterableDataset):
        raise TypeError("expected batches, got a Dataset of single examples; wrap it in a DataLoader(batch_size=...)")
    if isinstance(data, Tensor | str | bytes | torch.nn.Module) or not hasattr(type(data), "__iter__"):
        raise TypeError(
            f"expected a batch (inputs, targets), a mapping, or an iterable of them, got {type(data).__name__}"
        )
    if isinstance(data, Iterator):
        raise ValueError(
            f"expected data that can be read many times, got a one-shot {type(data).__name__}; "
            "give list(data), or an object whose __iter__ starts anew"
        )
    if isinstance(data, torch_data.DataLoader) and isinstance(data.sampler, torch_data.RandomSampler):
        raise ValueError(
            "expected the same batches in every pass, got a DataLoader with shuffle=True; "
            "use shuffle=False, or list(loader) to freeze one order"
        )


def generators(data: Any) -> list[torch.Generator]:
    """The random generators of a data loader, which reading it must not move."""
    sampler = getattr(data, "sampler", None)
    places = (data, sampler, getattr(data, "dataset", None), getattr(sampler, "data_source", None))
    found = [getattr(place, "generator", None) for place in places]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def listed(data: Any) -> list[Any] | None:
    """The raw batches where they lie in memory (one batch, or a list of them), else None."""
    if is_batch(data):
        return [data]
    return data if isinstance(data, list) else None


def check_batch(raw: Any, index: int) -> None:
    """Refuse what is no batch.

    Raises:
        TypeError: naming the batch and what it is.
    """
    if is_mapping(raw) or (isinstance(raw, tuple | list) and len(raw) >= 2):
        return
    size = f" of length {len(raw)}" if isinstance(raw, tuple | list) else ""
    raise TypeError(f"expected (inputs, targets) or a mapping as batch {index}, got a {type(raw).__name__}{size}")


def measured(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A detached tensor in the dtype of measurement: `dtype`, or its own with half precision widened to float32."""
    if x.dtype.is_floating_point:
        x = x.to(dtype or (torch.float32 if x.dtype in _HALF else x.dtype))
    x = x.detach()
    return x.clone() if x.is_inference() else x


def prepared(raw: Any, device: torch.device | None, dtype: torch.dtype | None) -> Any:
    """The batch on the device (None: where it is), detached, in the dtype of measurement."""

    def one(x: Any) -> Any:
        x = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
        return measured(x if device is None else x.to(device), dtype) if isinstance(x, Tensor) else x

    return tree_map(one, _plain(raw))


def digest(raw: Any) -> int:
    """Checksum of everything in a batch, for comparing two passes over the data."""
    leaves, tree = tree_flatten(_plain(raw))
    value = zlib.crc32(str(tree).encode())
    for x in leaves:
        if isinstance(x, Tensor):
            value = zlib.crc32(f"{x.dtype}{tuple(x.shape)}".encode(), value)
            x = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        elif not isinstance(x, np.ndarray):
            x = repr(x).encode() if isinstance(x, str | int | float | None) else b"?"
        value = zlib.crc32(np.ascontiguousarray(x).data if isinstance(x, np.ndarray) else x, value)
    return value


def examples(raw: Any) -> int | None:
    """Number of examples: the leading dimension that all tensors of the batch share, or None."""
    tensors = _tensors(raw)
    sizes = {x.shape[0] if x.ndim else None for x in tensors}
    return sizes.pop() if len(sizes) == 1 else None


def _plain(raw: Any) -> Any:
    return dict(raw) if is_mapping(raw) else raw  # the trees of torch know dict, not every mapping


def _tensors(raw: Any) -> list[Tensor]:
    return [x for x in tree_flatten(_plain(raw))[0] if isinstance(x, Tensor)]


def cut(raw: Any, count: int) -> Any | None:
    """The first examples of a batch, or None where tensors do not tell.

    Leading dimensions may be multiples of the number of examples, as those of targets flattened over tokens are.
    """
    sizes = [x.shape[0] if x.ndim else 0 for x in _tensors(raw)]
    n = min(sizes, default=0)
    if n < count or any(s % n for s in sizes):
        return None
    return tree_map(lambda x: x[: count * (x.shape[0] // n)] if isinstance(x, Tensor) else x, _plain(raw))


def part(raw: Any, start: int, stop: int) -> Any:
    """Examples `start` to `stop` of a batch whose tensors share their leading dimension."""
    return tree_map(lambda x: x[start:stop] if isinstance(x, Tensor) else x, _plain(raw))


def merged(a: Any, b: Any) -> Any | None:
    """Two batches as one, or None where their shapes do not allow it."""
    if examples(a) is None or examples(b) is None:
        return None
    (xs, tree), (ys, other) = (tree_flatten(dict(r) if is_mapping(r) else r) for r in (a, b))
    if tree != other:
        return None
    both = []
    for x, y in zip(xs, ys):
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            if x.shape[1:] != y.shape[1:] or x.dtype != y.dtype:
                return None
            both.append(torch.cat([x, y]))
        else:
            both.append(x)
    return tree_unflatten(both, tree)


def terms(loss: Callable[..., Any], targets: Any, raw: Any) -> float:
    """The number of terms that a mean loss runs over, as far as targets tell.

    For class indices it is the number of targets that are not `ignore_index` (of the loss, default -100), or the sum of their
    class weights; for other targets the number of their elements, or without any the number of examples.

    Raises:
        ValueError: if the targets do not tell.

    Example:
        >>> terms(torch.nn.functional.cross_entropy, torch.tensor([3, -100, 1]), None)
        2.0
    """
    if not isinstance(targets, Tensor):
        count = examples(raw)
        if count is None:
            raise ValueError(
                f"expected targets that tell how many terms the loss averages, got {type(targets).__name__}; give weight="
            )
        return float(count)
    if targets.is_floating_point() or targets.dtype == torch.bool:
        return float(targets.numel())
    keywords = getattr(loss, "keywords", {})
    valid = targets[targets != keywords.get("ignore_index", getattr(loss, "ignore_index", -100))]
    weights = keywords.get("weight", getattr(loss, "weight", None))
    index_loss = bool(keywords) or isinstance(loss, torch.nn.CrossEntropyLoss | torch.nn.NLLLoss)
    if index_loss and isinstance(weights, Tensor):
        return float(weights.detach().double().cpu()[valid.cpu()].sum())
    return float(valid.numel())


def read(data: Any, guard: Callable[[], Any] = nullcontext) -> Iterator[Any]:
    """The raw batches of a source, each taken inside `guard()`."""
    in_memory = listed(data)
    if in_memory is not None:
        yield from in_memory
        return
    with guard():
        source = iter(data)
    while True:
        with guard():
            try:
                raw = next(source)
            except StopIteration:
                return
        yield raw
