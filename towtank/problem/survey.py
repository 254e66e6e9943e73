"""The first look at the data: how many terms each batch holds, whether it is the same twice, whether weights are right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from towtank.problem import data as source
from towtank.problem import state

if TYPE_CHECKING:
    from towtank.problem.problem import Problem


@dataclass(frozen=True)
class Survey:
    """What a pass over the data found.

    Args:
        counts: number of loss terms of each batch.
        total: their sum.
        mappings: whether batches are mappings.
    """

    counts: tuple[float, ...]
    total: float
    mappings: bool


@dataclass(frozen=True)
class _Pass:
    digests: tuple[int, ...]
    counts: tuple[float, ...]
    sizes: tuple[int | None, ...]
    kept: dict[int, Any]
    mappings: bool


def survey(problem: Problem) -> Survey:
    """Read the data (twice where it is not in memory, unless told not to) and check what can be checked cheaply.

    Raises:
        ValueError: if there is no data or none that counts, if two passes differ, if batches that couple their examples would
            be averaged, or if the loss of two merged batches is not the weighted mean of theirs.
    """
    data = problem.data
    in_memory = source.listed(data) is not None
    compare = problem.checks and not in_memory
    with state.random_state(problem.device, source.generators(data)):
        first = _read(problem, seed=1, digest=compare, keep=())
        counts = first.counts
        _check_counts(problem, counts)
        pair = _extremes(counts, first.sizes) if problem.checks and _additive(problem) and len(counts) > 1 else ()
        if compare or pair:
            second = _read(problem, seed=2, digest=compare, keep=pair)
            _compare(first, second, type(data).__name__)
            if pair:
                _check_merged(problem, *(second.kept[i] for i in pair))
    return Survey(counts, math.fsum(counts), first.mappings)


def _read(problem: Problem, *, seed: int, digest: bool, keep: tuple[int, ...]) -> _Pass:
    state.seed(seed, problem.device)  # another seed a pass, so that shuffling shows
    digests, counts, sizes, kept, mappings = [], [], [], {}, False
    for i, raw in enumerate(source.read(problem.data)):
        source.check_batch(raw, i)
        ready = source.prepared(raw, None, None)
        digests.append(source.digest(raw) if digest else 0)
        counts.append(problem.count(ready, i))
        sizes.append(source.examples(ready))
        mappings |= source.is_mapping(raw)
        if i in keep:
            kept[i] = ready
    return _Pass(tuple(digests), tuple(counts), tuple(sizes), kept, mappings)


def _check_counts(problem: Problem, counts: tuple[float, ...]) -> None:
    if not counts:
        raise ValueError(
            f"expected at least one batch, got none from {type(problem.data).__name__}; "
            "if it was read before, give list(data), or an object whose __iter__ starts anew"
        )
    if not math.fsum(counts):
        raise ValueError("expected targets that count, got none: every target is ignored, or every weight is 0")
    coupled = state.batch_coupled(problem.network) if problem.mode == "train" else []
    if coupled and len(counts) > 1 and not problem.micro_batches:
        raise ValueError(
            f"expected one batch in mode='train', got {len(counts)}: {coupled[0] or 'the model'} normalizes each batch by "
            "itself, so the average over them is not the loss of the whole; give one batch, mode='eval', or micro_batches=True"
        )


def _compare(first: _Pass, second: _Pass, kind: str) -> None:
    if first.digests == second.digests:
        return
    if not second.digests:
        raise ValueError(f"expected data that can be read many times, got a one-shot {kind}; give list(data)")
    if sorted(first.digests) == sorted(second.digests):
        raise ValueError(
            f"expected the same order in every pass, got a shuffling {kind}; give list(data), or do not shuffle"
        )
    raise ValueError(
        f"expected the same batches in every pass, got two different passes over {kind} (shuffling or random augmentation); "
        "give list(data), or turn shuffling and augmentation off"
    )


def _additive(problem: Problem) -> bool:
    return not problem.dropout and not (problem.mode == "train" and state.batch_coupled(problem.network))


def _extremes(counts: tuple[float, ...], sizes: tuple[int | None, ...]) -> tuple[int, int]:
    """Two batches whose terms per example differ most: what merging them tells most about."""
    density = [c / (s or 1) for c, s in zip(counts, sizes)]
    order = sorted((i for i, c in enumerate(counts) if c), key=lambda i: density[i])
    return (order[0], order[-1]) if len(order) > 1 else (0, 1)


def _check_merged(problem: Problem, a: Any, b: Any) -> None:
    whole = source.merged(a, b)
    if whole is None:
        n = source.examples(a) or 0
        if n < 2:
            return
        whole, third = a, -(-n // 3)
        a, b = source.part(whole, 0, third), source.part(whole, third, n)
    with problem.measuring(), torch.no_grad():
        (wa, la), (wb, lb), (w, loss) = (_weighed(problem, raw) for raw in (a, b, whole))
    if not wa or not wb:
        return
    eps = torch.finfo(problem.dtype).eps
    expected = (wa * la + wb * lb) / (wa + wb)
    # the three losses are sums of many terms, each rounded; another order of summation moves them by some eps
    if abs(w - wa - wb) > 1e-6 * w or not abs(loss - expected) <= 256 * eps * (abs(la) + abs(lb)):
        raise ValueError(
            f"expected the loss of two merged batches to be the mean of theirs by weight, {expected:.6g}, got {loss:.6g} "
            f"(losses {la:.6g} and {lb:.6g}, weights {wa:g} and {wb:g}, together {w:g}); the loss must be a mean over the terms "
            "that weight= counts: give weight= or reduction='mean', or checks=False if batches are meant to count like this"
        )


def _weighed(problem: Problem, raw: Any) -> tuple[float, float]:
    count = problem.count(raw, 0)
    batch = problem.ready(raw, index=0, count=count, total=count or 1.0)
    if not count:
        return 0.0, 0.0
    return count, float(problem.loss_of(problem.outputs(batch), batch))


def guarded(problem: Problem) -> Iterator[Any]:
    """The raw batches of a problem, read without moving any random state."""
    spare = source.generators(problem.data)
    guard: Callable[[], Any] = lambda: state.random_state(problem.device, spare)  # noqa: E731
    yield from source.read(problem.data, guard)
