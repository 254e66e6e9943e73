"""AdamW's direction: the first moment over the root of the second, both bias-corrected."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from towtank.optim.rule import Role, Rule


class Hyper(NamedTuple):
    """Learning rate, decay rates of the moments, and the epsilon: numbers, or tensors of no dimension."""

    lr: float | Tensor = 1e-3
    beta1: float | Tensor = 0.9
    beta2: float | Tensor = 0.999
    eps: float | Tensor = 1e-8


class State(NamedTuple):
    """Exponential averages of the gradient and of its square, each of the parameter's shape."""

    m: Tensor
    v: Tensor


def init(param: Tensor, role: Role, hyper: Hyper) -> State:
    """Zero moments."""
    return State(torch.zeros_like(param), torch.zeros_like(param))


def update(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: float | Tensor) -> tuple[Tensor, State]:
    """One step of Adam; weight decay surrounds it.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  p <- p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Example:
        >>> p, _ = update(torch.zeros(2), torch.tensor([0.5, -2.0]), State(torch.zeros(2), torch.zeros(2)), Hyper(0.1), 1)
        >>> p
        tensor([-0.1000,  0.1000])

    Source: Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2.
    """
    m = torch.lerp(grad, state.m, hyper.beta1)
    v = torch.lerp(torch.square(grad), state.v, hyper.beta2)
    unbias1, unbias2 = 1 / (1 - hyper.beta1**step), (1 - hyper.beta2**step) ** -0.5
    root = torch.sqrt(v) * (unbias2 / unbias1) + hyper.eps / unbias1  # the corrections are numbers: fold them into one
    return param - hyper.lr * (m / root), State(m, v)


def _preconditioner(state: State, hyper: Hyper, step: float | Tensor) -> Tensor:
    return torch.sqrt(state.v) * (1 - hyper.beta2**step) ** -0.5 + hyper.eps


RULE = Rule(
    name="adamw",
    hyper=Hyper,
    init=init,
    update=update,
    preconditioner=_preconditioner,
    summary="first moment over the root of the second",
    source="Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2",
    state_bytes=8,
    weight_decay=1e-2,
)
