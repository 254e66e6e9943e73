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


def direction(grad: Tensor, state: State, hyper: Hyper, step: int) -> tuple[Tensor, State]:
    """One step of Adam's averages, without learning rate and decay.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  direction = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        grad: gradient, any shape.
        state: moments of the same shape.
        hyper: betas and epsilon.
        step: t, counted from 1.

    Returns:
        The direction (to be subtracted) and the new moments.

    Example:
        >>> grad = torch.tensor([0.5, -2.0])
        >>> step_1, _ = direction(grad, init(grad), Hyper(0.9, 0.95, 0.0), 1)
        >>> step_1
        tensor([ 1., -1.])

    Source: Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2.
    """
    m = torch.lerp(state.m, grad, _like(grad, 1 - hyper.beta1))
    v = torch.lerp(state.v, grad * grad, _like(grad, 1 - hyper.beta2))
    root = (v * _like(grad, 1 / (1 - hyper.beta2**step))).sqrt() + _like(grad, hyper.eps)
    return m * _like(grad, 1 / (1 - hyper.beta1**step)) / root, State(m, v)


def _like(tensor: Tensor, number: float | Tensor) -> float | Tensor:
    """The number in the tensor's type: corrections are computed in float64 and rounded once."""
    return number.to(tensor.dtype) if isinstance(number, Tensor) else number
