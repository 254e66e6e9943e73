"""A traced rule as C: what depends on numbers alone once, what depends on a row once per row, the rest per element.

A value is of one of four kinds: a `number` (hyper-parameters, in double), one per `tensor` (results of a reduction over all
rows, in double), one per `row`, one per `element`. A reduction over rows ends a pass over the tensor; a reduction over a
row ends a loop over the row. Later passes and loops compute anew what they need of earlier ones: a row is in cache by then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from towtank.optim import rowwise
from towtank.optim.native.build import Unsupported
from towtank.optim.native.operations import OPERATIONS, helpers

TYPES = {torch.float32: "float", torch.float64: "double"}
NUMBER, TENSOR, ROW, ELEMENT = range(4)
OVER_ROW, OVER_ROWS = (rowwise.row_sum,), (rowwise.total, rowwise.largest)
DEAR = ("truediv", "div", "sqrt", "rsqrt", "exp", "pow", "sigmoid", "log", "reciprocal")
TEMPLATE = """#include <math.h>
#include <stdlib.h>
typedef {real} real;
{helpers}
void advance(
    long tensors__, const long *rows__, const long *lengths__, real *const *pointers__, const double *numbers__, long *bad__
) {{
    {numbers}
    for (long t__ = 0; t__ < tensors__; t__++) {{
        const long count__ = rows__[t__], length__ = lengths__[t__];
        long lost__ = 0;
        {pointers}
        {passes}
        {free}
        bad__[t__] = lost__;
    }}
}}
"""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of an update's inputs: tensors in order (those it returns come first), and numbers.

    Args:
        tensors: names.
        numbers: names.
        rows: which tensors have one number per row.
        single: which tensors have one number in all; they are read, not written.
        guard: the tensor whose elements must be finite for an elementwise update to write.
    """

    tensors: tuple[str, ...]
    numbers: tuple[str, ...]
    guard: str
    rows: frozenset[str] = frozenset()
    single: frozenset[str] = frozenset()

    def kind(self, name: str) -> int:
        """Kind of an input."""
        if name in self.numbers:
            return NUMBER
        return ROW if name in self.rows else TENSOR if name in self.single else ELEMENT


def trace(update: Callable[..., Sequence[Any]], layout: Layout) -> fx.Graph:
    """The operations of `update(*tensors, *numbers) -> tensors`, recorded without running it.

    Raises:
        Unsupported: if a result does not depend on the inputs.
    """
    graph = fx.Graph()
    recorder = GraphAppendingTracer(graph)
    results = update(*(fx.Proxy(graph.placeholder(n), recorder) for n in (*layout.tensors, *layout.numbers)))
    if not all(isinstance(x, fx.Proxy) for x in results):
        raise Unsupported("expected an update whose results depend on its inputs")
    graph.output(tuple(x.node for x in results))
    return graph


@dataclass
class _Value:
    name: str
    kind: int
    text: str  # the C expression; of what is reduced, for a reduction
    needs: list[str]
    over: str = ""  # "row" or "rows" for a reduction
    reduce: str = "+"
    a_pass: int = 0
    a_loop: int = 0
    dear: bool = False
    kept: bool = False  # computed in one loop over a row and read in a later one


@dataclass
class _Program:
    layout: Layout
    values: dict[str, _Value] = field(default_factory=dict)
    written: list[tuple[str, str]] = field(default_factory=list)

    def needed(self, targets: Sequence[str], *, known: Callable[[_Value], bool]) -> set[str]:
        """Everything that targets are computed from, up to what is known."""
        found: set[str] = set()
        stack = [n for n in targets if n in self.values]
        while stack:
            name = stack.pop()
            if name in found or known(self.values[name]):
                continue
            found.add(name)
            stack += [n for n in self.values[name].needs if n in self.values]
        return found


