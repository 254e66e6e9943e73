"""AdaHessian: Adam with the Hessian's diagonal in place of the gradient's square."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from towtank.optim.rule import Role, Rule, choose

Number = float | Tensor


class Hyper(NamedTuple):
    """Learning rate, decay rates of gradient and curvature, epsilon, and the power k of the Hessian."""

    lr: Number = 0.15
    beta1: Number = 0.9
    beta2: Number = 0.999
    eps: Number = 1e-4
    hessian_power: Number = 1.0


class State(NamedTuple):
    """Average gradient, average squared curvature, and the last curvature sample."""

    m: Tensor
    v: Tensor
    sample: Tensor


def init(param: Tensor, role: Role, hyper: Hyper) -> State:
    """Zero averages, no sample."""
    return State(torch.zeros_like(param), torch.zeros_like(param), torch.zeros_like(param))


def update(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number) -> tuple[Tensor, State]:
    """One step with the last sample h of the Hessian's diagonal.

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) h^2;  p <- p - lr (m / (1 - b1^t)) / ((v / (1 - b2^t))^(k/2) + eps)

    Source: Yao et al. 2021, "ADAHESSIAN", algorithm 1 and equation 12.
    """
    m = torch.lerp(grad, state.m, hyper.beta1)
    v = torch.lerp(torch.square(state.sample), state.v, hyper.beta2)
    unbias = 1 / (1 - hyper.beta2**step)
    root = choose(
        hyper.hessian_power == 1,
        lambda: torch.sqrt(v) * unbias**0.5,
        lambda: torch.pow(v * unbias, hyper.hessian_power / 2),
    )
    return param - hyper.lr / (1 - hyper.beta1**step) * (m / (root + hyper.eps)), State(m, v, state.sample)


def observe(state: State, sample: Tensor, hyper: Hyper, count: Number) -> State:
    """Keep a signed sample z * (H z), averaged over the blocks that the provider averages over."""
    return State(state.m, state.v, sample)


def _preconditioner(state: State, hyper: Hyper, step: Number) -> Tensor:
    return torch.pow(state.v / (1 - hyper.beta2**step), hyper.hessian_power / 2) + hyper.eps


RULE = Rule(
    name="adahessian",
    hyper=Hyper,
    init=init,
    update=update,
    static=("hessian_power",),
    curvature="signed",
    observe=observe,
    preconditioner=_preconditioner,
    summary="Adam with the Hessian's diagonal in place of the gradient's square",
    source="Yao et al. 2021, algorithm 1",
    deviations=(
        "official: three incompatible block averages (kernel dimensions only; rows too; none in a popular collection); "
        "here the provider of the diagonal averages, over the kernel dimensions of convolutions as in the paper",
        "a step without a new sample reuses the last one",
        "a popular collection: eps 1e-16, lr 0.1",
    ),
    state_bytes=12,
    passes=1.0,
    lr_vs_adamw=(10.0, 150.0),
)
