"""Curvature of batches: spiked Wigner matrices on both sides of the transition, planted laws, and real small networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.state import fingerprint
from tests.worlds import normal, spiked_wigner
from towtank.linalg.operator import LinearOperator
from towtank.problem import Problem
from towtank.signals.batch_curvature import batch_curvature, drawn, inflation
from towtank.signals.stability import largest

SIZES = (16, 32, 64, 128, 256, 512)


@pytest.mark.parametrize("s", [0.2, 0.5, 1.5, 3.0])
def test_the_formula_on_one_draw_of_a_thousand(s: float) -> None:
    """1 + s^2 above the threshold, 2 s below; 3 % is four standard deviations of the outlier and of the edge."""
    A, expected, _ = spiked_wigner(1000, 1.0, s)
    found = largest(LinearOperator.from_matrix(A), tol=1e-3, max_products=400)
    assert found.value == pytest.approx(expected, rel=0.03)
    assert expected == pytest.approx(1 + s**2 if s < 1 else 2 * s)


@pytest.mark.parametrize(("critical", "exponent"), [(8.0, "1/b"), (2048.0, "1/sqrt(b)")])
def test_both_regimes_of_spiked_wigner_matrices(critical: float, exponent: str) -> None:
    """A clean eigenvalue 1 in noise of s^2 = critical / b: detached for every b above the critical one, an edge below.

    One draw: the intervals leave out the truth once in 20, and then say "neither".
    """

    def batch(case: tuple[int, int]) -> LinearOperator:
        b, seed = case
        return LinearOperator.from_matrix(spiked_wigner(300, 1.0, (critical / b) ** 0.5, seed=100 * seed + b)[0])

    found = batch_curvature(batch, {b: [(b, i) for i in range(3)] for b in SIZES})
    assert found.exponent == exponent and found.p is not None
    assert found.critical is not None and found.limit is not None
    if exponent == "1/b":
        assert found.limit.value == pytest.approx(1, rel=0.03) and found.critical.value == pytest.approx(8, rel=0.25)
    else:
        assert found.critical.high > max(SIZES)
    means = list(found.readings().values())
    assert means == sorted(means, reverse=True) and found.readings().keys() == {f"curvature/batch/{b}" for b in SIZES}


@pytest.mark.parametrize(("p", "exponent"), [(1.0, "1/b"), (0.5, "1/sqrt(b)")])
def test_planted_laws_are_recovered_in_almost_every_draw(p: float, exponent: str) -> None:
    """4 sizes of 4 batches, 2 % noise: the other regime is never named, and the limit 3 is within its interval."""
    b = np.repeat([16.0, 64.0, 256.0, 1024.0], 4)
    named, covered = [], 0
    for seed in range(8):
        y = 3 * (1 + (20 / b) ** p) * (1 + 0.02 * np.random.default_rng(seed).standard_normal(b.size))
        found = inflation(b, y, seed=seed)
        named.append(found.exponent)
        covered += found.limit is not None and 3.0 in found.limit
    assert set(named) <= {exponent, "cannot tell", "neither"} and named.count(exponent) >= 6
    assert covered >= 6  # fewer has a chance of 0.6 % at 95 %


def test_noise_that_hides_the_law_is_not_decided() -> None:
    b = np.repeat([16.0, 24.0, 32.0, 48.0], 3)
    named = []
    for seed in range(4):
        y = 3 * (1 + 20 / b) * (1 + 0.2 * np.random.default_rng(seed).standard_normal(b.size))
        named.append(inflation(b, np.abs(y), seed=seed).exponent)
    assert named.count("cannot tell") >= 3


def test_the_population_is_corrected_for() -> None:
    """Batches of 600 examples: 1 + 8 / b' with b' = b / (1 - b / 600)."""
    b = np.repeat([16.0, 32.0, 64.0, 128.0, 256.0, 512.0], 3)
    y = (1 + 8 / (b / (1 - b / 600))) * (1 + 0.001 * np.tile([1.0, 0.0, -1.0], 6))
    found = inflation(b, y, population=600)
    assert found.exponent == "1/b" and found.limit is not None and found.critical is not None
    assert found.limit.value == pytest.approx(1, rel=2e-3) and found.critical.value == pytest.approx(8, rel=0.02)


def network() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 4))
    x = normal(400, 10, seed=0).float()
    y = (x[:, :4] + 0.5 * normal(400, 4, seed=1).float()).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model, (x, y)


def test_batches_of_a_real_network() -> None:
    """The largest eigenvalue is convex in the Hessian: its mean over batches cannot be below that of all examples."""
    model, data = network()
    before = fingerprint(model)
    problem = lambda batch: Problem(model, F.cross_entropy, batch)  # noqa: E731
    found = batch_curvature(problem, drawn(data, [8, 16, 32, 64, 128], 4), population=400)
    assert fingerprint(model) == before
    means = list(found.readings().values())
    assert means == sorted(means, reverse=True)
    whole = batch_curvature(problem, {400: [data]}).curvature[0]
    assert means[-1] >= 0.98 * whole and means[0] > 1.2 * whole
    assert found.limit is not None and found.limit.low < 1.1 * whole


def test_too_little_data_refuses() -> None:
    found = inflation([8, 8, 16, 16, 32, 32], [3, 3, 2, 2, 1.5, 1.5])
    assert found.exponent == "cannot tell" and found.verdict.status == "refuse" and found.limit is None
    assert inflation([8, 16, 32, 64], [4, 3, 2, 1]).verdict.status == "refuse"
    assert inflation([], []).verdict.status == "refuse"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="one curvature"):
        inflation([8, 16], [1.0])
    for bad in (-1.0, 0.0, math.nan):
        with pytest.raises(ValueError, match="positive"):
            inflation([8, 16], [1.0, bad])
    with pytest.raises(ValueError, match="below the 16"):
        inflation([8, 16], [1.0, 1.0], population=16)
    with pytest.raises(ValueError, match="batch sizes"):
        drawn(torch.ones(4), [5], 1)
    with pytest.raises(ValueError, match="batch sizes"):
        drawn((torch.ones(4), torch.ones(3)), [2], 1)


def test_drawn_batches_have_no_example_twice_and_repeat_by_seed() -> None:
    data = {"x": torch.arange(20), "labels": torch.arange(20) + 100}
    found, again = drawn(data, [5, 20], 3, seed=4), drawn(data, [5, 20], 3, seed=4)
    for b, batches in found.items():
        for batch, same in zip(batches, again[b], strict=True):
            assert len(set(batch["x"].tolist())) == b and torch.equal(batch["labels"], batch["x"] + 100)
            assert torch.equal(batch["x"], same["x"])
