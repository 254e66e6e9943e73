"""SCALE: each row of the gradient at unit size, with momentum for the last layer alone."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from towtank.optim.rowwise import row_length, row_sum
from towtank.optim.rule import Role, Rule
from towtank.optim.rules import adamw

Number = float | Tensor


class Hyper(NamedTuple):
    """Learning rate, momentum of the head, epsilon, and AdamW's decay rates for vectors."""

    lr: Number = 1e-4
    beta: Number = 0.9
    eps: Number = 1e-8
    beta1: Number = 0.9
    beta2: Number = 0.999


class MatrixState(NamedTuple):
    """A matrix keeps nothing."""


class EmbeddingState(NamedTuple):
    """An embedding keeps nothing; it is normalized along its vocabulary."""


class HeadState(NamedTuple):
    """Momentum of the last layer."""

    m: Tensor


State = MatrixState | EmbeddingState | HeadState | adamw.State


def init(param: Tensor, role: Role, hyper: Hyper) -> State:
    """Nothing for matrices and embeddings, momentum for the head, Adam's moments for vectors."""
    if role == "vector" or param.ndim < 2:
        return adamw.init(param, role, adamw.Hyper())
    if role == "head":
        return HeadState(torch.zeros_like(param))
    return EmbeddingState() if role == "embedding" else MatrixState()


def update(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number) -> tuple[Tensor, State]:
    """One step: p <- p - lr g / (rms(g) + eps), over the inputs of each row (embeddings: over the vocabulary).

    The head does the same with m <- b m + (1 - b) g; vectors take AdamW.

    Source: Glentis et al. 2025, "A minimalist optimizer design for LLM pretraining", algorithm 1; RMS as in the code.
    """
    return _update(param, grad, state, hyper, step, 1.0)


def update_norm(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number) -> tuple[Tensor, State]:
    """One step as the paper writes it, by the Euclidean norm: sqrt(inputs) times smaller."""
    return _update(param, grad, state, hyper, step, 0.0)


def _update(param: Tensor, grad: Tensor, state: State, hyper: Hyper, step: Number, mean: float) -> tuple[Tensor, State]:
    if isinstance(state, adamw.State):
        return adamw.update(param, grad, state, adamw.Hyper(hyper.lr, hyper.beta1, hyper.beta2, hyper.eps), step)
    if isinstance(state, EmbeddingState):
        squares = torch.sum(torch.square(grad), 0, keepdim=True) / grad.shape[0] ** mean
        return param - hyper.lr * (grad / (torch.sqrt(squares) + hyper.eps)), state
    m = torch.lerp(grad, state.m, hyper.beta) if isinstance(state, HeadState) else grad
    squares = row_sum(torch.square(m)) / row_length(grad) ** mean
    moved = param - hyper.lr * (m / (torch.sqrt(squares) + hyper.eps))
    return moved, HeadState(m) if isinstance(state, HeadState) else state


_OFFICIAL = Rule(
    name="scale",
    hyper=Hyper,
    init=init,
    update=update,
    reach="row",
    summary="each row of the gradient at unit size, momentum for the last layer alone",
    source="Glentis et al. 2025, algorithm 1",
    deviations=(
        "paper: normalized by the norm, code by the root mean square, sqrt(inputs) times larger; the published learning "
        "rates go with the code, which is the default; variant 'paper' is the norm",
        "official: convolutions crash; here their rows are normalized over input channels and kernel",
        "roles (embedding, head) come from the parameter groups, not from module names",
    ),
    state_bytes=0.0,
    lr_vs_adamw=(0.1, 1.0),
)
RULE = replace(_OFFICIAL, variants={"official": _OFFICIAL, "paper": replace(_OFFICIAL, update=update_norm)})
