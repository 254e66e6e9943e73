"""What every product over batches needs: graphs kept while memory allows, rebuilt when the parameters move."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from towtank.problem import Batch, Problem

Retain = Literal["auto"] | bool
Graph = TypeVar("Graph")


class Graphs(Generic[Graph]):
    """The graphs of all batches of a problem: built once and kept as far as a memory budget allows, else built anew.

    A kept graph shares memory with the user's parameters. All are dropped and built anew when a parameter has been changed.
    Dropping this object, or `release()`, frees them at once: nothing here is part of a reference cycle.

    Args:
        problem: whose batches.
        build: graph of one batch, from the batch and {name: leaf}; called inside `problem.measuring()`.
        roots: the tensors from which a graph hangs, to measure what it holds.
        retain: True keeps every graph, False none, "auto" as many as the budget allows.
        budget: bytes for "auto"; default: half of the memory that is free when the first graph is built.
    """

    def __init__(
        self,
        problem: Problem,
        build: Callable[[Batch, dict[str, Tensor]], Graph],
        roots: Callable[[Graph], Sequence[Tensor]],
        *,
        retain: Retain = "auto",
        budget: float | None = None,
    ) -> None:
        if retain not in ("auto", True, False):
            raise ValueError(f"expected retain to be 'auto', True or False, got {retain!r}")
        self.problem, self.build, self.roots = problem, build, roots
        self.retain, self.budget = retain, budget
        self.release()

    def release(self) -> None:
        """Free every graph."""
        self._kept: dict[int, Graph] = {}
        self._leaves: dict[str, Tensor] = {}
        self._versions: Any = None
        self._left: float | None = None
        self._complete = False

    @property
    def kept(self) -> int:
        """Number of graphs that are kept."""
        return len(self._kept)

    def holds(self, graph: Graph) -> bool:
        """Whether a graph is kept; one that is not may be freed while it is used for the last time."""
        return any(g is graph for g in self._kept.values())

    def each(self, use: Callable[[Graph], None]) -> None:
        """Call `use` on the graph of every batch, with backends set for exact products."""
        versions = self.problem.versions()
        if versions != self._versions:
            self.release()
            self._versions, self._leaves = versions, self.problem.leaves()
        with self.problem.backends():
            for graph in self._kept.values():
                use(graph)
        if not self._complete:
            self._build_rest(use)

    def _build_rest(self, use: Callable[[Graph], None]) -> None:
        before = set(self._kept)
        complete = True
        with self.problem.measuring():
            for batch in self.problem.batches():
                if batch.index in before:
                    continue
                graph = self.build(batch, self._leaves)
                if self._fits(graph):
                    self._kept[batch.index] = graph
                else:
                    complete = False
                use(graph)
                del graph  # before the next one is built
        self._complete = complete

    def _fits(self, graph: Graph) -> bool:
        if isinstance(self.retain, bool):
            return self.retain
        if self._left is None:
            self._left = free_memory(self.problem.device) / 2 if self.budget is None else float(self.budget)
        size = graph_bytes(self.roots(graph))
        if size > self._left:
            return False
        self._left -= size
        return True


def graph_bytes(roots: Sequence[Tensor]) -> int:
    """Bytes that an autograd graph holds: the storages of the tensors saved in it, each counted once.

    Example:
        >>> x = torch.ones(100, requires_grad=True)
        >>> graph_bytes([x.exp().exp()])  # each exp keeps its output
        800
    """
    storages = (t.untyped_storage() for node in nodes(roots) for t in _saved(node))
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def nodes(roots: Sequence[Tensor]) -> Iterator[Any]:
    """Every node of the graph that hangs from some tensors, once."""
    seen: set[Any] = set()
    stack = [r.grad_fn for r in roots if r.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += [n for n, _ in node.next_functions if n is not None]
            yield node


_NAMES: dict[type, list[str]] = {}  # names of what a kind of node saves; `dir` is slow


def _saved(node: Any) -> Iterator[Tensor]:
    kind = type(node)
    if kind not in _NAMES:
        _NAMES[kind] = [n for n in dir(kind) if n.startswith("_saved_")] or ["saved_tensors"]
    for name in _NAMES[kind]:
        yield from (x for x in tree_leaves(getattr(node, name, None)) if isinstance(x, Tensor))


def free_memory(device: torch.device) -> float:
    """Bytes of memory free on a device; on a CPU, what the system and a container's limit leave."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return 4e9
    free = float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(free, float(limit.read_text()) - float(used.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return free
