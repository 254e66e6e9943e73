"""SGDP: momentum SGD without the radial part of the step on scale-invariant weights."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from towtank.optim.rule import Role, Rule
from towtank.optim.rules.projection import project

Number = float | Tensor


class Hyper(NamedTuple):
    """SGD's numbers, epsilon of the norms, and the projection's: cosine, share of decay; Nesterov (0 or 1)."""

    lr: Number = 1e-2
    momentum: Number = 0.0
    eps: Number = 1e-8
    delta: Number = 0.1
    wd_ratio: Number = 0.1
    nesterov: Number = 0.0
    weight_decay: Number = 0.0


class State(NamedTuple):
    """Sum of past gradients of a tensor of two dimensions or more."""

    momentum_buffer: Tensor


class VectorState(NamedTuple):
    """Sum of past gradients of a vector, which is never projected."""

    momentum_buffer: Tensor


def init(param: Tensor, role: Role, hyper: Hyper) -> State | VectorState:
    """No past gradients."""
    return (State if param.ndim > 1 else VectorState)(torch.zeros_like(param))


def _step(param: Tensor, grad: Tensor, state: State | VectorState, hyper: Hyper) -> tuple[Tensor, Tensor, Number]:
    buffer = hyper.momentum * state.momentum_buffer + grad
    ahead = hyper.nesterov * (grad + hyper.momentum * buffer) + (1 - hyper.nesterov) * buffer
    if isinstance(state, State):
        return buffer, *project(param, grad, ahead, hyper.delta, hyper.wd_ratio, hyper.eps)
    return buffer, ahead, 1.0


def update(
    param: Tensor, grad: Tensor, state: State | VectorState, hyper: Hyper, step: Number
) -> tuple[Tensor, State | VectorState]:
    """One step: the momentum direction, projected (see `project`); the stored momentum is not.

    Weight decay multiplies by 1 - lr lambda r / (1 - mu), which is what coupled decay sums up to.

    Source: Heo et al. 2021, algorithm 1 for SGD.
    """
    buffer, direction, factor = _step(param, grad, state, hyper)
    shrink = hyper.lr * hyper.weight_decay / (1 - hyper.momentum) * factor
    return param - shrink * param - hyper.lr * direction, type(state)(buffer)


def update_aliased(
    param: Tensor, grad: Tensor, state: State | VectorState, hyper: Hyper, step: Number
) -> tuple[Tensor, State | VectorState]:
    """One step of the official code, whose projection overwrites the stored momentum when Nesterov is off."""
    buffer, direction, factor = _step(param, grad, state, hyper)
    shrink = hyper.lr * hyper.weight_decay / (1 - hyper.momentum) * factor
    kept = hyper.nesterov * buffer + (1 - hyper.nesterov) * direction
    return param - shrink * param - hyper.lr * direction, type(state)(kept)


_PAPER = Rule(
    name="sgdp",
    hyper=Hyper,
    init=init,
    update=update,
    static=("nesterov",),
    reach="tensor",
    decays=True,
    preconditioner=lambda state, hyper, step: torch.ones_like(state.momentum_buffer),
    summary="momentum SGD without the radial part of the step on scale-invariant weights",
    source="Heo et al. 2021, algorithm 1",
    deviations=(
        "official: without Nesterov the projection overwrites the stored momentum; variant 'official' is that",
    ),
    state_bytes=4,
    lr_vs_adamw=(10.0, 1000.0),
)
RULE = replace(_PAPER, variants={"paper": _PAPER, "official": replace(_PAPER, update=update_aliased)})
