"""The bounds of SGD against the exact second moment of its distance from a minimum; the probes against closed forms."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from tests.state import fingerprint
from tests.worlds import linear_regression, logistic_regression, quadratic_bowl
from towtank import optim
from towtank.problem import Problem
from towtank.signals.sgd_stability import curvature_frobenius, curvature_trace, fisher_trace, sgd_ratios
from towtank.signals.step import CannotTell, Step

F64 = torch.float64
SIGMAS = 4.5


def radius(X: NDArray, lr: float, batch: int, momentum: float = 0.0) -> float:
    """Spectral radius of E[A (x) A], A the linear map that one step of SGD applies to (e_t, e_{t-1}).

    With H_B the mean of x x^T over B independent draws, the mean of A (x) A is that of a single draw weighted 1 / B plus that
    of the mean weighted 1 - 1 / B.
    """
    n, d = X.shape

    def step(H: NDArray) -> NDArray:
        top = np.hstack([(1 + momentum) * np.eye(d) - lr * H, -momentum * np.eye(d)])
        return np.vstack([top, np.hstack([np.eye(d), np.zeros((d, d))])])

    single = sum(np.kron(A, A) for A in (step(np.outer(x, x)) for x in X)) / n
    mean = step(X.T @ X / n)
    moment = single / batch + (1 - 1 / batch) * np.kron(mean, mean)
    return float(np.abs(np.linalg.eigvals(moment)).max())


def threshold(X: NDArray, batch: int, momentum: float = 0.0) -> float:
    """The learning rate at which SGD stops being stable, by bisection; the largest eigenvalue at 0 is 1."""
    low, high = 0.0, 1e3
    for _ in range(40):
        lr = (low + high) / 2
        low, high = (low, lr) if radius(X, lr, batch, momentum) > 1 + 1e-10 else (lr, high)
    return low


def examples(seed: int, n: int = 7, d: int = 3, equal: bool = False) -> NDArray:
    X = np.random.default_rng(seed).standard_normal((n, d)) * np.array([2.0, 1.0, 0.5])[:d]
    return 1.7 * X / np.linalg.norm(X, axis=1, keepdims=True) if equal else X


def ratios(X: NDArray, lr: float, batch: int, momentum: float = 0.0) -> Any:
    H = X.T @ X / len(X)
    return sgd_ratios(float(np.trace(H)), float(np.linalg.norm(H)), lr=lr, batch_size=batch, momentum=momentum)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_beyond_the_trace_bound_sgd_is_unstable(batch: int) -> None:
    for seed in range(6):
        X = examples(seed)
        assert ratios(X, threshold(X, batch), batch).trace <= 1 + 1e-6


def test_at_batch_one_and_equal_norms_the_trace_bound_is_exact() -> None:
    for seed in range(6):
        X = examples(seed, equal=True)
        assert ratios(X, threshold(X, 1), 1).trace == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_momentum_makes_the_trace_bound_stricter_by_one_minus_mu(momentum: float) -> None:
    """Between 1 and 1 / (1 - 2 mu / (1 + mu) lambda_1 / tr(H)): to first order in lambda_1 / tr(H)."""
    for seed in range(3):
        X = examples(seed, equal=True)
        values = np.linalg.eigvalsh(X.T @ X / len(X))
        most = 1 / (1 - 2 * momentum / (1 + momentum) * values[-1] / values.sum())
        assert 1 - 1e-6 <= ratios(X, threshold(X, 1, momentum), 1, momentum).trace <= most + 1e-6


@pytest.mark.parametrize("batch", [1, 4, 32])
@pytest.mark.parametrize("spectrum", [np.ones(20), np.geomspace(1, 1e-3, 30), np.array([5.0] + [0.1] * 50)], ids=len)
def test_beyond_the_frobenius_bound_sgd_is_unstable_for_gaussian_examples(spectrum: NDArray, batch: int) -> None:
    """E[x x^T M x x^T] = 2 H M H + tr(H M) H (Isserlis); the diagonal of M then moves by itself, by this matrix."""
    lr = 1.0001 * batch**0.5 / float(np.linalg.norm(spectrum))
    own = 1 - 2 * lr * spectrum + lr**2 * spectrum**2 * (1 + 1 / batch)
    moment = np.diag(own) + lr**2 / batch * np.outer(spectrum, spectrum)
    assert np.abs(np.linalg.eigvals(moment)).max() > 1
    found = sgd_ratios(float(spectrum.sum()), float(np.linalg.norm(spectrum)), lr=lr, batch_size=batch)
    assert found.frobenius == pytest.approx(1.0001)


def test_one_repeated_example_has_no_noise_and_the_frobenius_bound_is_none() -> None:
    """What the docstring says of alignment 0: stable up to lr |x|^2 = 2, where the Frobenius ratio is 2."""
    X = np.repeat(examples(0, n=1), 4, axis=0)
    found = ratios(X, threshold(X, 1), 1)
    assert found.trace == pytest.approx(1, rel=1e-6) and found.frobenius == pytest.approx(2, rel=1e-6)


def step_of(world: Any, optimizer: Any, batch: Any = "probe", **more: Any) -> Step:
    return Step(
        number=3,
        loss=torch.zeros(()),
        model=world.model,
        optimizer=optimizer and optimizer(world.model.parameters(), **more),
        batch=world.data if isinstance(batch, str) else batch,
        problem_of=lambda data: Problem(world.model, world.loss, data),
        probe_batch=world.data,
    )


SPECTRUM = torch.cat([torch.tensor([9.0, -2.0], dtype=F64), torch.linspace(0.1, 1.0, 48, dtype=F64)])


@pytest.mark.parametrize("make", [torch.optim.SGD, optim.SGD])
def test_trace_and_norm_of_a_known_spectrum(make: Any) -> None:
    step = step_of(quadratic_bowl(SPECTRUM), make, lr=0.02, momentum=0.5)
    t, f = curvature_trace(0.05)(step), curvature_frobenius(0.05)(step)
    assert abs(t["curvature/trace"] - float(SPECTRUM.sum())) <= SIGMAS * t["curvature/trace_error"]
    assert abs(f["curvature/frobenius"] - float(SPECTRUM.norm())) <= SIGMAS * f["curvature/frobenius_error"]
    assert t["curvature/trace_error"] <= 0.05 * t["curvature/trace"]
    assert t["stability/trace_ratio"] == pytest.approx(
        0.04 * t["curvature/trace"] / (2 * 50)
    )  # 50 examples in the batch
    assert f["stability/frobenius_ratio"] == pytest.approx(0.04 * f["curvature/frobenius"] / 50**0.5)
    given = curvature_trace(0.05, batch_size=1)(step)
    assert given["stability/trace_ratio"] == pytest.approx(50 * t["stability/trace_ratio"])


def test_interpolating_regression_at_the_bound() -> None:
    """The probe's ratio is that of the exact operator: 40 examples of equal norm in 3 dimensions, batch of one."""
    world = linear_regression(n=40, size=3)
    X = examples(0, n=40, equal=True)
    world.model.weight.data.zero_()  # type: ignore[union-attr, operator]
    data = torch.from_numpy(X), torch.zeros(40, 1, dtype=F64)
    lr = threshold(X, 1)
    optimizer = torch.optim.SGD(world.model.parameters(), lr=lr)
    step = Step(
        number=1,
        loss=torch.zeros(()),
        model=world.model,
        optimizer=optimizer,
        batch=(data[0][:1], data[1][:1]),
        problem_of=lambda batch: Problem(world.model, world.loss, batch),
        probe_batch=data,
    )
    assert curvature_trace()(step)["stability/trace_ratio"] == pytest.approx(1, rel=1e-6)


