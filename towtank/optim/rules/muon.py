"""Muon: the momentum of a matrix with all its singular values brought near one."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from towtank.optim.rule import Role, Rule
from towtank.optim.rules import adamw
from towtank.optim.rules.orthogonal import orthogonalized

Number = float | Tensor


class Hyper(NamedTuple):
    """Learning rate, momentum, Nesterov (0, 1), smallest norm to divide by; AdamW's numbers for all but matrices."""

    lr: Number = 1e-3
    momentum: Number = 0.95
    nesterov: Number = 1.0
    eps: Number = 1e-7
    beta1: Number = 0.9
    beta2: Number = 0.999
    adamw_eps: Number = 1e-8


class State(NamedTuple):
    """Momentum of a matrix, of its shape."""

    momentum_buffer: Tensor


States = State | adamw.State


def init(param: Tensor, role: Role, hyper: Hyper) -> States:
    """No momentum; Adam's moments for embeddings, heads and vectors."""
    if role != "matrix" or param.ndim < 2:
        return adamw.init(param, role, adamw.Hyper())
    return State(torch.zeros_like(param))


def update(
    param: Tensor, grad: Tensor, state: States, hyper: Hyper, step: Number, half: bool = False, match_rms: bool = False
) -> tuple[Tensor, States]:
    """One step: m <- mu m + (1 - mu) g;  p <- p - lr sqrt(max(1, rows / columns)) NS(mu m + (1 - mu) g).

    Without Nesterov NS(m). A convolution is a matrix of (out, the rest). Embeddings, heads and vectors take AdamW. `half`
    and `match_rms` are those of the variants.

    Source: Jordan 2024; the shape factor as in torch.optim.Muon ("original").
    """
    if isinstance(state, adamw.State):
        numbers = adamw.Hyper(hyper.lr, hyper.beta1, hyper.beta2, hyper.adamw_eps)
        return adamw.update(param, grad, state, numbers, step)
    m = torch.lerp(grad, state.momentum_buffer, hyper.momentum)
    ahead = hyper.nesterov * torch.lerp(grad, m, hyper.momentum) + (1 - hyper.nesterov) * m
    matrix = ahead.reshape(ahead.shape[0], -1)
    rows, columns = matrix.shape
    factor = 0.2 * max(rows, columns) ** 0.5 if match_rms else max(1, rows / columns) ** 0.5
    turned = orthogonalized(matrix.bfloat16() if half else matrix, hyper.eps).to(param.dtype)
    return param - (hyper.lr * factor) * turned.reshape(param.shape), State(m)


_PAPER = Rule(
    name="muon",
    hyper=Hyper,
    init=init,
    update=update,
    reach="tensor",
    weight_decay=0.1,
    summary="momentum of a matrix with its singular values brought near one",
    source="Jordan 2024; match_rms_adamw: Liu et al. 2025, section 2.2",
    deviations=(
        "official (torch.optim.Muon): Newton-Schulz in bfloat16, from 1 % of a step apart to 30 % where singular values are "
        "small, and not the same for a member of an ensemble; here in the parameter's precision. Variant 'official' is "
        "torch's, bit by bit; 'match_rms_adamw' has torch's factor for AdamW's rates, 'official_match_rms_adamw' has both",
        "torch refuses all but matrices; here convolutions are matrices (out, rest), the others take AdamW by role",
        "the author's package takes the shape factor of a convolution from its kernel's sides, so 1; here from the matrix",
        "the five steps and their coefficients are fixed",
    ),
    state_bytes=4,
    lr_vs_adamw=(0.5, 20.0),
)
_VARIANTS = {
    "official": {"half": True},
    "match_rms_adamw": {"match_rms": True},
    "official_match_rms_adamw": {"half": True, "match_rms": True},
}
_OTHERS = {name: replace(_PAPER, update=functools.partial(update, **kind)) for name, kind in _VARIANTS.items()}
RULE = replace(_PAPER, variants={"paper": _PAPER, **_OTHERS})
