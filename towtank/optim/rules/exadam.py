"""EXAdam: Adam with cross-debiased moments and the gradient itself in the step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from towtank.optim.rule import Role, Rule

Number = float | Tensor


class Hyper(NamedTuple):
    """Learning rate, decay rates of the moments, epsilon."""

    lr: Number = 1e-3
    beta1: Number = 0.9
    beta2: Number = 0.999
    eps: Number = 1e-8


class State(NamedTuple):
    """Averages of the gradient and of its square."""

    m: Tensor
    v: Tensor


def init(param: Tensor, role: Role, hyper: Hyper) -> State:
    """Zero moments."""
    return State(torch.zeros_like(param), torch.zeros_like(param))


def update(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number) -> tuple[Tensor, State]:
    """One step; m and v are the averages of g and g^2.

        d1 = 1 + b2^t v / (v + eps);  d2 = 1 + b1^t m^2 / (m^2 + eps)
        p <- p - lr ((m + g) d1 / (1 - b1^t)) / (sqrt(v d2 / (1 - b2^t)) + eps)

    Source: Adly 2024, "EXAdam", equations 3 to 6, as in the author's code.
    """
    m = torch.lerp(grad, state.m, hyper.beta1)
    v = torch.lerp(torch.square(grad), state.v, hyper.beta2)
    decay1, decay2, square = hyper.beta1**step, hyper.beta2**step, torch.square(m)
    d1 = 1 + decay2 * (v / (v + hyper.eps))
    d2 = 1 + decay1 * (square / (square + hyper.eps))
    root = torch.sqrt(v * d2) * (1 - decay2) ** -0.5 + hyper.eps
    return param - hyper.lr / (1 - decay1) * ((m + grad) * d1 / root), State(m, v)


RULE = Rule(
    name="exadam",
    hyper=Hyper,
    init=init,
    update=update,
    preconditioner=lambda state, hyper, step: torch.sqrt(state.v) * (1 - hyper.beta2**step) ** -0.5 + hyper.eps,
    summary="Adam with cross-debiased moments",
    source="Adly 2024, equations 3 to 6",
    deviations=(
        "official: raises NameError (numpy is not imported); the value it would compute is unused, so the dynamic step "
        "size of the abstract is absent from the code, and here",
        "the numerator is m + g, both divided by 1 - b1^t: the first step is 16 times Adam's, later ones about twice",
    ),
    state_bytes=8,
    lr_vs_adamw=(0.5, 1.0),
)
