"""Sophia: momentum over a curvature seen now and then, clipped element by element."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from towtank.optim.rule import Role, Rule

Number = float | Tensor


class Hyper(NamedTuple):
    """Learning rate, decay rates of momentum and curvature, clipping rho, and the number of loss terms in a batch.

    `bs` is B of the Gauss-Newton-Bartlett estimate h = B g^2: tokens in a batch for a language model. 1 for Sophia-H.
    """

    lr: Number = 1e-4
    beta1: Number = 0.965
    beta2: Number = 0.99
    rho: Number = 0.04
    bs: Number = 1.0
    eps: Number = 1e-15


class State(NamedTuple):
    """Momentum, and the average of the curvature samples."""

    m: Tensor
    h: Tensor


def init(param: Tensor, role: Role, hyper: Hyper) -> State:
    """Zero momentum and curvature."""
    return State(torch.zeros_like(param), torch.zeros_like(param))


def update(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number) -> tuple[Tensor, State]:
    """One step: m <- b1 m + (1 - b1) g;  p <- p - lr sign(m) min(|m| / (rho B h + eps), 1).

    Where h is not positive the step is lr sign(m).

    Source: Liu et al. 2024, "Sophia", algorithm 3 (lines 6 and 11 to 13); rho B h is the authors' code for max(gamma h, eps).
    """
    m = torch.lerp(grad, state.m, hyper.beta1)
    return param - hyper.lr * torch.sign(m) * _ratio(m, state.h, hyper), State(m, state.h)


def _ratio(m: Tensor, h: Tensor, hyper: Hyper) -> Tensor:
    return torch.clamp(torch.abs(m) / (hyper.rho * hyper.bs * torch.clamp(h, min=0) + hyper.eps), max=1)


def observe_squared(state: State, sample: Tensor, hyper: Hyper, count: Number) -> State:
    """Fold in g^2 of sampled labels: h <- b2 h + (1 - b2) g^2 (algorithm 2, Gauss-Newton-Bartlett)."""
    return State(state.m, torch.lerp(sample, state.h, hyper.beta2))


def observe_signed(state: State, sample: Tensor, hyper: Hyper, count: Number) -> State:
    """Fold in z * (H z), signed: h <- b2 h + (1 - b2) z * (H z) (algorithm 1, Hutchinson)."""
    return State(state.m, torch.lerp(sample, state.h, hyper.beta2))


def _statistics(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number) -> dict[str, Tensor]:
    ratio = _ratio(torch.lerp(grad, state.m, hyper.beta1), state.h, hyper)
    return {"clipped_fraction": (ratio == 1).double().mean()}


G = Rule(
    name="sophia-g",
    hyper=Hyper,
    init=init,
    update=update,
    curvature="squared",
    observe=observe_squared,
    preconditioner=lambda state, hyper, step: hyper.rho * hyper.bs * torch.clamp(state.h, min=0) + hyper.eps,
    statistics=_statistics,
    summary="momentum over the sampled Gauss-Newton diagonal, clipped",
    source="Liu et al. 2024, algorithms 2 and 3",
    deviations=(
        "labels are sampled from the model; the plain squared gradient, a common mistake, is another matrix",
        "bs counts loss terms of a batch (tokens), as the estimate is of their mean",
    ),
    weight_decay=0.1,
    state_bytes=8,
    passes=0.1,
    lr_vs_adamw=(0.5, 1.0),
)
H = replace(
    G,
    name="sophia-h",
    curvature="signed",
    observe=observe_signed,
    summary="momentum over the Hutchinson Hessian diagonal, clipped",
    source="Liu et al. 2024, algorithms 1 and 3",
    deviations=(
        "no official code; a popular one has lr_paper = lr p and gamma = p",
        "negative curvature is kept in h and gives a sign step",
    ),
    passes=0.2,
)
