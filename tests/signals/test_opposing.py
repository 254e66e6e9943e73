"""Opposing signals against closed forms of linear regression, planted groups, and data without any."""

from __future__ import annotations

import math
from typing import TypeVar

import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn

from tests.state import fingerprint
from tests.worlds import F64, generator, linear_regression, logistic_regression, normal
from towtank.problem import Problem
from towtank.signals.along import derivatives, example_losses
from towtank.signals.opposing import opposing_signals, opposing_signals_probe
from towtank.signals.step import CannotTell, Step

M = TypeVar("M", bound=nn.Module)
mse = nn.functional.mse_loss
ce = nn.functional.cross_entropy


def seeded(model: M, scale: float = 0.5) -> M:
    for i, p in enumerate(model.parameters()):
        p.data.copy_(scale * normal(*p.shape, seed=50 + i))
    return model


def linear(P: int, weight: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(P, 1, bias=False, dtype=F64)
    layer.weight.data.copy_(torch.zeros(1, P) if weight is None else weight)
    return layer


def sky_regression(n: int = 200, P: int = 30, k: int = 8, strength: float = 12.0) -> tuple[Problem, set[int], set[int]]:
    """Noise targets, and 2k examples with one strong feature and targets +2 or -2 in equal number."""
    x, y = normal(n, P, seed=1), 0.3 * normal(n, 1, seed=2)
    order = torch.randperm(n, generator=generator(3)).tolist()
    plus, minus = order[:k], order[k : 2 * k]
    x[:, 0] = 0.0
    x[plus + minus, 0] = strength
    y[plus], y[minus] = 2.0, -2.0
    return Problem(linear(P), mse, (x, y)), set(plus), set(minus)


def sky_classifier() -> tuple[Problem, set[int], set[int]]:
    """Two classes told apart by a clear feature, and 20 examples in which a rare strong one speaks for neither."""
    n, P, k = 240, 20, 10
    y = torch.arange(n) % 2
    x = normal(n, P, seed=5)
    x[:, 0] = 6.0 * (2 * y - 1)
    sky = list(range(2 * k))
    x[sky, 0], x[sky, 1] = 0.0, 15.0
    torch_model = nn.Sequential(nn.Linear(P, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    seeded(torch_model, 0.2)
    optimizer = torch.optim.SGD(torch_model.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        ce(torch_model(x), y).backward()
        optimizer.step()
    return Problem(torch_model, ce, (x, y)), {i for i in sky if y[i] == 0}, {i for i in sky if y[i] == 1}


def by_hand(x: Tensor, y: Tensor, theta: Tensor, k: int) -> tuple[list[int], list[int], float, float, float]:
    """Groups, cosine, jackknife error and share of linear regression, with loops."""
    r = x @ theta - y[:, 0]
    v = torch.linalg.eigh(2 * x.T @ x / len(x)).eigenvectors[:, -1]
    slopes = [float(2 * r[i] * (x[i] @ v)) for i in range(len(x))]
    order = sorted(range(len(x)), key=lambda i: slopes[i])
    ends = {+1: order[::-1][:k], -1: order[:k]}

    def cosine(up: list[int], down: list[int]) -> float:
        a, b = (torch.stack([2 * r[i] * x[i] for i in group]).sum(0) for group in (up, down))
        return float(a @ b / (a.norm() * b.norm()))

    total = sum(float((x[i] @ v) ** 2) for i in range(len(x)))
    share = sum(float((x[i] @ v) ** 2) for i in ends[1] + ends[-1]) / total
    left = [
        [cosine([i for i in ends[1] if i != j], ends[-1]) for j in ends[1]],
        [cosine(ends[1], [i for i in ends[-1] if i != j]) for j in ends[-1]],
    ]
    variance = sum((k - 1) / k * sum((c - sum(cs) / k) ** 2 for c in cs) for cs in left)
    return ends[1], ends[-1], cosine(ends[1], ends[-1]), math.sqrt(variance), share


def test_against_loops() -> None:
    x, y, theta = normal(60, 6, seed=0), normal(60, 1, seed=1), normal(6, seed=2)
    x[:, 0] *= 2  # a gap below the top eigenvalue, so that the eigenvector is settled
    model = linear(6, theta[None])
    v = torch.linalg.eigh(x.T @ x).eigenvectors[:, -1]
    up, down, cosine, error, share = by_hand(x, y, theta, 5)
    for sign in (1, -1):
        found = opposing_signals(Problem(model, mse, [(x[:25], y[:25]), (x[25:], y[25:])]), direction=sign * 3 * v, k=5)
        mine = (found.up, found.down) if float((v * sign) @ v) > 0 else (found.down, found.up)
        if set(mine[0]) != set(up):  # eigh has a sign of its own
            mine = mine[::-1]
        assert [list(m) for m in mine] in ([up, down], [down, up])
        # sums of 60 terms in float64: 60 eps is 1.3e-14
        assert (found.cosine, found.cosine_error, found.share) == pytest.approx((cosine, error, share), rel=1e-11)
        assert found.sharpness == pytest.approx(float(2 * (x @ v).square().mean()), rel=1e-11)
        assert (found.examples, found.along) == (60, "direction")


def test_the_eigenvector_is_found() -> None:
    world = linear_regression(n=60, size=6, seed=4)
    found = opposing_signals(Problem(world.model, world.loss, world.data), k=5)
    top = float(world.eigenvalues[-1])
    assert top * (1 - 1e-3) <= found.sharpness <= top * (1 + 1e-12)  # a Rayleigh quotient, Lanczos tolerance 1e-3
    assert found.along == "eigenvector" and found.cost > 6


def test_planted_groups_of_a_regression_are_found_exactly() -> None:
    problem, plus, minus = sky_regression()
    found = opposing_signals(problem, k=8)
    # slopes 2 * 2 * 12 = 48 against 2 * 0.3 * |x v|, at most 0.6 * 4 * 4
    assert {frozenset(found.up), frozenset(found.down)} == {frozenset(plus), frozenset(minus)}
    assert found.found and found.alignment_p == 1e-3 and found.share_p == 1e-3
    assert found.cosine < -0.95 and found.share > 0.95
    assert str(found).startswith("opposing signals: two groups of 8 of 200")


def test_planted_groups_of_a_classifier_are_found_exactly() -> None:
    problem, zeros, ones = sky_classifier()
    found = opposing_signals(problem, k=10)
    assert {frozenset(found.up), frozenset(found.down)} == {frozenset(zeros), frozenset(ones)}
    assert found.found, str(found)
    assert found.cosine < -0.9 and found.share > 0.5


def test_planted_groups_are_found_by_the_change_of_their_loss() -> None:
    problem, plus, minus = sky_regression()
    before = example_losses(problem)
    _, gradient = problem.gradient()
    step = {"weight": problem.leaves()["weight"].detach() + 0.05 * torch.eye(30, dtype=F64)[:1]}
    change = example_losses(problem, step) - before
    found = opposing_signals(problem, change=change, k=8)
    assert (set(found.up), set(found.down)) == (minus, plus)  # the step raises outputs of the sky: good for +2
    assert found.found and found.along == "change" and bool(gradient.isfinite().all())


@pytest.mark.parametrize("P", [8, 60])
def test_false_alarms_stay_below_the_level(P: int) -> None:
    level, trials, alarms = 0.05, 12, 0
    for seed in range(trials):
        world = (linear_regression if seed % 2 else logistic_regression)(n=100, size=P, seed=100 + seed)
        alarms += opposing_signals(Problem(world.model, world.loss, world.data), level=level, seed=seed).found
    assert alarms <= binom.ppf(0.999, trials, level)


def test_hard_examples_without_a_common_direction_are_none() -> None:
    x, y = normal(200, 40, seed=0), 0.01 * normal(200, 1, seed=1)
    y[:20] = 5.0 * normal(20, 1, seed=2).sign()  # large losses and gradients, in no special direction
    found = opposing_signals(Problem(linear(40), mse, (x, y)), k=5)
    # slopes of the bulk are below 2 * 0.04 * 4 = 0.32: a hard one is beyond unless |x v| < 0.03, at odds of 1 in 40
    assert set(found.up + found.down) <= set(range(20)) and not found.found
    assert str(found).startswith("no opposing signals")


def test_derivatives_are_those_of_the_dense_hessian() -> None:
    x, y = normal(7, 4, seed=0), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    model = seeded(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double())
    problem, v = Problem(model, ce, (x, y)), normal(27, seed=1)
    slope, curve = derivatives(problem, v)
    for i in range(7):
        leaves = problem.leaves()
        flat = torch.cat([p.detach().reshape(-1) for p in leaves.values()])

        def loss(t: Tensor, i: int = i) -> Tensor:
            return ce(torch.func.functional_call(model, problem.unflatten(t), (x[i : i + 1],)), y[i : i + 1])

        H = torch.autograd.functional.hessian(loss, flat)
        g = torch.autograd.functional.jacobian(loss, flat)
        assert isinstance(H, Tensor) and isinstance(g, Tensor)
        assert float(slope[i]) == pytest.approx(float(g @ v), rel=1e-10)
        assert float(curve[i]) == pytest.approx(float(v @ H @ v), rel=1e-10)


class Stubborn(torch.autograd.Function):
    """x^2 without a rule for vmap."""

    @staticmethod
    def forward(ctx, x):  # noqa: ANN001, ANN205
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):  # noqa: ANN001, ANN205
        return 2 * ctx.saved_tensors[0] * g


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Stubborn.apply(x)  # type: ignore[no-any-return]


def test_one_by_one_where_vmap_cannot() -> None:
    x, y, theta = normal(6, 3, seed=0), normal(6, 1, seed=1), normal(1, 3, seed=2)
    slope, curve = derivatives(
        Problem(nn.Sequential(linear(3, theta), Squares()), mse, (x, y)), torch.ones(3, dtype=F64)
    )
    o, d = x @ theta[0], x.sum(1)
    assert torch.allclose(slope, 4 * (o**2 - y[:, 0]) * o * d, rtol=1e-12)
    assert torch.allclose(curve, (12 * o**2 - 4 * y[:, 0]) * d**2, rtol=1e-12)


def test_places_count_examples_without_targets() -> None:
    x, y = normal(48, 5, seed=0).float(), torch.arange(48) % 3
    y[::4] = -100
    model = seeded(nn.Linear(5, 3))
    losses = example_losses(Problem(model, ce, (x, y)))
    assert losses[::4].isnan().all() and losses[1::4].isfinite().all()
    found = opposing_signals(Problem(model, ce, (x, y)), k=4)
    assert found.examples == 36 and not any(i % 4 == 0 for i in found.up + found.down)


def test_changes_nothing() -> None:
    torch_model = seeded(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2)))
    x, y = torch.randn(40, 4, generator=generator(0)), torch.arange(40) % 2
    ce(torch_model(x), y).backward()
    before = fingerprint(torch_model)
    opposing_signals(Problem(torch_model, ce, (x, y)), k=3)
    example_losses(Problem(torch_model, ce, (x, y)))
    assert fingerprint(torch_model) == before


def test_frozen_tied_and_half() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 5)
            self.frozen = nn.Linear(5, 5).requires_grad_(False)
            self.head = nn.Linear(5, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, i: Tensor) -> Tensor:
            return self.head(torch.tanh(self.frozen(self.embed(i))))

    i = torch.arange(56) % 7
    model = seeded(Tied()).bfloat16()
    found = opposing_signals(Problem(model, ce, (i, (i * i + 1) % 7)), k=3)
    assert math.isfinite(found.cosine) and math.isfinite(found.share)


