"""SGD-SaI: momentum with each tensor's rate fixed by the signal-to-noise of its first gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from towtank.optim.rule import Role, Rule

Number = float | Tensor


class Hyper(NamedTuple):
    """Learning rate, momentum, and the epsilon of the signal-to-noise ratio."""

    lr: Number = 1e-2
    momentum: Number = 0.9
    eps: Number = 1e-8


class State(NamedTuple):
    """Momentum, and the frozen signal-to-noise ratio of the tensor (0-d)."""

    momentum_buffer: Tensor
    gsnr: Tensor


def init(param: Tensor, role: Role, hyper: Hyper) -> State:
    """No momentum, ratio not known yet."""
    return State(torch.zeros_like(param), param.new_zeros(()))


def begin(state: State, grad: Tensor, hyper: Hyper) -> State:
    """With the first gradient: k = ||g|| / (std(g) + eps), b = g."""
    return State(grad.clone(), _ratio(grad, hyper.eps))


def update(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number) -> tuple[Tensor, State]:
    """One step: b <- mu b + (1 - mu) g;  p <- p - lr k b, which at t = 1 is p - lr k g.

    Source: Xu et al. 2024, "No more Adam: learning rate scaling at initialization is all you need", algorithm 1.
    """
    buffer = torch.lerp(grad, state.momentum_buffer, hyper.momentum)
    return param - (hyper.lr * state.gsnr) * buffer, State(buffer, state.gsnr)


def _ratio(grad: Tensor, eps: Number) -> Tensor:
    """||g|| / (std(g) + eps); a tensor of one number has no spread, and 1."""
    if grad.numel() < 2:
        return grad.new_ones(())
    norm, spread = torch.linalg.vector_norm(grad), torch.std(grad)
    return norm / (spread + eps)


RULE = Rule(
    name="sgd-sai",
    hyper=Hyper,
    init=init,
    update=update,
    begin=begin,
    preconditioner=lambda state, hyper, step: (1 / state.gsnr).expand_as(state.momentum_buffer),
    statistics=lambda p, g, s, h, t: {"gsnr": s.gsnr},
    summary="momentum with rates fixed by the first gradient's signal-to-noise",
    source="Xu et al. 2024, algorithm 1",
    deviations=(
        "official: resuming computes the ratio anew from the next gradient; here it is state",
        "official: momentum 0 and a parameter without gradient at the first step raise; here they work, and the ratio is "
        "that of the parameter's own first gradient",
        "a popular collection starts the buffer at 0, a first step 10 times smaller",
        "for gradients of zero mean the ratio is the root of the number of elements",
    ),
    weight_decay=1e-2,
    state_bytes=4,
    lr_vs_adamw=(1.0, 30.0),
)
