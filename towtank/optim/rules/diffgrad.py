"""diffGrad: Adam, slowed where the gradient has hardly changed."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from towtank.optim.rule import Role, Rule, choose

Number = float | Tensor


class Hyper(NamedTuple):
    """Learning rate, decay rates of the moments, epsilon."""

    lr: Number = 1e-3
    beta1: Number = 0.9
    beta2: Number = 0.999
    eps: Number = 1e-8


class State(NamedTuple):
    """Moments and the previous gradient."""

    m: Tensor
    v: Tensor
    previous: Tensor


def init(param: Tensor, role: Role, hyper: Hyper) -> State:
    """Zero moments, zero previous gradient."""
    return State(torch.zeros_like(param), torch.zeros_like(param), torch.zeros_like(param))


def update(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number) -> tuple[Tensor, State]:
    """One step: xi = sigmoid(|g_previous - g|);  p <- p - lr sqrt(1 - b2^t) / (1 - b1^t) xi m / (sqrt(v) + eps).

    Source: Dubey et al. 2020, equations 8 to 13; the authors' diffGrad_v2.
    """
    friction = torch.sigmoid(torch.abs(state.previous - grad))
    return _move(param, grad, state, hyper, step, friction)


def update_aliased(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number) -> tuple[Tensor, State]:
    """One step of the code behind the published experiments, where g_previous is the gradient itself: xi = 1/2.

    At the first step the previous gradient is still 0, and xi = sigmoid(|g|).
    """
    friction = choose(step < 1.5, lambda: torch.sigmoid(torch.abs(grad)), lambda: 0 * grad + 0.5)
    return _move(param, grad, state, hyper, step, friction)


def _move(
    param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number, friction: Tensor
) -> tuple[Tensor, State]:
    m = torch.lerp(grad, state.m, hyper.beta1)
    v = torch.lerp(torch.square(grad), state.v, hyper.beta2)
    rate = hyper.lr * (1 - hyper.beta2**step) ** 0.5 / (1 - hyper.beta1**step)
    return param - rate * friction * (m / (torch.sqrt(v) + hyper.eps)), State(m, v, grad + 0)


_PAPER = Rule(
    name="diffgrad",
    hyper=Hyper,
    init=init,
    update=update,
    preconditioner=lambda state, hyper, step: (torch.sqrt(state.v) + hyper.eps) * (1 - hyper.beta2**step) ** -0.5,
    statistics=lambda p, g, s, h, t: {"friction": torch.sigmoid(torch.abs(s.previous - g)).mean()},
    summary="Adam slowed where the gradient has hardly changed",
    source="Dubey et al. 2020, equations 8 to 13",
    deviations=(
        "official: the first code aliased the previous gradient, so xi = 1/2 after the first step and the published "
        "experiments are Adam at half the learning rate; variant 'official' is that code",
        "popular collections: decoupled decay, 1e-15 under the root",
    ),
    decay="coupled",
    state_bytes=12,
    lr_vs_adamw=(1.0, 2.0),
)
RULE = replace(_PAPER, variants={"paper": _PAPER, "official": replace(_PAPER, update=update_aliased)})
