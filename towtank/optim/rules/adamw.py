"""AdamW's direction: the first moment over the root of the second, both bias-corrected."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class State(NamedTuple):
    """Exponential averages of the gradient and of its square, each of the parameter's shape."""

    m: Tensor
    v: Tensor


class Hyper(NamedTuple):
    """Decay rates of the moments and the epsilon: numbers, or tensors that broadcast against the parameter."""

    beta1: float | Tensor
    beta2: float | Tensor
    eps: float | Tensor


def init(param: Tensor) -> State:
    """Zero moments of the parameter's shape and type."""
    return State(torch.zeros_like(param), torch.zeros_like(param))


def direction_(grad: Tensor, state: State, hyper: Hyper, step: int) -> Tensor:
    """One step of Adam's averages, without learning rate and decay.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  direction = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    The moments advance in place and `grad` is overwritten with the direction: eight passes over memory and no new tensor,
    which is what an update on a CPU costs. Hand in a gradient that nobody else reads.

    Args:
        grad: gradient, any shape; becomes the direction.
        state: moments of the same shape; advance.
        hyper: betas and epsilon; tensors are best in float64 (the corrections are computed in it and rounded once).
        step: t, counted from 1.

    Returns:
        The direction, to be subtracted from the parameter.

    Example:
        >>> grad = torch.tensor([0.5, -2.0])
        >>> direction_(grad, init(grad), Hyper(0.9, 0.95, 0.0), 1)
        tensor([ 1., -1.])

    Source: Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2.
    """
    unbias1, unbias2 = 1 / (1 - hyper.beta1**step), 1 / (1 - hyper.beta2**step)
    state.m.lerp_(grad, _like(grad, 1 - hyper.beta1))
    state.v.lerp_(grad.mul_(grad), _like(grad, 1 - hyper.beta2))
    root = (
        torch.mul(state.v, _like(grad, unbias2 / unbias1**2), out=grad).sqrt_().add_(_like(grad, hyper.eps / unbias1))
    )
    return torch.div(state.m, root, out=grad)


def _like(tensor: Tensor, number: float | Tensor) -> Tensor:
    return torch.as_tensor(number, device=tensor.device, dtype=tensor.dtype)
