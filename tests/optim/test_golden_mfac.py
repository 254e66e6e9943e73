"""M-FAC against a dense inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import towtank.optim as optim
from tests.optim.golden import PROBLEMS, Recorded, far_apart, formula, walk
from towtank.optim.rules import mfac

LR, WD = 3e-3, 0.1
GAP, RANK = 10, 2


def mfac_formula(p, g, s, t, damp=1e-5, m=8, momentum=0.0, decay=0.0):
    """Frantar et al. 2021, equation 2, densely; the window starts with zeros."""
    g = (g + decay * p).reshape(-1)
    s["window"] = (s.get("window", []) + [g])[-m:]
    window = np.stack(s["window"])
    fisher = damp * np.eye(len(g)) + window.T @ window / m
    s["a"] = momentum * s.get("a", 0) + (1 - momentum) * np.linalg.solve(fisher, g)
    return p - LR * s["a"].reshape(p.shape)


DENSE = {
    "official damping": ("rosenbrock", {"damp": 1e-5}, 1e-10),
    "momentum": ("rosenbrock", {"damp": 1e-5, "momentum": 0.9}, 1e-10),
    # decay feeds the weights back through 1 / damp: lr WD / damp must be small for rounding to stay
    "decay": ("rosenbrock", {"damp": 1e-2, "decay": WD}, 1e-10),
    # rounding is amplified by ||g||^2 / (m damp), about 10
    "float32": ("network", {"damp": 1e-2, "decay": WD}, 1e-6),
}


@pytest.mark.parametrize("case", DENSE)
def test_mfac_equals_a_dense_inverse_per_tensor(case: str) -> None:
    problem, numbers, bound = DENSE[case]
    options = {"weight_decay": numbers.get("decay", 0.0)} | {k: v for k, v in numbers.items() if k != "decay"}
    ours = walk(lambda p: optim.MFAC(p, lr=LR, ngrads=8, **options), PROBLEMS[problem]())
    theirs = formula(lambda p, g, s, t: mfac_formula(p, g, s, t, **numbers), PROBLEMS[problem]())
    assert far_apart(ours, theirs) < bound
    assert far_apart(ours, PROBLEMS[problem]()[0]) > 1e-2


def test_mfac_of_one_flat_parameter_is_the_papers_matrix_over_the_whole_model() -> None:
    start, grads = PROBLEMS["rosenbrock"]()
    flat: Recorded = (
        [torch.cat([p.flatten() for p in start])],
        [[torch.cat([g.flatten() for g in step])] for step in grads],
    )
    ours = walk(lambda p: optim.MFAC(p, lr=LR, ngrads=8), flat)
    theirs = formula(mfac_formula, flat)
    assert far_apart(ours, theirs) < 1e-10


def test_mfac_stays_finite_where_float32_loses_the_damping() -> None:
    """Equal gradients make G G^T singular, and 1e-5 is nothing beside 1e8: the step is still -g / ||g||^2."""
    g = torch.full((6,), 1e4)
    state, hyper = mfac.init(torch.zeros(6), "vector", mfac.Hyper()), mfac.Hyper(lr=1.0)
    for t in range(1, 70):
        new, state = mfac.update(torch.zeros(6), g, state, hyper, t)
    # (lambda + ||g||^2)^-1 g once the window is full of g. Inner products of 6 numbers are off by 6 2^-24 of ||g||^2, so their
    # m x m matrix by up to m times that, and its damping is 4 2^-23 m ||g||^2
    torch.testing.assert_close(new, -g / (g @ g), rtol=6 / (4 * 2), atol=0)
