"""Fira: GaLore, and what it leaves out of the gradient, scaled row by row like the part that Adam sees."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from towtank.optim.rule import Role, Rule
from towtank.optim.rules import adamw, galore, lowrank

Number = float | Tensor
GROWTH = 1.01  # by how much the residual's norm may grow in one step
EPS = 1e-8  # of the two ratios of norms


class Hyper(NamedTuple):
    """Adam's numbers, rank of the projection, steps from one basis to the next, scale of a projected step."""

    lr: Number = 1e-3
    beta1: Number = 0.9
    beta2: Number = 0.999
    eps: Number = 1e-6
    rank: Number = 128
    update_proj_gap: Number = 200
    alpha: Number = 1.0


class State(NamedTuple):
    """GaLore's state of a matrix, and the norm of the last residual (0-d; zero: none yet)."""

    basis: Tensor
    m: Tensor
    v: Tensor
    norm: Tensor


States = State | adamw.State


def init(param: Tensor, role: Role, hyper: Hyper) -> States:
    """Nothing seen; Adam's moments for embeddings, heads and vectors."""
    if not lowrank.projected(param, role):
        return adamw.init(param, role, adamw.Hyper())
    return State(*lowrank.zeros(param, hyper.rank, hyper.update_proj_gap), param.new_zeros(()))


def update(
    param: Tensor, grad: Tensor, state: States, hyper: Hyper, step: Number, *, official: bool = False
) -> tuple[Tensor, States]:
    """One step: GaLore's N = Adam(R), R = G Q, and S = phi (G - R Q^T);  p <- p - lr (alpha N Q^T + S).

    phi = ||N_row|| / ||R_row|| over the rows of the longer side, and ||S|| grows at most by 1.01 from step to step.

    Source: Chen et al. 2024, "Fira: can we achieve full-rank training of LLMs under low-rank constraint?", algorithm 1.
    """
    if isinstance(state, adamw.State):
        return lowrank.adam_step(param, grad, state, hyper, step, official=official)
    direction, factor, m, v, residual = _parts(grad, state, hyper, step, official)
    norm = torch.linalg.vector_norm(residual)
    limit = torch.where(state.norm > 0, torch.clamp(norm / (state.norm + EPS), min=GROWTH) / GROWTH, 1.0)
    full = hyper.alpha * (direction @ state.basis.mT) + residual / limit
    moved = param - (hyper.lr * factor) * lowrank.restored(full, param)
    return moved, State(state.basis, m, v, norm / limit)


def _parts(grad, state, hyper, step, official):  # noqa: ANN001, ANN202
    tall = lowrank.tall(grad)
    low = tall @ state.basis
    direction, factor, m, v = lowrank.adam(low, state.m, state.v, hyper, step, official=official)
    after, before = (torch.linalg.vector_norm(x, dim=1, keepdim=True) for x in (direction, low))
    inside = (hyper.alpha if official else 1.0) * (low @ state.basis.mT)
    return direction, factor, m, v, after / (before + EPS) * (tall - inside)


def _statistics(param, grad, state, hyper, step, official=False):  # noqa: ANN001, ANN202
    if isinstance(state, adamw.State):
        return {}
    norm = torch.linalg.vector_norm(_parts(grad, state, hyper, step, official)[-1])
    growth = torch.where(state.norm > 0, norm / (state.norm + EPS), 1.0)
    return {"norm_growth": growth, "captured": lowrank.captured(grad, state.basis)}


_PAPER = Rule(
    name="fira",
    hyper=Hyper,
    init=init,
    begin=galore.begin,  # pyright: ignore[reportArgumentType]
    again="update_proj_gap",
    update=update,
    reach="tensor",
    statistics=_statistics,
    summary="GaLore, and what it leaves out scaled like the part that Adam sees",
    source="Chen et al. 2024, algorithm 1",
    deviations=(
        "official: the limiter compares norms before bias correction, and epsilon stands beside the uncorrected root; "
        "here both follow the formula. Variant 'official' is the code",
        "official: alpha also scales the projection that is subtracted, so alpha != 1 leaves (1 - alpha) of the "
        "projected gradient in the residual; here, not in variant 'official', it scales the step alone",
        "official: a residual of exactly zero lets the next ones grow from 1e-8 only; here the limit starts anew",
        "decay, SVD, convolutions, roles and signs: as said of GaLore",
    ),
    state_bytes=3,  # of a matrix 512 x 512 at rank 128
    lr_vs_adamw=(1.0, 10.0),
)
_OFFICIAL = replace(_PAPER, update=partial(update, official=True), statistics=partial(_statistics, official=True))
RULE = replace(_PAPER, variants={"paper": _PAPER, "official": _OFFICIAL})
