"""How a rule is carried out on many tensors: as one native pass, piece by piece in the cache, or compiled by PyTorch.

All three run the same function: the rule, surrounded by clipping and weight decay.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from towtank.optim import native
from towtank.optim.rule import Decay, Rule

EngineName = Literal["auto", "native", "eager", "compile"]
PIECE = 65_536  # numbers per piece on a CPU: an update's dozen operations then stay in cache
backend = "inductor"  # what compiles a step


@dataclass(frozen=True)
class Work:
    """One tensor to advance: the parameter and its state in place; the gradient is only read."""

    param: Tensor
    grad: Tensor
    state: Any


@dataclass(frozen=True)
class Surround:
    """The numbers around a rule: g <- scale g + l2 p before it, and p <- p - shrink p beside it."""

    shrink: float | Tensor = 0.0
    l2: float | Tensor = 0.0
    scale: float | Tensor = 1.0

    @staticmethod
    def of(decay: Decay, amount: float | Tensor, lr: float | Tensor, share: float | Tensor, scale: float | Tensor):  # noqa: ANN205
        """The numbers of one kind of weight decay.

        Args:
            decay: `decoupled` shrinks by lr lambda (Loshchilov and Hutter 2019), `independent` by share lambda, which does
                not feel the peak learning rate (Wortsman et al. 2023, section 3.2), `coupled` adds lambda p to the gradient.
            amount: lambda.
            lr: learning rate of this step.
            share: lr over the peak learning rate.
            scale: of the gradient, from clipping.

        Raises:
            ValueError: for an unknown kind.
        """
        if decay == "decoupled":
            return Surround(shrink=lr * amount, scale=scale)
        if decay == "independent":
            return Surround(shrink=share * amount, scale=scale)
        if decay == "coupled":
            return Surround(l2=amount, scale=scale)
        raise ValueError(f"decay = {decay!r}: expected one of {', '.join(get_args(Decay))}")


def surrounded(rule: Rule, param: Tensor, grad: Tensor, state: Any, hyper: Any, step: Any, around: Surround):  # noqa: ANN201
    """One pure step of a rule within its clipping and its decay: (new parameter, new state)."""
    if rule.within is not None:
        return rule.within(lambda r, p, g, s: surrounded(r, p, g, s, hyper, step, around), param, grad, state)
    if not _is(around.scale, 1.0):
        grad = around.scale * grad
    if not _is(around.l2, 0.0):
        grad = grad + around.l2 * param
    new, state = rule.update(param, grad, state, hyper, step)
    return (new if _is(around.shrink, 0.0) else new - around.shrink * param), state


def advance(
    rule: Rule,
    works: Sequence[Work],
    hyper: Any,
    step: float | Tensor,
    around: Surround,
    *,
    engine: EngineName = "auto",
) -> list[int]:
    """Advance tensors of equal numbers in place.

    Args:
        rule: the rule.
        works: tensors with their gradients and states.
        hyper: the rule's numbers.
        step: t of this step, from 1.
        around: clipping and decay.
        engine: `native` (dense CPU tensors of float32 or float64, and a C compiler), `eager`, `compile`, or `auto`: native
            where it can, compiled on accelerators, else eager.

    Returns:
        For each tensor how many numbers of its gradient were not finite: the native engine leaves alone what they reach
        (elements, rows or the tensor), the eager one the whole tensor. A compiled step does not look.

    Raises:
        ValueError: for an unknown engine.
        Unsupported: if `native` was asked for and is not possible.
    """
    if engine not in get_args(EngineName):
        raise ValueError(f"engine = {engine!r}: expected one of {', '.join(get_args(EngineName))}")
    lost, rest = [0] * len(works), set(range(len(works)))
    if engine in ("auto", "native"):
        for (dtype, fits), members in _kinds(rule, works).items():
            run = _native(rule, hyper, around, dtype, fits, engine == "native")
            if run is None:
                continue
            chosen = [works[i] for i in members]
            for i, n in zip(members, run(chosen, hyper, step, around), strict=True):
                lost[i] = n
            rest -= set(members)
    if rest and compiles(engine, works[min(rest)].param.device):
        _run_compiled(rule, [works[i] for i in sorted(rest)], hyper, step, around)
    else:
        for i in rest:
            lost[i] = _not_finite(works[i].grad)
            if not lost[i]:
                _eager(rule, works[i], hyper, step, around)
    return lost


def compiles(engine: EngineName, device: torch.device) -> bool:
    """Whether an engine compiles the step on a device with PyTorch: it then looks at no gradient, and waits for nothing."""
    return engine == "compile" or (engine == "auto" and device.type != "cpu")


def has_kernel(rule: Rule, dtype: torch.dtype) -> bool:
    """Whether the native engine can carry out a rule on this machine."""
    return not isinstance(_kernel(rule, False, dtype, _fixed(rule, rule.hyper())), str)


def _is(x: float | Tensor, number: float) -> bool:
    return isinstance(x, float | int) and x == number


def _kinds(rule: Rule, works: Sequence[Work]) -> dict[tuple[torch.dtype, bool], list[int]]:
    """Works by type, and whether a native kernel could read them: dense CPU tensors of one type and layout."""
    kinds: dict[tuple[torch.dtype, bool], list[int]] = {}
    shapes = _shapes(rule)
    for i, w in enumerate(works):
        fits = False
        if shapes is not None and type(w.state) is shapes[0] and _dense(w.param):
            small = shapes[1] | shapes[2]
            like = (w.param, w.grad, *(s for f, s in zip(w.state._fields, w.state, strict=True) if f not in small))
            fits = all(_alike(t, w.param) for t in like) and (rule.reach == "element" or w.param.is_contiguous())
        kinds.setdefault((w.param.dtype, fits), []).append(i)
    return kinds


def _alike(t: Tensor, param: Tensor) -> bool:
    plain = type(t) in (Tensor, torch.nn.Parameter) and t.is_cpu and t.dtype == param.dtype
    return plain and (t is param or (t.stride() == param.stride() and t.shape == param.shape))


def _dense(t: Tensor) -> bool:
    return t.is_contiguous() or (t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last))


def _native(rule: Rule, hyper: Any, around: Surround, dtype: torch.dtype, fits: bool, must: bool):  # noqa: ANN202
    numbers = (*hyper, around.shrink, around.l2, around.scale)
    scalar = all(isinstance(x, float | int) or x.ndim == 0 for x in numbers)
    found = (
        _kernel(rule, not _is(around.l2, 0.0), dtype, _fixed(rule, hyper))
        if fits and scalar
        else "it needs dense CPU tensors of one type"
    )
    if isinstance(found, str):
        if must:
            raise native.Unsupported(f"engine = 'native' is not possible: {found}; use engine = 'auto'")
        return None

    def run(works: Sequence[Work], hyper: Any, step: Any, around: Surround) -> list[int]:
        bad = [0 if rule.reach != "tensor" else _not_finite(w.grad) for w in works]
        fine = [i for i, n in enumerate(bad) if not n]
        if fine:
            columns = list(zip(*((works[i].param, *works[i].state, works[i].grad) for i in fine), strict=True))
            coupled = () if _is(around.l2, 0.0) else (around.l2,)
            lost = found(columns, [float(x) for x in (*hyper, step, around.shrink, around.scale, *coupled)])
            for i, n in zip(fine, lost, strict=True):
                bad[i] = n
        return bad

    return run


def _fixed(rule: Rule, hyper: Any) -> tuple[tuple[str, float], ...]:
    return tuple((n, float(getattr(hyper, n))) for n in rule.static)


@functools.cache
def _kernel(rule: Rule, coupled: bool, dtype: torch.dtype, fixed: tuple[tuple[str, float], ...]) -> native.Kernel | str:
    shapes = _shapes(rule)
    if shapes is None:
        return f"the rule {rule.name} keeps state that is neither per element, nor per row, nor per tensor"
    kind, rows, single = shapes
    fields: tuple[str, ...] = rule.hyper._fields  # pyright: ignore[reportAttributeAccessIssue]
    states: tuple[str, ...] = kind._fields  # pyright: ignore[reportAttributeAccessIssue]
    numbers = (*fields, "step_", "shrink_", "scale_", *(["l2_"] if coupled else []))
    layout = native.Layout(tensors=("param", *states, "grad"), numbers=numbers, guard="grad", rows=rows, single=single)

    def flat(param: Any, *rest: Any) -> tuple[Any, ...]:
        state, grad, rest = rest[: len(states)], rest[len(states)], rest[len(states) + 1 :]
        hyper, (step, shrink, scale, *l2) = rest[: len(fields)], rest[len(fields) :]
        around = Surround(shrink, *l2, scale=scale) if l2 else Surround(shrink, scale=scale)
        numbers = rule.hyper(*hyper)._replace(**dict(fixed))  # pyright: ignore[reportAttributeAccessIssue]
        new, new_state = surrounded(rule, param, grad, kind(*state), numbers, step, around)
        return new, *new_state

    try:
        return native.kernel(flat, layout, dtype, cut=rule.reach)
    except native.Unsupported as e:
        return str(e)


@functools.cache
def _shapes(rule: Rule) -> tuple[type, frozenset[str], frozenset[str]] | None:
    """Type of the state of a matrix, and which of its fields are one number per row, and in all; None for other shapes."""
    state = rule.init(torch.zeros(2, 3), "matrix", rule.hyper())
    shapes = {f: tuple(s.shape) for f, s in zip(state._fields, state, strict=True)}
    if not set(shapes.values()) <= {(2, 3), (2, 1), ()}:
        return None
    rows, single = (frozenset(f for f, s in shapes.items() if s == shape) for shape in ((2, 1), ()))
    return type(state), rows, single


def _eager(rule: Rule, work: Work, hyper: Any, step: Any, around: Surround) -> None:
    for piece in _pieces(rule, work):
        new, state = surrounded(rule, piece.param, piece.grad, piece.state, hyper, step, around)
        piece.param.copy_(new)
        for old, fresh in zip(piece.state, state, strict=True):
            if fresh is not old:
                old.copy_(fresh)


def _not_finite(grad: Tensor) -> int:
    return 0 if bool(torch.isfinite(grad.sum())) else int((~torch.isfinite(grad)).sum())


def _pieces(rule: Rule, work: Work) -> Iterator[Work]:
    """The tensor cut as far as the rule allows, so that a piece and its temporaries stay in cache."""
    tensors = (work.param, work.grad, *work.state)
    whole = rule.reach == "tensor" or work.param.device.type != "cpu" or work.param.numel() <= PIECE
    if whole or not all(t.is_contiguous() for t in tensors):
        yield work
    elif rule.reach == "element":
        count = -(-work.param.numel() // PIECE)
        cut = ([t] * count if not t.ndim else t.view(-1).split(PIECE) for t in tensors)
        for p, g, *s in zip(*cut, strict=True):
            yield Work(p, g, type(work.state)(*s))
    elif rule.reach == "row" and all(t.shape[:1] == work.param.shape[:1] for t in tensors):
        rows = max(1, PIECE * work.param.shape[0] // work.param.numel())
        for p, g, *s in zip(*(t.split(rows) for t in tensors), strict=True):
            yield Work(p, g, type(work.state)(*s))
    else:
        yield work


class _Casting(TorchFunctionMode):
    """Lets `torch.lerp` take its weight in double, as every other operation takes a number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: D105
        if func is torch.lerp and isinstance(args[2], Tensor):
            args = (*args[:2], args[2].to(args[0].dtype))
        return func(*args, **(kwargs or {}))


