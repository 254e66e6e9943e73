"""SGD with momentum, plain or Nesterov's."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from towtank.optim.rule import Role, Rule

Number = float | Tensor


class Hyper(NamedTuple):
    """Learning rate, momentum, and whether it is Nesterov's (0 or 1)."""

    lr: Number = 1e-3
    momentum: Number = 0.0
    nesterov: Number = 0.0


class State(NamedTuple):
    """Sum of past gradients, of the parameter's shape."""

    momentum_buffer: Tensor


def init(param: Tensor, role: Role, hyper: Hyper) -> State:
    """No past gradients."""
    return State(torch.zeros_like(param))


def update(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number) -> tuple[Tensor, State]:
    """One step: b <- mu b + g;  p <- p - lr b, or with Nesterov p <- p - lr (g + mu b).

    Example:
        >>> p, s = update(torch.tensor([1.0]), torch.tensor([2.0]), State(torch.tensor([1.0])), Hyper(0.1, 0.5), 2)
        >>> p, s.momentum_buffer
        (tensor([0.7500]), tensor([2.5000]))

    Source: Sutskever et al. 2013, equations 1 to 4, in the form of torch.optim.SGD without dampening.
    """
    buffer = hyper.momentum * state.momentum_buffer + grad
    # nesterov is 0 or 1: buffer, or grad + momentum * buffer
    ahead = hyper.nesterov * grad + (1 - hyper.nesterov + hyper.nesterov * hyper.momentum) * buffer
    return param - hyper.lr * ahead, State(buffer)


RULE = Rule(
    name="sgd",
    hyper=Hyper,
    init=init,
    update=update,
    static=("nesterov",),
    preconditioner=lambda state, hyper, step: torch.ones_like(state.momentum_buffer),
    summary="gradient descent with momentum",
    source="Sutskever et al. 2013, equations 1 to 4",
    deviations=("no dampening: torch's default of 0",),
    decay="coupled",
    state_bytes=4,
    lr_vs_adamw=(10.0, 1000.0),
)
