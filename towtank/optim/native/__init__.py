"""A rule as one pass over memory: it is traced once and written out as a loop in C.

On a CPU an update is nothing but traffic. A rule in eager PyTorch reads and writes every tensor once per operation; the loop
reads and writes it once. The kernel is built with the machine's C compiler in about a second, kept in the user's cache
folder under the hash of its source and of the processor, and is optional: without a compiler `kernel` says why.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.proxy import TraceError

from towtank.optim.native.build import Unsupported, build
from towtank.optim.native.source import Layout, trace, write

__all__ = ["Kernel", "Layout", "Unsupported", "kernel"]
Cut = str  # "element", "row" or "tensor": how far a tensor may be cut between threads


@dataclass(frozen=True)
class _Span:
    """A part of a tensor: its number, first row, rows, and the length of a row."""

    tensor: int
    start: int
    rows: int
    length: int


class Kernel:
    """A compiled update of many tensors at once."""

    def __init__(self, library: str, layout: Layout, cut: Cut) -> None:
        self.layout, self.cut = layout, cut
        self._advance = ctypes.CDLL(library).advance
        self._advance.restype = None

    def __call__(self, columns: Sequence[Sequence[Tensor]], numbers: Sequence[float]) -> list[int]:
        """Advance tensors in place; an elementwise update leaves elements alone where the guarded tensor is not finite.

        Args:
            columns: for each name of the layout, one tensor per parameter: contiguous (or alike in memory), on the CPU.
            numbers: the numbers of the update, in the order of the layout.

        Returns:
            For each parameter, how many numbers of the guarded tensor were not finite (elementwise updates only).
        """
        values = (ctypes.c_double * len(numbers))(*map(float, numbers))
        parts = self._parts(columns[0])
        run = functools.partial(self._run, columns, values)
        lost = [0] * len(columns[0])
        for part, counts in zip(parts, [run(parts[0])] if len(parts) == 1 else _pool().map(run, parts), strict=True):
            for span, n in zip(part, counts, strict=True):
                lost[span.tensor] += n
        return lost

    def _parts(self, params: Sequence[Tensor]) -> list[list[_Span]]:
        """The work of each thread: equal shares of all numbers, cut no finer than the update allows."""
        threads = max(1, min(torch.get_num_threads(), sum(p.numel() for p in params) // 65_536))
        wholes = [self._whole(i, p) for i, p in enumerate(params)]
        if threads == 1:
            return [wholes]
        parts: list[list[_Span]] = [[] for _ in range(threads)]
        share, done = sum(p.numel() for p in params) / threads, 0
        for span in wholes:
            unit = span.length if self.cut == "row" else 1
            size = span.rows * span.length
            for part in range(threads):
                low, high = (max(0, min(size, int((part + i) * share) - done)) // unit * unit for i in (0, 1))
                high = size if part == threads - 1 or high + done >= done + size else high
                if self.cut == "tensor":
                    low, high = (0, size) if done <= (part + 0.5) * share < done + size or size == 0 else (0, 0)
                if low < high:
                    row = (low // unit, (high - low) // unit, unit) if self.cut == "row" else (low, 1, high - low)
                    parts[part].append(span if self.cut == "tensor" else _Span(span.tensor, *row))
            done += size
        return [p for p in parts if p] or [wholes]

    def _whole(self, i: int, param: Tensor) -> _Span:
        if self.cut == "element":
            return _Span(i, 0, 1, param.numel())
        rows = param.shape[0] if param.ndim else 1
        return _Span(i, 0, rows, param.numel() // max(rows, 1))

    def _run(self, columns: Sequence[Sequence[Tensor]], values: Any, spans: list[_Span]) -> list[int]:
        count = len(spans)
        rows = (ctypes.c_long * count)(*(s.rows for s in spans))
        lengths = (ctypes.c_long * count)(*(s.length for s in spans))
        pointers = (ctypes.c_void_p * (count * len(columns)))(
            *(
                self._pointer(n, c[s.tensor], s)
                for n, c in zip(self.layout.tensors, columns, strict=True)
                for s in spans
            )
        )
        lost = (ctypes.c_long * count)()
        self._advance(ctypes.c_long(count), rows, lengths, pointers, values, lost)
        return list(lost)

    def _pointer(self, name: str, tensor: Tensor, span: _Span) -> int:
        if not span.start or name in self.layout.single:
            return tensor.data_ptr()
        start = span.start * (span.length if self.cut == "row" and name not in self.layout.rows else 1)
        return tensor.data_ptr() + start * tensor.element_size()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="towtank-update")


def kernel(update: Callable[..., Sequence[Any]], layout: Layout, dtype: torch.dtype, *, cut: Cut = "element") -> Kernel:
    """Trace, write and build `update(*tensors, *numbers) -> new values of the leading tensors`.

    Args:
        update: the function; reductions by `towtank.optim.rowwise` only, and no branches on values.
        layout: its inputs.
        dtype: of the tensors.
        cut: how far a tensor may be cut: `element`, `row` or `tensor`.

    Raises:
        Unsupported: if the update, the type or the machine has no native kernel.

    Example:
        >>> layout = Layout(tensors=("p", "g"), numbers=("lr",), guard="g")
        >>> fused = kernel(lambda p, g, lr: (p - lr * g,), layout, torch.float32)  # doctest: +SKIP
        >>> p = torch.ones(3); fused([[p], [torch.ones(3)]], [0.25]); p  # doctest: +SKIP
        tensor([0.7500, 0.7500, 0.7500])
    """
    try:
        graph = trace(update, layout)
    except (TypeError, AttributeError, TraceError) as e:
        raise Unsupported(f"the rule cannot be traced: {e}") from e
    return Kernel(str(build(write(graph, layout, dtype))), layout, cut)
