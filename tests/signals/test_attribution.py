"""Planted faults on a trained classifier are blamed on what was planted; healthy batches are not blamed."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, hypergeom
from torch import Tensor, nn

from tests.state import fingerprint
from tests.worlds import generator
from towtank.problem import Problem
from towtank.signals.attribution import _chance, blame_batch, blame_tensors, moved_first
from towtank.signals.step import CannotTell

ce = nn.functional.cross_entropy
CLASSES, FEATURES, SIZE = 10, 12, 48


def data(size: int, seed: int) -> tuple[Tensor, Tensor]:
    centers = 1.2 * torch.randn(CLASSES, FEATURES, generator=generator(0))
    draw = generator(1000 + seed)
    y = torch.randint(CLASSES, (size,), generator=draw)
    return centers[y] + torch.randn(size, FEATURES, generator=draw), y


@cache
def trained() -> tuple[nn.Module, tuple[float, ...], tuple[Tensor, Tensor]]:
    """A classifier of classes that overlap, trained on fresh batches, its losses on 60 further ones, and a reference."""
    model = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    for i, p in enumerate(model.parameters()):
        p.data.copy_(0.2 * torch.randn(p.shape, generator=generator(20 + i)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(200):
        optimizer.zero_grad()
        x, y = data(SIZE, step)
        ce(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        past = tuple(float(ce(model(x), y)) for x, y in (data(SIZE, 5000 + i) for i in range(60)))
    return model, past, data(256, 9000)


def problem_of(batch: Any) -> Problem:
    return Problem(trained()[0], ce, batch)


def blamed(batch: Any, **options: Any):  # noqa: ANN201
    _, past, reference = trained()
    return blame_batch(problem_of, batch, reference, **{"past": past, **options})


def test_scaled_inputs() -> None:
    """The few examples that the classifier gets wrong make the loss; all of them are odd."""
    x, y = data(SIZE, 7000)
    found = blamed((100 * x, y))
    assert found.verdict == "inputs"
    assert len(found.odd["input"]) == SIZE and set(found.worst) <= set(range(SIZE))
    ours, theirs = found.profile["input"]
    assert ours / theirs == pytest.approx(100, rel=0.5)
    assert found.loss > 10 * found.reference_loss


def test_one_broken_example() -> None:
    x, y = data(SIZE, 7001)
    x[17, 3] = math.nan
    found = blamed((x, y))
    assert found.verdict == "inputs" and found.odd["input"] == (17,) and found.worst[0] == 17
    assert math.isnan(found.loss) and math.isnan(found.losses[0]) and math.isfinite(found.losses[1])


def test_one_huge_example() -> None:
    x, y = data(SIZE, 7002)
    x[5] *= 300
    y[5] = (y[5] + 1) % CLASSES
    found = blamed((x, y))
    assert found.verdict == "inputs" and found.odd["input"] == (5,) and found.worst[0] == 5


def test_constant_inputs() -> None:
    x, y = data(SIZE, 7003)
    assert blamed((0.0 * x, y)).verdict == "inputs"  # below the reference's range, all of them


@pytest.mark.parametrize("seed", range(5))
def test_random_labels(seed: int) -> None:
    x, y = data(SIZE, 7100 + seed)
    wrong = torch.randint(CLASSES, (SIZE,), generator=generator(seed))
    found = blamed((x, wrong))
    assert found.verdict == "labels" and blamed((x, wrong), past=()).verdict == "labels"
    # 9 of 10 labels are wrong; nearly each of those has a larger loss than 99 % of the healthy ones
    assert found.share > 0.6 and found.share_p < 1e-6 and not found.odd
    assert all(int(wrong[i]) != int(y[i]) for i in found.worst)


def test_too_large_a_step_is_the_models() -> None:
    model, past, reference = trained()
    broken = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, CLASSES))
    broken.load_state_dict(model.state_dict())
    optimizer = torch.optim.SGD(broken.parameters(), lr=0.1 * 30)
    for step in range(5):
        optimizer.zero_grad()
        x, y = data(SIZE, 7200 + step)
        ce(broken(x), y).backward()
        optimizer.step()
    found = blame_batch(lambda batch: Problem(broken, ce, batch), data(SIZE, 7300), reference, past=past)
    assert found.verdict == "model" and found.reference_z > 6
    before = {n: p.detach() for n, p in model.named_parameters()}
    same = blame_batch(lambda batch: Problem(broken, ce, batch), data(SIZE, 7300), reference, past=past, params=before)
    assert same.verdict == "none" and same.reference_loss == pytest.approx(
        float(ce(model(reference[0]), reference[1]).detach())
    )


def test_a_model_that_is_not_finite() -> None:
    model = nn.Linear(FEATURES, CLASSES)
    model.weight.data[0, 0] = math.nan
    found = blame_batch(lambda batch: Problem(model, ce, batch), data(SIZE, 0), data(SIZE, 1))
    assert found.verdict == "model" and math.isnan(found.reference_z)


def test_healthy_batches_are_not_blamed() -> None:
    trials = 60
    verdicts = [blamed(data(SIZE, 20000 + i)).verdict for i in range(trials)]
    # 1e-3 by the losses' ranks, and at most 1e-3 for a spike of the mean loss
    assert sum(v != "none" for v in verdicts) <= binom.ppf(0.999, trials, 2e-3)


def test_the_chance_is_exact() -> None:
    """Against counting over random orders, and against scipy."""
    n, m, r = 6, 9, 2
    rng = np.random.default_rng(0)
    ranks = np.argsort(rng.random((40000, n + m)), axis=1)
    batch, reference = ranks[:, :n], np.sort(ranks[:, n:], axis=1)[:, -r]
    counts = (batch > reference[:, None]).sum(1)
    for x in range(n + 1):
        p = _chance(x, n, m, r)
        assert abs((counts >= x).mean() - p) <= 4 * math.sqrt(p * (1 - p) / 40000) + 1e-12
        if x:
            assert p == pytest.approx(hypergeom.sf(x - 1, n + m, n, x + r - 1), rel=1e-9)
    assert _chance(3, 3, 2, 5) == 0.0


def test_tokens_go_by_the_first_layer() -> None:
    """No input is real: what the embedding makes of them is looked at."""
    model = nn.Sequential(nn.Embedding(20, 8), nn.Flatten(), nn.Linear(8 * 4, 3))
    for i, p in enumerate(model.parameters()):
        p.data.copy_(torch.randn(p.shape, generator=generator(i)))
    embedding = next(model.parameters())
    embedding.data[19] *= 1000  # a token that training never saw
    i = torch.randint(19, (64, 4), generator=generator(5))
    j = torch.full((32, 4), 19)
    healthy = (i, model(i).argmax(1))
    found = blame_batch(lambda b: Problem(model, ce, b), (j, (model(j).argmax(1) + 1) % 3), healthy)
    assert found.verdict == "inputs" and len(found.odd["output of 0"]) == 32


def test_ignored_targets_and_mappings() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(FEATURES, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    net = Net()
    for i, p in enumerate(net.parameters()):
        p.data.copy_(0.3 * torch.randn(p.shape, generator=generator(30 + i)))
    net = net.bfloat16()
    x, y = data(SIZE, 0)
    y[::2] = -100
    found = blame_batch(
        lambda b: Problem(net, ce, b), {"x": 1000 * x, "labels": y}, {"x": x, "labels": y.clone()}, level=0.01
    )
    assert found.verdict == "inputs" and all(i % 2 for i in found.worst) and "input x" in found.profile


def test_changes_nothing() -> None:
    model = trained()[0]
    before = fingerprint(model)
    x, y = data(SIZE, 1)
    for batch in ((x, y), (100 * x, y), (x * math.nan, y)):
        blamed(batch)
    assert fingerprint(model) == before


def test_batch_normalization_in_training() -> None:
    model = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Linear(FEATURES, CLASSES))
    before = fingerprint(model)
    x, y = data(SIZE, 3)
    healthy = (x, model.eval()(x).argmax(1))
    model.train()
    wrong = (x + 0.01, (healthy[1] + 1) % CLASSES)
    found = blame_batch(lambda b: Problem(model, ce, b, mode="train"), wrong, healthy)
    assert found.verdict == "labels" and fingerprint(model) == before


def test_bad_batches() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        blamed(data(8, 0), level=0.0)
    with pytest.raises(CannotTell, match="at least 2 examples"):
        blamed(data(1, 0))


# Tensors


def histories(names: str, seed: int = 0, size: int = 60) -> dict[str, list[float]]:
    rng = np.random.default_rng(seed)
    return {n: np.exp(0.3 * rng.standard_normal(size)).tolist() for n in names}


def test_tensors_are_ranked() -> None:
    before = histories("abcd") | {"short": [1.0] * 5}
    found = blame_tensors(before, {"a": 1.1, "b": 30.0, "c": math.nan, "d": 1e-6, "short": 99.0, "new": 1.0})
    assert [t.name for t in found] == ["c", "d", "b", "a"]
    by = {t.name: t for t in found}
    assert by["c"].z == math.inf and by["d"].z < -6 and by["b"].z > 6 and abs(by["a"].z) < 6
    # the expected value: medians of 20 of 60 values extrapolated, 4 * 0.3 * 1.25 * 1.2 / sqrt 20 in the logarithm
    assert abs(math.log(by["b"].expected)) < 0.45
    assert blame_tensors(before, {"a": 0.0})[0].z == -math.inf


def test_tensors_without_a_past() -> None:
    with pytest.raises(CannotTell, match="got none"):
        blame_tensors({"a": [1.0] * 5}, {"a": 1.0})
    with pytest.raises(CannotTell, match="got none"):
        blame_tensors({}, {})


def test_a_planted_tensor_comes_first() -> None:
    for seed in range(20):
        before = histories("abcdefgh", seed)
        now = {n: v.pop() for n, v in before.items()}
        now["e"] *= 20  # 10 standard deviations
        assert blame_tensors(before, now)[0].name == "e"


# What moved first


def signals(seed: int, count: int = 12, size: int = 200) -> dict[str, list[tuple[int, float]]]:
    rng = np.random.default_rng(seed)
    trend = rng.normal(scale=0.002, size=count)[:, None] * np.arange(size)
    values = 5 + trend + 0.1 * rng.standard_normal((count, size))
    return {f"s{i}": list(enumerate(row.tolist())) for i, row in enumerate(values)}


def test_the_order_of_what_moved() -> None:
    history = signals(0)
    planted = {"s3": 160, "s7": 175, "s1": 199}
    for key, start in planted.items():
        history[key] = [(t, v + 4 * (t >= start)) for t, v in history[key]]
    history["s5"] = [(t, math.nan if t >= 190 else v) for t, v in history["s5"]]
    found = moved_first(history, 199)
    assert [(m.key, m.step, m.lead) for m in found] == [
        ("s3", 160, 39),
        ("s7", 175, 24),
        ("s5", 190, 9),
        ("s1", 199, 0),
    ]
    assert found[0].value == pytest.approx(found[0].expected + 4, abs=1.0)
    assert found[2].z == math.inf


def test_growth_is_seen_when_it_leaves_the_noise() -> None:
    history = signals(1)
    history["s2"] = [(t, v * (1.1 ** max(0, t - 165))) for t, v in history["s2"]]
    (found,) = moved_first(history, 199)
    # 6 scales of 0.1 with their extrapolation error of at most 1.5 times: 0.9 of 5, two steps of 10 %; noise takes or adds one
    assert found.key == "s2" and 166 <= found.step <= 170


def test_what_came_back_did_not_move() -> None:
    history = signals(2)
    history["s4"] = [(t, v + 9 * (t == 180)) for t, v in history["s4"]]
    history["late"] = [(t, 1.0) for t in range(195, 200)]
    assert moved_first(history, 199) == ()


def test_healthy_signals_do_not_move() -> None:
    """Signals with Gaussian noise and trends: at the spike itself each has one chance of under 1e-3."""
    moved = sum(len(moved_first(signals(100 + seed), 199)) for seed in range(30))
    assert moved <= binom.ppf(0.999, 30 * 12, 1e-3)


def test_only_the_past_of_the_spike_counts() -> None:
    history = {"a": [(t, 1.0 + 0.01 * (t % 3) + 5 * (t > 150)) for t in range(200)]}
    assert moved_first(history, 150) == ()
    assert [m.step for m in moved_first(history, 155)] == [151]


def test_no_past_no_answer() -> None:
    with pytest.raises(CannotTell, match="got none"):
        moved_first({"a": [(t, 1.0) for t in range(30)]}, 29, window=20)
    with pytest.raises(CannotTell, match="got none"):
        moved_first({}, 10)
    with pytest.raises(ValueError, match="at least 1 step"):
        moved_first({"a": []}, 10, window=0)
