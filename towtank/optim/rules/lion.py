"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from towtank.optim.rule import Role, Rule


class Hyper(NamedTuple):
    """Learning rate, and the decay rates of the update's and the stored momentum."""

    lr: float | Tensor = 1e-4
    beta1: float | Tensor = 0.9
    beta2: float | Tensor = 0.99


class State(NamedTuple):
    """Momentum, of the parameter's shape."""

    m: Tensor


def init(param: Tensor, role: Role, hyper: Hyper) -> State:
    """Zero momentum."""
    return State(torch.zeros_like(param))


def update(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: float | Tensor) -> tuple[Tensor, State]:
    """One step: u = sign(b1 m + (1 - b1) g);  p <- p - lr u;  m <- b2 m + (1 - b2) g.

    Example:
        >>> p, s = update(torch.tensor([1.0]), torch.tensor([3.0]), State(torch.tensor([0.0])), Hyper(lr=0.1), 1)
        >>> p, s.m
        (tensor([0.9000]), tensor([0.0300]))

    Source: Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2.
    """
    return param - hyper.lr * _direction(grad, state, hyper), State(torch.lerp(grad, state.m, hyper.beta2))


def _direction(grad: Tensor, state: State, hyper: Hyper) -> Tensor:
    return torch.sign(torch.lerp(grad, state.m, hyper.beta1))


def _statistics(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: float | Tensor) -> dict[str, Tensor]:
    return {"sign_agreement": (torch.sign(grad) == _direction(grad, state, hyper)).double().mean()}


RULE = Rule(
    name="lion",
    hyper=Hyper,
    init=init,
    update=update,
    preconditioner=lambda state, hyper, step: state.m.abs(),
    statistics=_statistics,
    summary="sign of an interpolated momentum",
    source="Chen et al. 2023, algorithm 2",
    state_bytes=4,
    lr_vs_adamw=(0.1, 0.33),
)