def write(graph: fx.Graph, layout: Layout, dtype: torch.dtype) -> str:
    """The C source of a traced update.

    Raises:
        Unsupported: if an operation or the type has no translation.
    """
    if dtype not in TYPES:
        raise Unsupported(f"no native kernel for {dtype}; there is one for float32 and float64")
    program = _program(graph, layout)
    once = [f"const double {n} = numbers__[{i}];" for i, n in enumerate(layout.numbers)]
    once += [
        f"const double {v.name} = {v.text};" for v in program.values.values() if v.kind == NUMBER and not _sized(v)
    ]
    pointers = [f"real *restrict {n}__ = pointers__[{k} * tensors__ + t__];" for k, n in enumerate(layout.tensors)]
    pointers += [f"const real {n} = {n}__[0];" for n in layout.tensors if n in layout.single]
    pointers += [f"const double {v.name} = {v.text};" for v in program.values.values() if _sized(v)]
    kept = [v.name for v in program.values.values() if v.kept]
    pointers += [f"real *restrict {n}_kept__ = malloc(sizeof(real) * (length__ ? length__ : 1));" for n in kept]
    last = max(program.values[r].a_pass if r in program.values else 0 for _, r in program.written)
    passes = [line for p in range(last + 1) for line in _pass(program, p, p == last)]
    return TEMPLATE.format(
        real=TYPES[dtype],
        helpers=helpers(TYPES[dtype], "_r") + helpers("double", "_n"),
        numbers="\n    ".join(once),
        pointers="\n        ".join(pointers),
        passes="\n        ".join(passes),
        free=" ".join(f"free({n}_kept__);" for n in kept),
    )


def _sized(v: _Value) -> bool:
    return "length__" in v.text or "count__" in v.text or v.over == "size"


def _program(graph: fx.Graph, layout: Layout) -> _Program:
    program = _Program(layout)
    kinds = {n: layout.kind(n) for n in (*layout.tensors, *layout.numbers)}
    sized: set[str] = set()
    for node in graph.nodes:
        if node.op == "output":
            program.written = [(n, r.name) for n, r in zip(layout.tensors, node.args[0], strict=False) if r.name != n]
        elif node.op != "placeholder":
            value = _value(node, kinds)
            inputs = [program.values[n] for n in value.needs if n in program.values]
            if value.kind == NUMBER and (value.over == "size" or any(v.name in sized for v in inputs)):
                sized.add(value.name)
                value.over = "size"
            value.a_pass = max((v.a_pass + (v.over == "rows") for v in inputs), default=0)
            value.a_loop = max((v.a_loop + (v.over == "row") for v in inputs if v.kind >= ROW), default=0)
            program.values[node.name], kinds[node.name] = value, value.kind
    _keep(program)
    for name, result in program.written:
        if name in layout.single or kinds[result] != layout.kind(name):
            raise Unsupported(f"expected {name} to keep its shape, and a state of one number per tensor not to change")
    return program


def _keep(program: _Program) -> None:
    """Mark dear values that a row sum needs and that are needed again after it."""
    summed = [v.needs[0] for v in program.values.values() if v.over == "row"]
    before = program.needed(summed, known=lambda v: v.kind <= ROW)
    after = program.needed([r for _, r in program.written], known=lambda v: v.kind <= ROW)
    for name in before & after:
        program.values[name].kept = program.values[name].dear


def _value(node: fx.Node, kinds: dict[str, int]) -> _Value:
    needs = [n.name for n in node.all_input_nodes]
    kind = max((kinds[n] for n in needs), default=NUMBER)
    if node.target in (rowwise.row_length, rowwise.row_count):
        text = "(double)length__" if node.target is rowwise.row_length else "(double)count__"
        return _Value(node.name, NUMBER, text, [], over="size")
    if node.target in OVER_ROW and kind == ELEMENT:
        return _Value(node.name, ROW, needs[0], needs, over="row")
    if node.target in OVER_ROWS and kind == ROW:
        return _Value(
            node.name, TENSOR, needs[0], needs, over="rows", reduce="+" if node.target is rowwise.total else ">"
        )
    if node.target in (*OVER_ROW, *OVER_ROWS):
        raise Unsupported("expected row_sum of elements, and total or largest of one number per row")
    value = _Value(node.name, kind, _translate(node, kind, kinds), needs)
    value.dear = kind == ELEMENT and _named(node) in DEAR
    return value


