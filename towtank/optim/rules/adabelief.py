"""AdaBelief: the momentum over the root of its surprise."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from towtank.optim.rule import Role, Rule, choose

Number = float | Tensor


class Hyper(NamedTuple):
    """Learning rate, decay rates of the two averages, and epsilon."""

    lr: Number = 1e-3
    beta1: Number = 0.9
    beta2: Number = 0.999
    eps: Number = 1e-16


class State(NamedTuple):
    """Average of the gradient and of its squared deviation from that average."""

    m: Tensor
    s: Tensor


def init(param: Tensor, role: Role, hyper: Hyper) -> State:
    """Zero averages."""
    return State(torch.zeros_like(param), torch.zeros_like(param))


def update(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number) -> tuple[Tensor, State]:
    """One step of the paper.

        m <- b1 m + (1 - b1) g;  s <- b2 s + (1 - b2) (g - m)^2 + eps, with the new m
        p <- p - lr (m / (1 - b1^t)) / (sqrt(s / (1 - b2^t)) + eps)

    Source: Zhuang et al. 2020, algorithm 2.
    """
    m = torch.lerp(grad, state.m, hyper.beta1)
    s = torch.lerp(torch.square(grad - m), state.s, hyper.beta2) + hyper.eps
    root = torch.sqrt(s) * (1 - hyper.beta2**step) ** -0.5 + hyper.eps
    return param - hyper.lr / (1 - hyper.beta1**step) * (m / root), State(m, s)


def update_rectified(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number) -> tuple[Tensor, State]:
    """One step of the official code at its default `rectify=True`.

    With N = N_max - 2 t b2^t / (1 - b2^t), N_max = 2 / (1 - b2) - 1: while N < 5 the step is that of momentum SGD; then
    it is r m / (sqrt(s) + eps), where RAdam's r holds the sqrt(1 - b2^t) of the paper's second moment.

    Source: the authors' adabelief_pytorch; the rectification is Liu et al. 2020, algorithm 2.
    """
    m = torch.lerp(grad, state.m, hyper.beta1)
    s = torch.lerp(torch.square(grad - m), state.s, hyper.beta2) + hyper.eps
    decayed = hyper.beta2**step
    longest = 2 / (1 - hyper.beta2) - 1
    length = longest - 2 * step * decayed / (1 - decayed)
    tractable = length >= 5
    n = choose(tractable, lambda: length, lambda: 5 + 0 * length)
    r2 = (1 - decayed) * (n - 4) / (longest - 4) * (n - 2) / n * longest / (longest - 2)
    rate = hyper.lr / (1 - hyper.beta1**step)
    root = torch.sqrt(s) + hyper.eps
    gate = choose(tractable, lambda: 1 + 0 * n, lambda: 0 * n)  # a number: 1 when the second moment may be trusted
    return param - rate * m * (gate * r2**0.5 / root + (1 - gate)), State(m, s)


def _belief_ratio(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number) -> dict[str, Tensor]:
    m = torch.lerp(grad, state.m, hyper.beta1)
    return {"belief_ratio": torch.square(grad - m).mean() / torch.square(grad).mean()}


def _preconditioner(state: State, hyper: Hyper, step: Number) -> Tensor:
    return torch.sqrt(state.s) * (1 - hyper.beta2**step) ** -0.5 + hyper.eps


_PAPER = Rule(
    name="adabelief",
    hyper=Hyper,
    init=init,
    update=update,
    preconditioner=_preconditioner,
    statistics=_belief_ratio,
    summary="momentum over the root of its surprise",
    source="Zhuang et al. 2020, algorithm 2",
    deviations=(
        "official: rectified as RAdam by default; variant 'official' is that",
        "popular collections: rectify off, or eps 1e-8",
        "eps 1e-16 is 0 in float16; low-precision parameters are updated in float32",
    ),
    state_bytes=8,
)
_OFFICIAL = replace(_PAPER, update=update_rectified)
RULE = replace(_PAPER, variants={"paper": _PAPER, "official": _OFFICIAL})
