"""M-FAC: the gradient through the damped inverse of the Fisher matrix of the last m gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from towtank.optim.rule import Role, Rule

Number = float | Tensor


class Hyper(NamedTuple):
    """Learning rate, momentum of the result, damping lambda of the Fisher matrix, gradients kept m."""

    lr: Number = 1e-3
    momentum: Number = 0.0
    damp: Number = 1e-5
    ngrads: Number = 32


class State(NamedTuple):
    """The last m gradients (m, ...), their inner products (m, m), and the average of past results."""

    grads: Tensor
    gram: Tensor
    average: Tensor


def init(param: Tensor, role: Role, hyper: Hyper) -> State:
    """Gradients of zeros.

    Raises:
        ValueError: if no gradient is to be kept.
    """
    m = int(hyper.ngrads)
    if m < 1:
        raise ValueError(f"ngrads = {hyper.ngrads}: expected a number >= 1")
    return State(param.new_zeros(m, *param.shape), param.new_zeros(m, m), torch.zeros_like(param))


def update(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number) -> tuple[Tensor, State]:
    """One step: u = (lambda I + 1/m sum_i g_i g_i^T)^-1 g;  a <- mu a + (1 - mu) u;  p <- p - lr a.

    The present gradient g is row j of the kept gradients G, so u = m G^T (m lambda I + G G^T)^-1 e_j: one system of m
    unknowns, and no difference of large numbers as in the recursion of the paper.

    The matrix is that of one tensor: blocks of the paper's matrix, which is over the whole model. A rule sees one tensor;
    on that rest ensembles, step counts per parameter and missing gradients. For the paper's matrix, train one flat parameter.

    Example:
        >>> state = init(torch.zeros(1), "vector", Hyper(lr=1.0, damp=0.5, ngrads=1))
        >>> update(torch.zeros(1), torch.tensor([2.0]), state, Hyper(lr=1.0, damp=0.5, ngrads=1), 1)[0]  # -2 / (0.5 + 4)
        tensor([-0.4444])

    Source: Frantar, Kurtic and Alistarh 2021, "M-FAC: efficient matrix-free approximations of second-order information",
    equation 2 and section 3.2.
    """
    m = state.grads.shape[0]
    here = torch.arange(m, device=grad.device) == (step - 1) % m
    grads = torch.where(here.reshape(-1, *(1,) * grad.ndim), grad, state.grads)
    flat = grads.reshape(m, -1)
    dots = flat @ grad.reshape(-1)
    gram = torch.where(here[:, None], dots, torch.where(here, dots[:, None], state.gram))
    exact = gram.double()  # m numbers squared: so that only the products, not the solution, are rounded to float32
    damping = torch.clamp(4 * torch.finfo(grad.dtype).eps * torch.trace(exact), min=m * hyper.damp)
    system = exact + damping * torch.eye(m, dtype=exact.dtype, device=grad.device)
    weights = torch.linalg.solve_ex(system, m * here.double())[0].to(grad.dtype)
    average = torch.lerp((weights @ flat).reshape(grad.shape), state.average, hyper.momentum)
    return param - hyper.lr * average, State(grads, gram, average)


RULE = Rule(
    name="mfac",
    hyper=Hyper,
    init=init,
    update=update,
    reach="tensor",
    decay="coupled",
    summary="the gradient through the damped inverse Fisher matrix of the last m gradients",
    source="Frantar, Kurtic and Alistarh 2021, equation 2",
    deviations=(
        "paper and official: one matrix over the whole model; here one per tensor. Train one flat parameter for theirs",
        "official: 1024 gradients are kept, 4 KB per parameter; here 32, and steps are up to 32 times shorter: the first "
        "is lr m / ||g||",
        "official: LU without pivots of m x m, which CPUs lack, then a difference that loses digits; here one system",
        "damping is never below the rounding of the inner products, 4 eps mean ||g||^2: 1e-5 is less in float32 if "
        "||g|| > 5",
    ),
    state_bytes=4 * 33,
    lr_vs_adamw=(0.01, 1.0),
)