def _run_compiled(rule: Rule, works: Sequence[Work], hyper: Any, step: Any, around: Surround) -> None:
    """All tensors in one compiled graph; numbers are a tensor in it, so that a schedule compiles nothing anew."""
    numbers = {**hyper._asdict(), "step_": step, "shrink_": around.shrink, "l2_": around.l2, "scale_": around.scale}
    neutral = {"shrink_": 0.0, "l2_": 0.0, "scale_": 1.0}  # GaLore has a `scale` of its own
    fixed = {n: float(numbers[n]) for n in rule.static} | {n: x for n, x in neutral.items() if _is(numbers[n], x)}
    free = tuple(n for n in numbers if n not in fixed)
    device = works[0].param.device
    kinds = tuple((w.param.shape, w.param.stride(), w.param.dtype, device, type(w.state)) for w in works)
    run = _compiled(rule, tuple(fixed.items()), free, kinds, backend)
    run([(w.param, w.grad, w.state) for w in works], _column([numbers[n] for n in free], device))


def _column(numbers: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Numbers as one tensor, in double where the device has it: 1 - beta^t loses four digits in single."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    if not any(isinstance(x, Tensor) for x in numbers):
        return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)
    return torch.stack([torch.as_tensor(x, dtype=dtype, device=device) for x in numbers])