def test_bad_input() -> None:
    x, y = normal(20, 4, seed=0), normal(20, 1, seed=1)
    problem = Problem(linear(4), mse, (x, y))
    with pytest.raises(CannotTell, match="at least 24 examples"):
        opposing_signals(problem, k=6)
    with pytest.raises(CannotTell, match="at least 8 examples"):
        opposing_signals(Problem(linear(4), mse, (x[:1], y[:1])))
    with pytest.raises(ValueError, match="at least 2 examples"):
        opposing_signals(problem, k=1)
    with pytest.raises(ValueError, match=r"direction of shape \(4,\)"):
        opposing_signals(problem, direction=torch.ones(5))
    with pytest.raises(ValueError, match="finite length above 0"):
        opposing_signals(problem, direction=torch.zeros(4))
    with pytest.raises(ValueError, match="each of 20 examples"):
        opposing_signals(problem, change=torch.ones(19))
    with pytest.raises(CannotTell, match="finite changes"):
        opposing_signals(problem, change=torch.full((20,), math.nan))
    with pytest.raises(CannotTell, match="pull the same way"):
        opposing_signals(problem, change=-torch.arange(1.0, 21.0), k=2)
    broken = x.clone()
    broken[3] = math.nan
    with pytest.raises(CannotTell, match="finite"):
        opposing_signals(Problem(linear(4), mse, (broken, y)), direction=torch.ones(4))
    normalized = Problem(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)).double(), mse, (x, y), mode="train")
    with pytest.raises(CannotTell, match="mode='eval'"):
        opposing_signals(normalized, k=2)


def test_probe() -> None:
    problem, _, _ = sky_regression()
    step = Step(
        number=1,
        loss=torch.zeros(()),
        model=problem.model,
        problem_of=lambda batch: problem.replace(data=batch),
        probe_batch=problem.data,
    )
    probe = opposing_signals_probe(k=8)
    readings = probe(step)
    assert set(readings) == {"data/opposing_cosine", "data/opposing_cosine_error", "data/opposing_share"}
    assert readings["data/opposing_cosine"] < -0.95 and readings["data/opposing_share"] > 0.95
    assert probe.cost(problem) > 10
    healthy = (normal(200, 30, seed=7), normal(200, 1, seed=8))
    quiet = Step(number=1, loss=step.loss, model=problem.model, problem_of=step.problem_of, probe_batch=healthy)
    assert probe(quiet)["data/opposing_share"] == 0.0
