"""GaLore: Adam on the gradient's projection onto its leading singular vectors."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from towtank.optim.rule import Role, Rule
from towtank.optim.rules import adamw, lowrank

Number = float | Tensor


class Hyper(NamedTuple):
    """Adam's numbers, rank of the projection, steps from one basis to the next, scale of a projected step."""

    lr: Number = 1e-3
    beta1: Number = 0.9
    beta2: Number = 0.999
    eps: Number = 1e-6
    rank: Number = 128
    update_proj_gap: Number = 200
    scale: Number = 0.25


class State(NamedTuple):
    """Basis (short, rank) and Adam's moments (long, rank) of a matrix of sides long >= short."""

    basis: Tensor
    m: Tensor
    v: Tensor


States = State | adamw.State


def init(param: Tensor, role: Role, hyper: Hyper) -> States:
    """Nothing seen; Adam's moments for embeddings, heads and vectors."""
    if not lowrank.projected(param, role):
        return adamw.init(param, role, adamw.Hyper())
    return State(*lowrank.zeros(param, hyper.rank, hyper.update_proj_gap))


def begin(state: States, grad: Tensor, hyper: Hyper) -> States:
    """At steps 1, 1 + gap, ...: a new basis under the old moments. A hook, so that an SVD is paid only then.

    In the pure update the choice would have to be `torch.where` for traced steps: an SVD at every step.
    """
    if isinstance(state, adamw.State):
        return state
    return state._replace(basis=lowrank.leading(grad, state.basis.shape[1]))


def update(
    param: Tensor, grad: Tensor, state: States, hyper: Hyper, step: Number, *, official: bool = False
) -> tuple[Tensor, States]:
    """One step: R = G Q;  N = Adam(R);  p <- p - lr scale N Q^T, with Q the leading singular vectors of the shorter side.

    Source: Zhao et al. 2024, "GaLore: memory-efficient LLM training by gradient low-rank projection", algorithm 2.
    """
    if isinstance(state, adamw.State):
        return lowrank.adam_step(param, grad, state, hyper, step, official=official)
    low = lowrank.tall(grad) @ state.basis
    direction, factor, m, v = lowrank.adam(low, state.m, state.v, hyper, step, official=official)
    full = lowrank.restored(direction @ state.basis.mT, param)
    return param - (hyper.lr * factor * hyper.scale) * full, State(state.basis, m, v)


def _statistics(param: Tensor, grad: Tensor, state: States, hyper: Hyper, step: Number) -> dict[str, Tensor]:
    return {} if isinstance(state, adamw.State) else {"captured": lowrank.captured(grad, state.basis)}


_PAPER = Rule(
    name="galore",
    hyper=Hyper,
    init=init,
    begin=begin,
    again="update_proj_gap",
    update=update,
    reach="tensor",
    statistics=_statistics,
    summary="Adam on the gradient's projection onto its leading singular vectors",
    source="Zhao et al. 2024, algorithm 2",
    deviations=(
        "official: epsilon beside the uncorrected root, so up to 30 times larger in the first steps; variant 'official'",
        "official: decay multiplies the moved weights, lr^2 lambda apart; here it acts beside the step",
        "official: SVD in float32 also for float64, and its projector object keeps a state from loading with "
        "weights_only; here a tensor of the gradient's precision",
        "official: convolutions crash; here they are matrices (out, rest). Embeddings and heads are told by role, not name",
        "after a refresh old moments meet new singular vectors, whose signs are the SVD's: as officially",
        "a popular collection refreshes one step early: 1e-2 apart",
    ),
    state_bytes=3,  # of a matrix 512 x 512 at rank 128
    lr_vs_adamw=(1.0, 10.0),
)
_OFFICIAL = replace(_PAPER, update=functools.partial(update, official=True))
RULE = replace(_PAPER, variants={"paper": _PAPER, "official": _OFFICIAL})
