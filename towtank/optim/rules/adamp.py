"""AdamP: Adam without the radial part of the step on scale-invariant weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from towtank.optim.rule import Role, Rule
from towtank.optim.rules import adamw
from towtank.optim.rules.projection import project

Number = float | Tensor


class Hyper(NamedTuple):
    """Adam's numbers, the cosine below which weights count as scale-invariant, their share of the decay, Nesterov (0, 1)."""

    lr: Number = 1e-3
    beta1: Number = 0.9
    beta2: Number = 0.999
    eps: Number = 1e-8
    delta: Number = 0.1
    wd_ratio: Number = 0.1
    nesterov: Number = 0.0
    weight_decay: Number = 0.0


class State(NamedTuple):
    """Moments of a tensor of two dimensions or more, of its shape."""

    m: Tensor
    v: Tensor


class VectorState(NamedTuple):
    """Moments of a vector, which is never projected."""

    m: Tensor
    v: Tensor


def init(param: Tensor, role: Role, hyper: Hyper) -> State | VectorState:
    """Zero moments."""
    return (State if param.ndim > 1 else VectorState)(torch.zeros_like(param), torch.zeros_like(param))


def update(
    param: Tensor, grad: Tensor, state: State | VectorState, hyper: Hyper, step: Number
) -> tuple[Tensor, State | VectorState]:
    """One step: Adam's direction q, projected (see `project`), p <- (1 - lr lambda r) p - lr q.

    Source: Heo et al. 2021, "AdamP: slowing down the slowdown for momentum optimizers on scale-invariant weights",
    algorithm 1; r is `wd_ratio` where the step was projected.
    """
    m = torch.lerp(grad, state.m, hyper.beta1)
    v = torch.lerp(torch.square(grad), state.v, hyper.beta2)
    root = torch.sqrt(v) * (1 - hyper.beta2**step) ** -0.5 + hyper.eps
    ahead = hyper.nesterov * (hyper.beta1 * m + (1 - hyper.beta1) * grad) + (1 - hyper.nesterov) * m
    direction, factor = ahead / root, 1.0
    if isinstance(state, State):
        direction, factor = project(param, grad, direction, hyper.delta, hyper.wd_ratio, hyper.eps)
    shrink = hyper.lr * hyper.weight_decay * factor
    return param - shrink * param - hyper.lr / (1 - hyper.beta1**step) * direction, type(state)(m, v)


def _statistics(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number) -> dict[str, Tensor]:
    m, v = torch.lerp(grad, state.m, hyper.beta1), torch.lerp(torch.square(grad), state.v, hyper.beta2)
    q = m / (torch.sqrt(v) * (1 - hyper.beta2**step) ** -0.5 + hyper.eps)
    radial = torch.sum(q * param) / torch.clamp(torch.linalg.vector_norm(param), min=hyper.eps)
    return {"radial_share": torch.square(radial) / torch.clamp(torch.sum(torch.square(q)), min=1e-300)}


RULE = Rule(
    name="adamp",
    hyper=Hyper,
    init=init,
    update=update,
    static=("nesterov",),
    reach="tensor",
    decays=True,
    preconditioner=adamw.RULE.preconditioner,
    statistics=_statistics,
    summary="Adam without the radial part of the step on scale-invariant weights",
    source="Heo et al. 2021, algorithm 1",
    deviations=(
        "official decides per tensor on the host; here it is selected without waiting",
        "a popular collection places epsilon differently: 1e-5 to 1e-3 apart after 25 steps",
    ),
    state_bytes=8,
)
