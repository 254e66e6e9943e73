"""SNT-ASGD against its formula, and against torch where nothing is removed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import towtank.optim as optim
from tests.optim.golden import PROBLEMS, far_apart, formula, tolerance, walk
from towtank.optim.rules import snt_asgd

LR, WD = 3e-3, 0.1
GAP, RANK = 10, 2


def snt_asgd_formula(p, g, s, t, masks):
    """The average of each weight since it came to be, from the whole history; but its first value, which is left out."""
    p = p - LR * (g + WD * p)
    mask = masks(p, t)
    s["born"] = np.where(mask, np.where(s.get("alive", 0 * p > 0), s.get("born", 0 * p), t), 0)
    s["alive"] = mask
    s["history"] = [*s.get("history", []), p]
    average = 0 * p
    for index in np.ndindex(p.shape):
        past = [h[index] for i, h in enumerate(s["history"], start=1) if i >= s["born"][index] + 1]
        average[index] = (np.mean(past) if past else p[index]) if mask[index] else 0
    s["ax"] = average
    return p


def with_averages(make, problem, before=None):
    """The parameters at the end of a walk, and the averages `ax` that the optimizer keeps of them."""
    kept = []

    def keep(params):
        kept.append((make(params), params))
        return kept[0][0]

    end = walk(keep, problem, before)
    optimizer, params = kept[0]
    return end, [optimizer.state[p]["ax"] for p in params]


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_snt_asgd_averages_each_weight_since_it_came_to_be(problem: str, engine: str) -> None:
    """Masks change at steps 6 and 15, as a sparse trainer would."""

    def masks(p, t):
        phase = (t >= 6) + (t >= 15)
        return (np.arange(p.size).reshape(p.shape) + phase) % 3 > 0 if phase else np.ones(p.shape, dtype=bool)

    def set_masks(optimizer, params, step, t):
        for p in params if t in (6, 15) else ():
            optimizer.state[p]["mask"].copy_(torch.from_numpy(masks(p.detach().numpy(), t)))

    averages = []

    def step(p, g, s, t):
        new = snt_asgd_formula(p, g, s, t, masks)
        if t == 25:
            averages.append(s["ax"])
        return new

    theirs = formula(step, PROBLEMS[problem]())
    make = lambda p: optim.SNTASGD(p, lr=LR, weight_decay=WD, engine=engine)  # noqa: E731
    ours, ax = with_averages(make, PROBLEMS[problem](), set_masks)
    assert far_apart(ours, theirs) < tolerance(problem)
    assert far_apart(ax, averages) < tolerance(problem)


def test_snt_asgd_takes_zeros_for_removed_weights_unless_all_are_zero() -> None:
    masks = [snt_asgd.init(torch.tensor(x), "matrix", snt_asgd.Hyper()).mask for x in ([1.0, 0.0], [0.0, 0.0])]
    assert [m.tolist() for m in masks] == [[1, 0], [1, 1]]


def test_snt_asgd_without_masks_is_torchs_asgd_from_the_first_step() -> None:
    """The authors' scripts pass t0 = 0 and lambd = 0; the average then is torch's too."""
    ours, ax = with_averages(lambda p: optim.SNTASGD(p, lr=LR, weight_decay=WD), PROBLEMS["rosenbrock"]())
    torchs = lambda p: torch.optim.ASGD(p, lr=LR, weight_decay=WD, t0=0, lambd=0)  # noqa: E731
    theirs, their_ax = with_averages(torchs, PROBLEMS["rosenbrock"]())
    assert far_apart([*ours, *ax], [*theirs, *their_ax]) < 1e-8  # torch keeps its rates in float32: 6e-8 of 0.1
