"""Batches cut into single examples, each with its share of the full loss.

M: examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from towtank.problem import Batch, Problem
from towtank.problem.data import is_mapping
from towtank.signals.step import CannotTell


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A batch cut into examples: what all share, the tensors (M, 1 or more, ...) in which they differ, and their weights.

    Args:
        batch: the whole one.
        rebuild: makes the raw batch of one example from its tensors (1 or more, ...).
        tensors: of all examples; targets flattened over tokens have as many entries an example as there are tokens.
        weights_M: w_i, with which sum w_i loss_i is M times the batch's part of the full loss, M counted over all batches.
    """

    batch: Batch
    rebuild: Callable[[list[Tensor]], Any]
    tensors: list[Tensor]
    weights_M: Tensor


def cuts(problem: Problem) -> Iterator[Cut]:
    """The examples of every batch; those that hold no loss term are left out.

    Args:
        problem: model, loss and data.

    Raises:
        CannotTell: if the tensors of a batch do not tell how many examples it has.
    """
    every = [_cut(problem, batch) for batch in problem.batches()]
    total = sum(int((cut.weights_M > 0).sum()) for cut in every)
    for cut in every:
        keep = cut.weights_M > 0
        tensors = cut.tensors if bool(keep.all()) else [t[keep] for t in cut.tensors]
        yield Cut(batch=cut.batch, rebuild=cut.rebuild, tensors=tensors, weights_M=cut.weights_M[keep] * total)


def _cut(problem: Problem, batch: Batch) -> Cut:
    raw = dict(batch.raw) if is_mapping(batch.raw) else batch.raw
    leaves, tree = tree_flatten(raw)
    places = [k for k, x in enumerate(leaves) if isinstance(x, Tensor)]
    sizes = [leaves[k].shape[0] if leaves[k].ndim else 0 for k in places]
    size = min(sizes, default=0)
    if not size or any(s % size for s in sizes):
        raise CannotTell(
            f"expected tensors whose leading dimension counts the examples of the batch, got leading dimensions {sizes}"
        )

    def rebuild(tensors: list[Tensor]) -> Any:
        filled = list(leaves)
        for k, x in zip(places, tensors, strict=True):
            filled[k] = x
        return tree_unflatten(filled, tree)

    tensors = [leaves[k].unflatten(0, (size, leaves[k].shape[0] // size)) for k in places]
    singles = (rebuild([t[i] for t in tensors]) for i in range(size))
    counts_M = torch.tensor(_counts(problem, batch, singles, size), dtype=torch.float64)
    weights_M = (batch.weight * counts_M / counts_M.sum()).to(problem.device, problem.dtype)
    return Cut(batch=batch, rebuild=rebuild, tensors=tensors, weights_M=weights_M)


def _counts(problem: Problem, batch: Batch, singles: Iterator[Any], size: int) -> list[float]:
    targets = batch.targets
    even = isinstance(targets, Tensor) and targets.numel() == batch.count and targets.numel() % size == 0
    if problem.weight is None and even:  # nothing is ignored, no class is weighted
        return [batch.count / size] * size
    return [problem.count(raw, batch.index) for raw in singles]