def test_other_optimizers_have_no_ratio() -> None:
    for make in (torch.optim.Adam, None):
        step = step_of(quadratic_bowl(SPECTRUM), make)
        assert set(curvature_trace()(step)) == {"curvature/trace", "curvature/trace_error"}
        assert set(curvature_frobenius()(step)) == {"curvature/frobenius", "curvature/frobenius_error"}


@pytest.mark.parametrize("batch", [None, (torch.ones(3, 2), torch.ones(4))])
def test_a_batch_that_does_not_say_how_many(batch: Any) -> None:
    step = step_of(quadratic_bowl(SPECTRUM), torch.optim.SGD, batch, lr=0.1)
    with pytest.raises(CannotTell, match="batch_size"):
        curvature_trace()(step)
    assert "stability/trace_ratio" in curvature_trace(batch_size=8)(step)


def test_the_fisher_trace_of_logistic_regression() -> None:
    world = logistic_regression(n=60, size=25)
    said = fisher_trace(0.05)(step_of(world, torch.optim.Adam))
    assert world.fisher_trace is not None
    assert (
        abs(said["curvature/fisher_trace"] - world.fisher_trace) <= SIGMAS * said["curvature/fisher_trace_error"] + 1e-9
    )


def test_the_fisher_trace_over_sampled_labels_by_a_loop() -> None:
    """sum_y p(y) |grad log p(y)|^2 over all labels of a softmax network, one gradient each."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        x = torch.randn(8, 4, dtype=F64)
    total = 0.0
    for row in x:
        p = model(row).softmax(-1).detach()
        for y in range(3):
            grads = torch.autograd.grad(model(row).log_softmax(-1)[y], list(model.parameters()))
            total += float(p[y] * sum(g.square().sum() for g in grads)) / len(x)
    step = Step(
        number=1,
        loss=torch.zeros(()),
        model=model,
        problem_of=lambda batch: Problem(model, F.cross_entropy, batch),
        probe_batch=(x, torch.zeros(8, dtype=torch.long)),
    )
    before = fingerprint(model)
    said = fisher_trace(0.02, max_products=4000)(step)
    assert abs(said["curvature/fisher_trace"] - total) <= SIGMAS * said["curvature/fisher_trace_error"] + 1e-9
    assert fingerprint(model) == before


def test_what_cannot_be_told() -> None:
    world = quadratic_bowl(SPECTRUM)
    with pytest.raises(CannotTell, match="likelihood"):
        fisher_trace()(step_of(world, torch.optim.SGD))
    bad = Step(
        number=1,
        loss=torch.zeros(()),
        model=world.model,
        problem_of=lambda batch: Problem(world.model, world.loss, batch),
        probe_batch=(world.data[0] * math.nan, world.data[1]),
    )
    for probe in (curvature_trace(), curvature_frobenius(), fisher_trace()):
        with pytest.raises(CannotTell):
            probe(bad)
        with pytest.raises(CannotTell, match="batch"):
            probe(Step(number=1, loss=torch.zeros(()), model=world.model))
    with pytest.raises(ValueError, match="batch of at least 1"):
        sgd_ratios(1.0, 1.0, lr=0.1, batch_size=0)


def test_nothing_of_the_users_is_changed() -> None:
    world = logistic_regression(n=20, size=25)
    step = step_of(world, torch.optim.SGD, lr=0.1)
    before = fingerprint(world.model, step.optimizer)
    for probe in (curvature_trace(), curvature_frobenius(), fisher_trace()):
        probe(step)
        assert probe.cost(step.problem) > 1
    assert fingerprint(world.model, step.optimizer) == before
