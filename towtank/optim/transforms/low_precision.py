"""Rules on bfloat16 and float16 parameters: computed in float32, with three ways to store the result.

A step of 1e-5 from 1.0 is lost in bfloat16 (its neighbours are 0.0039 apart): after 100 such steps the weight has not moved.
Stochastic rounding moves it on average, a compensated low word moves it exactly.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from towtank.optim.rule import Role, Rule


@functools.cache
def rounded(rule: Rule) -> Rule:
    """The rule in float32, its result rounded to nearest: steps below half a unit in the last place are lost."""
    return _in_float32(rule, "rounded", lambda new, param: new.to(param.dtype))


def stochastic(rule: Rule, *, generator: torch.Generator | None = None) -> Rule:
    """The rule in float32, its result rounded up or down at random so that it is right on average (bfloat16 only).

    Args:
        rule: to be wrapped.
        generator: of the rounding, on the parameters' device; None: a fresh one of seed 0 per wrapped rule. It is no part
            of the optimizer's state: a resumed run rounds with other numbers.
    """
    source: dict[torch.device, torch.Generator] = {} if generator is None else {generator.device: generator}

    def store(new: Tensor, param: Tensor) -> Tensor:
        if param.dtype != torch.bfloat16:
            raise TypeError(f"stochastic rounding: expected bfloat16 parameters, got {param.dtype}; use compensated")
        if new.device not in source:
            source[new.device] = torch.Generator(new.device).manual_seed(0)
        return stochastically(new, source[new.device])

    return _in_float32(rule, "stochastic", store)


def stochastically(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Float32 to bfloat16, up or down with probabilities that make the mean exact; NaN and infinity pass.

    Example:
        >>> x = torch.full((20_000,), 1.001953125)  # a quarter of the way from 1 to the next bfloat16
        >>> bool((stochastically(x, torch.Generator().manual_seed(0)).float().mean() - x[0]).abs() < 1e-4)
        True
    """
    bits = x.float().contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    down = ((bits + noise) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(x), down, x.float()).to(torch.bfloat16)


@functools.cache
def compensated(rule: Rule) -> Rule:
    """The rule in float32 on the pair (param, low): `low` is state and holds what rounding the parameter left over.

    With bfloat16 the pair is a float32, bit by bit: param is its upper half, rounded, and low its lower half as a 16-bit
    integer. With float16 low is a float16 remainder, and the pair holds 22 bits.
    """

    def init(param: Tensor, role: Role, hyper: Any) -> Any:
        inner = rule.init(param.float(), role, hyper)
        return _with_low(type(inner))(*inner, _split(param.float(), param.dtype)[1])

    def within(run: Run, param: Tensor, grad: Tensor, state: Any) -> tuple[Tensor, Any]:
        *inner, low = state
        kind = _INNER[type(state)]
        new, fresh = run(rule, joined(param, low), grad.float(), kind(*inner))
        high, low = _split(new, param.dtype)
        return high, type(state)(*fresh, low)

    return replace(rule, name=f"compensated({rule.name})", init=init, **_inner_hooks(rule, True), **_steps(within))


def joined(param: Tensor, low: Tensor) -> Tensor:
    """The float32 that a parameter and its low word stand for."""
    if param.dtype == torch.bfloat16:
        upper = param.contiguous().view(torch.int16).int() << 16
        return (upper + low.int()).view(torch.float32)
    return param.float() + low.float()


def _split(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if dtype == torch.bfloat16:
        bits = x.contiguous().view(torch.int32)
        upper = (bits + (1 << 15)) >> 16
        return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)
    high = x.to(dtype)
    return high, (x - high.float()).to(dtype)


Run = Callable[[Rule, Tensor, Tensor, Any], tuple[Tensor, Any]]
_INNER: dict[type, type] = {}


@functools.cache
def _with_low(kind: type) -> type:
    outer = namedtuple(f"{kind.__name__}AndLow", [*kind._fields, "low"])  # noqa: PYI024  # pyright: ignore
    _INNER[outer] = kind
    return outer


def _in_float32(rule: Rule, name: str, store: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    def init(param: Tensor, role: Role, hyper: Any) -> Any:
        return rule.init(param.float(), role, hyper)

    def within(run: Run, param: Tensor, grad: Tensor, state: Any) -> tuple[Tensor, Any]:
        new, state = run(rule, param.float(), grad.float(), state)
        return store(new, param), state

    return replace(rule, name=f"{name}({rule.name})", init=init, **_inner_hooks(rule, False), **_steps(within))


def _steps(within: Callable[[Run, Tensor, Tensor, Any], tuple[Tensor, Any]]) -> dict[str, Any]:
    """A step with what surrounds it, and a step alone."""

    def update(param: Tensor, grad: Tensor, state: Any, hyper: Any, step: Any) -> tuple[Tensor, Any]:
        return within(lambda rule, p, g, s: rule.update(p, g, s, hyper, step), param, grad, state)

    return {"within": within, "update": update}


def _inner_hooks(rule: Rule, low: bool) -> dict[str, Any]:
    """The rule's other functions of its state, given the inner part of it."""

    def split(state: Any) -> tuple[Any, tuple[Tensor, ...]]:
        return (_INNER[type(state)](*state[:-1]), state[-1:]) if low else (state, ())

    def whole(state: Any, inner: Any, rest: tuple[Tensor, ...]) -> Any:
        return type(state)(*inner, *rest) if low else inner

    def begin(state: Any, grad: Tensor, hyper: Any) -> Any:
        inner, rest = split(state)
        return whole(state, rule.begin(inner, grad.float(), hyper), rest)  # pyright: ignore[reportOptionalCall]

    def observe(state: Any, sample: Tensor, hyper: Any, count: Any) -> Any:
        inner, rest = split(state)
        return whole(state, rule.observe(inner, sample.float(), hyper, count), rest)  # pyright: ignore[reportOptionalCall]

    def preconditioner(state: Any, hyper: Any, step: Any) -> Tensor:
        return rule.preconditioner(split(state)[0], hyper, step)  # pyright: ignore[reportOptionalCall]

    def statistics(param: Tensor, grad: Tensor, state: Any, hyper: Any, step: Any) -> dict[str, Tensor]:
        return rule.statistics(param.float(), grad.float(), split(state)[0], hyper, step)  # pyright: ignore

    def begins_with(param: Tensor, grad: Tensor) -> Tensor:
        return rule.begins_with(param.float(), grad.float())  # pyright: ignore[reportOptionalCall]

    return {
        "begin": rule.begin and begin,
        "begins_with": rule.begins_with and begins_with,
        "observe": rule.observe and observe,
        "preconditioner": rule.preconditioner and preconditioner,
        "statistics": rule.statistics and statistics,
    }