@functools.lru_cache(256)
def _compiled(
    rule: Rule, fixed: tuple[tuple[str, float], ...], free: tuple[str, ...], kinds: tuple[Any, ...], backend: str
) -> Callable[..., None]:
    fields: tuple[str, ...] = rule.hyper._fields  # pyright: ignore[reportAttributeAccessIssue]

    def all_of_them(works: list[tuple[Tensor, Tensor, Any]], column: Tensor) -> None:
        numbers = dict(zip(free, column.unbind(), strict=True)) | dict(fixed)
        around = Surround(numbers["shrink_"], numbers["l2_"], numbers["scale_"])
        with _Casting():
            for param, grad, state in works:
                hyper = rule.hyper(*[numbers[f] for f in fields])
                new, fresh_state = surrounded(rule, param, grad, state, hyper, numbers["step_"], around)
                param.copy_(new)
                for old, fresh in zip(state, fresh_state, strict=True):
                    if fresh is not old:
                        old.copy_(fresh)

    # a code object of its own, as PyTorch counts recompilations by code object and refuses the ninth
    own = types.FunctionType(
        all_of_them.__code__.replace(), all_of_them.__globals__, rule.name, None, all_of_them.__closure__
    )
    return torch.compile(own, fullgraph=True, dynamic=False, backend=backend)
