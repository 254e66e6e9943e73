"""An elementwise rule as one pass over memory: the rule is traced once and written out as a loop in C.

On a CPU an update is nothing but traffic. A rule in eager PyTorch reads and writes every tensor once per operation; the loop
reads and writes it once. The kernel is built with the machine's C compiler in about a second, kept in the user's cache
folder under the hash of its source and of the processor, and is optional: without a compiler `kernel` says why.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer, TraceError

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")
TYPES = {torch.float32: "float", torch.float64: "double"}


class Unsupported(RuntimeError):
    """The rule, the type or the machine has no native kernel; the message says why."""


def _infix(symbol: str) -> Callable[..., str]:
    return lambda a, b: f"({a} {symbol} {b})"


def _call(name: str) -> Callable[..., str]:
    return lambda *a: f"{name}({', '.join(a)})"


def _clamp(x: str, min: str | None = None, max: str | None = None) -> str:
    low = x if min is None else f"({x} < {min} ? {min} : {x})"
    return low if max is None else f"({low} > {max} ? {max} : {low})"


# What an operation is in C. `@` becomes _r in the loop (the tensors' type) and _n outside (numbers, in double). NaN passes
# through each of them as it does in torch.
OPERATIONS: dict[str, Callable[..., str]] = {
    **{n: _infix(s) for n, s in {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "div": "/"}.items()},
    **{n: _infix(s) for n, s in {"gt": ">", "lt": "<", "ge": ">=", "le": "<=", "eq": "==", "ne": "!="}.items()},
    **{n: _call(f"{n}@") for n in ("sqrt", "exp", "log", "pow", "sign", "square", "reciprocal", "sigmoid", "lerp")},
    **{n: _call(f"{n}@") for n in ("minimum", "maximum")},
    "abs": _call("fabs@"),
    "rsqrt": lambda x: f"(1 / sqrt@({x}))",
    "neg": lambda x: f"(-{x})",
    "where": lambda c, a, b: f"({c} ? {a} : {b})",
    "clamp": _clamp,
    "clip": _clamp,
}
HELPERS = """
#define T {real}
static inline T sqrt@(T x) {{ return sqrt{f}(x); }}
static inline T exp@(T x) {{ return exp{f}(x); }}
static inline T log@(T x) {{ return log{f}(x); }}
static inline T pow@(T x, T y) {{ return pow{f}(x, y); }}
static inline T fabs@(T x) {{ return fabs{f}(x); }}
static inline T sign@(T x) {{ return (T)((x > 0) - (x < 0)); }}
static inline T square@(T x) {{ return x * x; }}
static inline T reciprocal@(T x) {{ return 1 / x; }}
static inline T sigmoid@(T x) {{ return 1 / (1 + exp{f}(-x)); }}
static inline T minimum@(T a, T b) {{ return a < b || a != a ? a : b; }}
static inline T maximum@(T a, T b) {{ return a > b || a != a ? a : b; }}
static inline T lerp@(T a, T b, T w) {{ return w < (T)0.5 ? a + w * (b - a) : b - (b - a) * (1 - w); }}
#undef T
"""
TEMPLATE = """#include <math.h>
typedef {real} real;
{helpers}
void advance(
    long count__, const long *from__, const long *to__, real *const *tensors__, const double *numbers__, long *bad__
) {{
    {once}
    for (long t__ = 0; t__ < count__; t__++) {{
        {pointers}
        long lost__ = 0;
        for (long i__ = from__[t__]; i__ < to__[t__]; i__++) {{
            {each}
        }}
        bad__[t__] = lost__;
    }}
}}
"""


def _helpers(real: str, end: str) -> str:
    return HELPERS.format(real=real, f="f" if real == "float" else "").replace("@", end)


def trace(update: Callable[..., Sequence[Any]], tensors: Sequence[str], numbers: Sequence[str]) -> fx.Graph:
    """The operations of `update(*tensors, *numbers) -> tensors`, recorded without running it."""
    graph = fx.Graph()
    recorder = GraphAppendingTracer(graph)
    inputs = [fx.Proxy(graph.placeholder(name), recorder) for name in (*tensors, *numbers)]
    graph.output(tuple(graph_node(x) for x in update(*inputs)))
    return graph


def graph_node(x: Any) -> fx.Node:
    """The node behind a traced value.

    Raises:
        Unsupported: if the value does not depend on the inputs.
    """
    if not isinstance(x, fx.Proxy):
        raise Unsupported(f"expected a traced result, got {type(x).__name__}")
    return x.node


def write(
    graph: fx.Graph,
    tensors: Sequence[str],
    numbers: Sequence[str],
    dtype: torch.dtype,
    guard: str,
    single: Sequence[str],
) -> str:
    """The C source of a traced update: what depends on numbers alone is computed once, in double.

    Args:
        graph: of the update.
        tensors: names of its tensors; those it returns come first.
        numbers: names of its numbers.
        dtype: of the tensors.
        guard: the tensor whose numbers must be finite: where one is not, nothing is written, and it is counted.
        single: tensors of one number, read by every element and not written.

    Raises:
        Unsupported: if an operation or the type has no translation.
    """
    if dtype not in TYPES:
        raise Unsupported(f"no native kernel for {dtype}; there is one for float32 and float64")
    once = [f"const double {n} = numbers__[{i}];" for i, n in enumerate(numbers)]
    each = [f"const real {n} = {n}__[{0 if n in single else 'i__'}];" for n in tensors]
    varies, results = set(tensors), ()
    for node in graph.nodes:
        if node.op == "output":
            results = node.args[0]
        elif node.op != "placeholder":
            elementwise = any(a.name in varies for a in node.all_input_nodes)
            varies |= {node.name} if elementwise else set()
            line = f"{node.name} = {_translate(node, elementwise, varies)};"
            each.append(f"const real {line}") if elementwise else once.append(f"const double {line}")
    each += [f"const int fine__ = {guard} - {guard} == 0;", "lost__ += !fine__;"]
    written = [(n, r.name) for n, r in zip(tensors, results, strict=False) if r.name != n]
    if any(n in single for n, _ in written):
        raise Unsupported("a state of one number per tensor must not change")
    each += [f"{n}__[i__] = fine__ ? {r} : {n};" for n, r in written]
    real, end = TYPES[dtype], "\n            "
    return TEMPLATE.format(
        real=real,
        helpers=_helpers(real, "_r") + _helpers("double", "_n"),
        once="\n    ".join(once),
        pointers="\n        ".join(
            f"real *restrict {n}__ = tensors__[{k} * count__ + t__];" for k, n in enumerate(tensors)
        ),
        each=end.join(each),
    )


def _translate(node: fx.Node, elementwise: bool, varies: set[str]) -> str:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if name not in OPERATIONS:
        raise Unsupported(f"operation {name!r} has no translation to C")

    def argument(a: Any) -> str | None:
        if a is None:
            return None
        if isinstance(a, fx.Node):
            return a.name if not elementwise or a.name in varies else f"(real){a.name}"
        if isinstance(a, bool) or not isinstance(a, int | float) or not math.isfinite(a):
            raise Unsupported(f"operation {name!r} has an argument {a!r} that is no finite number")
        return f"(real){float(a)!r}" if elementwise else repr(float(a))

    if name == "pow" and elementwise and node.args[1] == 2:
        return f"square_r({argument(node.args[0])})"
    text = OPERATIONS[name](*map(argument, node.args), **{k: argument(v) for k, v in node.kwargs.items()})
    return text.replace("@", "_r" if elementwise else "_n")


class Kernel:
    """A compiled update of many tensors at once.

    Args:
        library: the shared object.
        tensors: names of the tensors of one parameter; those that the update returns come first and are overwritten.
        dtype: of all of them.
    """

    def __init__(self, library: Path, tensors: Sequence[str], dtype: torch.dtype) -> None:
        self.tensors, self.dtype = tuple(tensors), dtype
        self._advance = ctypes.CDLL(str(library)).advance
        self._advance.restype = None

    def __call__(self, columns: Sequence[Sequence[Tensor]], numbers: Sequence[float]) -> list[int]:
        """Advance tensors in place, except where the guarded one is not finite.

        Args:
            columns: for each name of `tensors`, one tensor per parameter: contiguous (or alike in memory), on the CPU.
            numbers: the numbers of the update, in the traced order.

        Returns:
            For each parameter, how many numbers of the guarded tensor were not finite.
        """
        sizes = [t.numel() for t in columns[0]]
        values = (ctypes.c_double * len(numbers))(*map(float, numbers))
        spans = _spans(sizes, max(1, min(torch.get_num_threads(), sum(sizes) // 65_536)))
        run = functools.partial(self._run, columns, values)
        lost = [0] * len(sizes)
        for span, counts in zip(spans, [run(spans[0])] if len(spans) == 1 else _pool().map(run, spans), strict=True):
            for (t, _, _), n in zip(span, counts, strict=True):
                lost[t] += n
        return lost

    def _run(self, columns: Sequence[Sequence[Tensor]], values: Any, span: list[tuple[int, int, int]]) -> list[int]:
        count = len(span)
        bounds = [(ctypes.c_long * count)(*(s[i] for s in span)) for i in (1, 2)]
        pointers = (ctypes.c_void_p * (count * len(columns)))(*(c[s[0]].data_ptr() for c in columns for s in span))
        lost = (ctypes.c_long * count)()
        self._advance(ctypes.c_long(count), *bounds, pointers, values, lost)
        return list(lost)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="towtank-update")


def _spans(sizes: Sequence[int], parts: int) -> list[list[tuple[int, int, int]]]:
    """The numbers 0 ... sum(sizes) - 1 in `parts` runs of equal length, each a list of (tensor, from, to)."""
    total, spans = sum(sizes), [[] for _ in range(parts)]
    start = 0
    for t, size in enumerate(sizes):
        for part in range(parts):
            low, high = part * total // parts, (part + 1) * total // parts
            a, b = max(low, start) - start, min(high, start + size) - start
            if a < b:
                spans[part].append((t, a, b))
        start += size
    return [s for s in spans if s] or [[]]


@functools.cache
def _processor() -> str:
    compiler = _compiler()
    asked = subprocess.run([compiler, "-march=native", "-Q", "--help=target"], capture_output=True, check=False)
    return hashlib.sha256(asked.stdout).hexdigest()


def _compiler() -> str:
    found = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if found is None:
        raise Unsupported("no C compiler was found (looked for $CC, cc, gcc, clang); install one or use another engine")
    return found


def build(source: str) -> Path:
    """Compile C into a shared object, once per source and processor.

    Raises:
        Unsupported: if there is no compiler, or it fails.
    """
    key = hashlib.sha256(f"{_processor()} {FLAGS} {source}".encode()).hexdigest()[:32]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "towtank" / "kernels"
    library = home / f"{key}.so"
    if library.exists():
        return library
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as folder:
        (Path(folder) / "rule.c").write_text(source)
        command = [_compiler(), *FLAGS, "-o", f"{folder}/rule.so", f"{folder}/rule.c", "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unsupported(f"the C compiler failed: {done.stderr.strip().splitlines()[:1]}")
        os.replace(f"{folder}/rule.so", library)
    return library


def kernel(
    update: Callable[..., Sequence[Any]],
    tensors: Sequence[str],
    numbers: Sequence[str],
    dtype: torch.dtype,
    *,
    guard: str,
    single: Sequence[str] = (),
) -> Kernel:
    """Trace, write and build an elementwise `update(*tensors, *numbers) -> new values of the leading tensors`.

    Args:
        update: the function; elementwise, without branches on values.
        tensors: names of its tensors; those it returns come first.
        numbers: names of its numbers.
        dtype: of the tensors.
        guard: the tensor that must be finite for an element to be written.
        single: tensors of one number, read by every element and not written.

    Raises:
        Unsupported: if the update, the type or the machine has no native kernel.

    Example:
        >>> fused = kernel(lambda p, g, lr: (p - lr * g,), "pg", ["lr"], torch.float32, guard="g")  # doctest: +SKIP
        >>> p = torch.ones(3); fused([[p], [torch.ones(3)]], [0.25]); p  # doctest: +SKIP
        tensor([0.7500, 0.7500, 0.7500])
    """
    try:
        graph = trace(update, tensors, numbers)
    except (TypeError, AttributeError, TraceError) as e:
        raise Unsupported(f"the rule cannot be traced: {e}") from e
    return Kernel(build(write(graph, tensors, numbers, dtype, guard, single)), tensors, dtype)