def _named(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _translate(node: fx.Node, kind: int, kinds: dict[str, int]) -> str:
    name = _named(node)
    if name not in OPERATIONS:
        raise Unsupported(f"operation {name!r} has no translation to C")
    double = kind <= TENSOR

    def argument(a: Any) -> str | None:
        if a is None:
            return None
        if isinstance(a, fx.Node):
            return a.name if double or kinds[a.name] >= ROW else f"(real){a.name}"
        if isinstance(a, bool) or not isinstance(a, int | float) or not math.isfinite(a):
            raise Unsupported(f"operation {name!r} has an argument {a!r} that is no finite number")
        return repr(float(a)) if double else f"(real){float(a)!r}"

    if name == "pow" and not double and node.args[1] == 2:
        return f"square_r({argument(node.args[0])})"
    text = OPERATIONS[name](*map(argument, node.args), **{k: argument(v) for k, v in node.kwargs.items()})
    return text.replace("@", "_n" if double else "_r")


def _pass(program: _Program, which: int, last: bool) -> list[str]:
    """One pass over the rows of a tensor: it ends in reductions over the rows, or writes the results."""
    totals = [v for v in program.values.values() if v.over == "rows" and v.a_pass == which]
    results = [r for _, r in program.written] if last else []
    targets = [v.needs[0] for v in totals] + results
    need = program.needed(targets, known=lambda v: v.kind <= TENSOR)
    lines = [f"double {v.name} = {'0' if v.reduce == '+' else '-INFINITY'};" for v in totals]
    ready = [v for v in program.values.values() if v.kind == TENSOR and not v.over and v.a_pass == which]
    lines = [f"const double {v.name} = {v.text};" for v in ready] + lines
    lines += [
        "for (long r__ = 0; r__ < count__; r__++) {",
        "    const long from__ = r__ * length__, to__ = from__ + length__;",
    ]
    if not any(v.over == "rows" for v in program.values.values()) and _reduces(program):
        lines += [f"    {line}" for line in _row_guard(program.layout.guard)]
    lines += [f"    const real {n} = {n}__[r__];" for n in program.layout.rows]
    have: set[str] = set()
    loops = max([program.values[n].a_loop for n in need] + [0])
    for loop in range(loops + 1):
        lines += [f"    {line}" for line in _loop(program, need, loop, results if loop == loops else [], have)]
    for v in totals:
        x = v.needs[0]
        lines.append(f"    {v.name} += {x};" if v.reduce == "+" else f"    {v.name} = {x} > {v.name} ? {x} : {v.name};")
    rows = [(n, r) for n, r in program.written if last and n in program.layout.rows]
    return [*lines, *(f"    {n}__[r__] = {r};" for n, r in rows), "}"]


def _reduces(program: _Program) -> bool:
    return any(v.over in ("row", "rows") for v in program.values.values())


def _row_guard(guard: str) -> list[str]:
    """Leave a row alone where the guarded tensor is not finite, and count it."""
    return [
        "long bad_here__ = 0;",
        "#pragma omp simd reduction(+:bad_here__)",
        f"for (long i__ = from__; i__ < to__; i__++) bad_here__ += !({guard}__[i__] - {guard}__[i__] == 0);",
        "if (bad_here__) { lost__ += bad_here__; continue; }",
    ]


def _loop(program: _Program, need: set[str], which: int, results: Sequence[str], have: set[str]) -> list[str]:
    """What is known of a row by now, then one loop over its elements: it ends in sums, or writes the results."""
    values, layout = program.values, program.layout
    row = [v for v in values.values() if v.name in need and v.kind == ROW and not v.over and v.a_loop == which]
    sums = [v for v in values.values() if v.name in need and v.over == "row" and v.a_loop == which]
    written = [(n, r) for n, r in program.written if r in results and n not in layout.rows]
    targets = [v.needs[0] for v in sums] + [r for _, r in written]
    own = program.needed(targets, known=lambda v: v.kind <= ROW or v.name in have)
    lines = [f"const real {v.name} = {v.text};" for v in row]
    if not sums and not written:
        return lines
    lines += [f"real {v.name} = 0;" for v in sums]
    if sums:
        lines.append(f"#pragma omp simd reduction(+:{','.join(v.name for v in sums)})")
    lines.append("for (long i__ = from__; i__ < to__; i__++) {")
    lines += [f"    const real {n} = {n}__[i__];" for n in layout.tensors if layout.kind(n) == ELEMENT]
    lines += [f"    const real {n} = {n}_kept__[i__ - from__];" for n in sorted(have)]
    for v in values.values():
        if v.name in own and v.kind == ELEMENT:
            lines.append(f"    const real {v.name} = {v.text};")
            if v.kept:
                lines.append(f"    {v.name}_kept__[i__ - from__] = {v.name};")
                have.add(v.name)
    lines += [f"    {v.name} += {v.text};" for v in sums]
    guarded = not _reduces(program)
    if written and guarded:
        lines += [f"    const int fine__ = {layout.guard} - {layout.guard} == 0;", "    lost__ += !fine__;"]
    for n, r in written:
        lines.append(f"    {n}__[i__] = fine__ ? {r} : {n};" if guarded else f"    {n}__[i__] = {r};")
    return [*lines, "}"]
