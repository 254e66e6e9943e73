"""SNT-ASGD: gradient descent whose average restarts for each weight that a sparse trainer removes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from towtank.optim.rule import Role, Rule

Number = float | Tensor


class Hyper(NamedTuple):
    """Learning rate, and a decay that multiplies the weights before the step."""

    lr: Number = 1e-2
    lambd: Number = 0.0


class State(NamedTuple):
    """Average `ax`, which weights exist (1 or 0), and for how many steps each has: all of the parameter's shape.

    A sparse trainer writes its masks into `optimizer.state[p]["mask"]` and evaluates with `optimizer.state[p]["ax"]`.
    """

    ax: Tensor
    mask: Tensor
    age: Tensor


def init(param: Tensor, role: Role, hyper: Hyper) -> State:
    """Weights that are exactly zero do not exist, unless all are."""
    mask = ((param != 0) | (param == 0).all()).to(param.dtype)
    return State(torch.zeros_like(param), mask, torch.zeros_like(param))


def update(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number) -> tuple[Tensor, State]:
    """One step: p <- p (1 - lambd lr) - lr g;  ax <- mask (ax + (p - ax) / max(1, age - 1)), age <- mask (age + 1).

    The average is over the steps since a weight came to be, but for its first. The step itself is not masked: the trainer
    that sets the mask also sets removed weights to zero.

    Example:
        >>> state = State(torch.zeros(2), torch.tensor([1.0, 0.0]), torch.tensor([2.0, 7.0]))
        >>> p, s = update(torch.ones(2), torch.ones(2), state, Hyper(lr=0.5), 3)
        >>> p, s.ax, s.age
        (tensor([0.5000, 0.5000]), tensor([0.2500, 0.0000]), tensor([3., 0.]))

    Source: Liu et al. 2021, "Selfish sparse RNN training", section 3.3.
    """
    moved = (1 - hyper.lambd * hyper.lr) * param - hyper.lr * grad
    age = state.mask * (state.age + 1)
    ax = torch.lerp(state.ax, moved, 1 / torch.clamp(age - 1, min=1))
    return moved, State(state.mask * ax, state.mask, age)


RULE = Rule(
    name="snt-asgd",
    hyper=Hyper,
    init=init,
    update=update,
    decay="coupled",
    preconditioner=lambda state, hyper, step: torch.ones_like(state.ax),
    summary="gradient descent whose average restarts for each weight that is removed",
    source="Liu et al. 2021, section 3.3",
    deviations=(
        "official: masks by position in the list of parameters; here a tensor of the state, first the weights that are "
        "not zero",
        "official: lambd defaults to 1e-4 and its scripts pass 0; here 0",
        "official: tensors without mask are torch's ASGD, whose learning rate decays with lambd and which waits t0 steps; "
        "here a mask of ones, the same at the scripts' lambd = 0 and t0 = 0",
        "the trigger (validation loss no longer falls) is the training loop's: it makes the optimizer anew, as officially",
    ),
    state_bytes=12,
    lr_vs_adamw=(10.0, 1000.0),
)
