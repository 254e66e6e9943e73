"""Nero: rows of centred unit-norm weights, each turned by a bounded angle."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from towtank.optim.rowwise import per_row, row_length, row_sum
from towtank.optim.rule import Role, Rule

Number = float | Tensor


class Hyper(NamedTuple):
    """Learning rate (radians per step, about) and decay rate of the squared gradient norm of a row."""

    lr: Number = 0.01
    beta: Number = 0.999


class State(NamedTuple):
    """Average squared gradient norm per row, and the scale of the tensor (0-d)."""

    s: Tensor
    scale: Tensor


class VectorState(NamedTuple):
    """The same for a vector, whose rows are its elements and which is not constrained."""

    s: Tensor
    scale: Tensor


def prepare(param: Tensor, role: Role) -> Tensor:
    """Rows of zero mean and unit norm; vectors as they are. A row of zeros stays one."""
    return _constrained(param) if param.ndim > 1 else param


def init(param: Tensor, role: Role, hyper: Hyper) -> State | VectorState:
    """No gradient seen; the scale is the mean norm of the rows, 0.01 for a tensor of zeros."""
    scale = torch.mean(torch.sqrt(row_sum(torch.square(param))))
    scale = torch.where(scale > 0, scale, 0.01 * torch.ones_like(scale))
    return (State if param.ndim > 1 else VectorState)(per_row(param), scale)


def update(
    param: Tensor, grad: Tensor, state: State | VectorState, hyper: Hyper, step: Number
) -> tuple[Tensor, State | VectorState]:
    """One step: s <- b s + (1 - b) ||g_row||^2;  p <- p - lr scale g / sqrt(s / (1 - b^t));  rows centred and normalized.

    Source: Liu et al. 2021, "Learning by turning: neural architecture aware optimisation", algorithm 1.
    """
    s = hyper.beta * state.s + (1 - hyper.beta) * row_sum(torch.square(grad))
    inverse = torch.where(s > 0, torch.rsqrt(s / (1 - hyper.beta**step)), 0 * s)
    moved = param - hyper.lr * state.scale * inverse * grad
    if isinstance(state, VectorState):
        return moved, VectorState(s, state.scale)
    return _constrained(moved), State(s, state.scale)


def _constrained(param: Tensor) -> Tensor:
    centred = param - row_sum(param) / row_length(param)
    squares = row_sum(torch.square(centred))
    return centred * torch.where(squares > 0, torch.rsqrt(squares), 0 * squares + 1)


def _statistics(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number) -> dict[str, Tensor]:
    new, _ = update(param, grad, state, hyper, step)
    norms = torch.sqrt(row_sum(torch.square(param)) * row_sum(torch.square(new)))
    cosine = row_sum(new * param) / torch.clamp(norms, min=1e-30)
    return {"angle_per_step": torch.mean(torch.acos(torch.clamp(cosine, -1, 1)))}


def _preconditioner(state: State, hyper: Hyper, step: Number) -> Tensor:
    return torch.sqrt(state.s / (1 - hyper.beta**step)) / state.scale


RULE = Rule(
    name="nero",
    hyper=Hyper,
    init=init,
    update=update,
    prepare=prepare,
    reach="row",
    preconditioner=_preconditioner,
    statistics=_statistics,
    summary="rows of centred unit-norm weights, each turned by a bounded angle",
    source="Liu et al. 2021, algorithm 1",
    deviations=(
        "official: a row of zeros becomes NaN when the optimizer is made; here it stays zero until it has a gradient",
        "official: parameters added later have no state, and beta is not saved; here both are ordinary",
        "a popular collection constrains at the first step only; here, as officially, when the optimizer is made",
    ),
    state_bytes=0.01,
    lr_vs_adamw=(3.0, 30.0),
)
