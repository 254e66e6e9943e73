"""Lengths and correlations by depth against the closed form of wide ReLU networks; ranks of matrices that are known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.state import fingerprint
from tests.worlds import F64, generator, normal, orthogonal
from towtank.problem import Problem
from towtank.signals.capture import capture
from towtank.signals.depth import depth_map, layer_moments, propagation, relu_correlation, spread
from towtank.signals.representation import measure_depth, representation
from towtank.signals.step import CannotTell, Step


def with_singular_values(values, n=20, d=12):
    """Features with these singular values after centering: their left vectors are orthogonal to ones."""
    left = torch.linalg.qr(torch.cat([torch.ones(n, 1, dtype=F64), normal(n, d, seed=0)], 1))[0][:, 1:]
    s = torch.tensor(values, dtype=F64)
    return left[:, : len(s)] * s @ orthogonal(d, 1)[: len(s)] + normal(d, seed=2)


# Spread


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_equal_singular_values(rank):
    found = spread(with_singular_values([2.0] * rank))
    assert found.effective_rank == pytest.approx(rank, rel=1e-12) and found.participation == pytest.approx(
        rank, rel=1e-12
    )
    assert found.limit == 12


def test_unequal_singular_values():
    """Shares 1/2, 1/4, 1/4: entropy 3/2 log 2; squares 4, 1, 1: participation 36 / 18."""
    found = spread(with_singular_values([2.0, 1.0, 1.0]))
    assert found.effective_rank == pytest.approx(2**1.5, rel=1e-12) and found.participation == pytest.approx(
        2, rel=1e-12
    )


def test_white_noise_with_few_rows():
    """tr C^2 of a white Wishart matrix: participation d / (1 + d / R) up to terms of relative order 1 / R."""
    R, d = 400, 200
    found = spread(normal(R, d, seed=3))
    assert found.participation == pytest.approx(d / (1 + d / R), rel=5 / R)


def test_constant_and_bad_features():
    assert spread(torch.full((5, 3), 0.1)).effective_rank == 0
    with pytest.raises(CannotTell, match="two rows"):
        spread(torch.ones(1, 3))
    with pytest.raises(CannotTell, match="finite"):
        spread(torch.full((5, 3), math.nan))
    with pytest.raises(ValueError, match="flatten"):
        spread(torch.ones(2, 3, 4))


# Moments of one activation


def test_lengths_and_correlations_by_hand():
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    row = layer_moments("m", x, 2 * x)
    lengths = [2.0, 4.0, 8.0]
    pairs = [1 / math.sqrt(2), 0.0, 1 / math.sqrt(2)]
    assert row.length == pytest.approx(sum(lengths) / 3) and row.gain == pytest.approx(2)
    assert row.length_error == pytest.approx(math.sqrt(sum((q - 14 / 3) ** 2 for q in lengths) / 2 / 3))
    assert row.correlation == pytest.approx(sum(pairs) / 3)
    # without one of three examples one pair is left
    mean = sum(pairs) / 3
    assert row.correlation_error == pytest.approx(math.sqrt(2 / 3 * sum((c - mean) ** 2 for c in pairs)))
    assert row.mean == pytest.approx(10 / 6) and row.variance == pytest.approx(28 / 6 - (10 / 6) ** 2)


def test_shapes():
    image = normal(3, 5, 4, 4, seed=0)
    assert layer_moments("m", image, image).spread == spread(image.movedim(1, -1).reshape(48, 5))
    tokens = normal(3, 7, 5, seed=0)
    assert layer_moments("m", None, tokens).spread == spread(tokens.reshape(21, 5))
    assert math.isnan(layer_moments("m", torch.ones(3, dtype=torch.long), tokens).gain)
    few = layer_moments("m", tokens, tokens, rows=2, positions=3)
    assert few.spread == spread(tokens.reshape(21, 5)[[0, 10, 20]]) and few.length == pytest.approx(
        float(tokens[:2].square().mean())
    )
    one = layer_moments("m", tokens[:1], tokens[:1])
    assert math.isnan(one.correlation) and math.isnan(one.length_error)
    dead = layer_moments("m", tokens, torch.zeros(3, 4))
    assert dead.length == 0 and math.isnan(dead.correlation) and dead.spread.effective_rank == 0
    half = layer_moments("m", tokens.bfloat16(), tokens.bfloat16())
    assert half.gain == pytest.approx(1, rel=1e-6)
    assert half.length == pytest.approx(
        layer_moments("m", tokens, tokens).length, rel=2**-7
    )  # squares of numbers of 8 bits
    assert math.isnan(layer_moments("m", tokens, torch.full((3, 4), math.nan)).length)
    with pytest.raises(ValueError, match="examples first"):
        layer_moments("m", tokens, torch.zeros(0, 4))


def test_kept_activations():
    x = normal(4, 6, seed=0)
    seen = SimpleNamespace(kept={"a": [(x, 3 * x), (x, 9 * x)], "b": [(3 * x, (x, x))], "c": []})
    (row,) = depth_map(seen.kept).rows
    assert row.name == "a" and row.gain == pytest.approx(3)


def test_what_capture_keeps_gives_the_same_map():
    model, x = chain(1.3, depth=3), normal(5, 64, seed=0)
    with capture(model, keep=("[02]",)) as seen, torch.no_grad():
        model(x)
    rows, truth = depth_map(seen.kept).rows, measure_depth(problem(model, x), names=["[02]"]).rows
    assert [row.name for row in rows] == ["0", "2"]
    assert [(r.length, r.correlation, r.gain, r.spread) for r in rows] == [
        (r.length, r.correlation, r.gain, r.spread) for r in truth
    ]


# Depth


WIDTH = 4096


@pytest.fixture(scope="module")
def wide_relu():
    """Three layers as He et al. draw them."""
    layers = []
    for i in range(3):
        layer = nn.utils.skip_init(nn.Linear, WIDTH, WIDTH, bias=False)
        layer.weight.data.normal_(0, (2 / WIDTH) ** 0.5, generator=generator(i))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers)


def pair(c):
    """Two inputs of mean square 1 and correlation c."""
    u, v = torch.linalg.qr(normal(WIDTH, 2, seed=7))[0].T * WIDTH**0.5
    return torch.stack([u, c * u + math.sqrt(1 - c**2) * v]).float()


def problem(model, x):
    with torch.no_grad():
        return Problem(model, F.mse_loss, (x, torch.zeros_like(model(x))))


@pytest.mark.parametrize("c", [-0.5, 0.0, 0.6])
def test_wide_relu_network(wide_relu, c):
    """He initialization keeps the length of pre-activations at 2, and c -> relu_correlation(c).

    Given the layer before, pre-activations of a pair are WIDTH independent Gaussian pairs. So the mean square of a pre-activation
    has relative variance 2 / WIDTH; after the ReLU E z^4 / 2 over (E z^2 / 2)^2 less 1 is 5, hence 5 / WIDTH: errors add up
    over the layers. A correlation that is a ratio of such means, with a numerator of at most the same variance, has an error
    of at most sqrt(5 + 5) / sqrt(WIDTH) a layer, and the map, whose slope is at most 1, does not enlarge earlier ones.
    """
    depths = measure_depth(problem(wide_relu, pair(c)), names=["*"])
    found = depths.rows
    before, after = found[0::2], found[1::2]
    length_error, correlation_error = math.sqrt(5 / WIDTH), math.sqrt(10 / WIDTH)
    expected = c
    for i in range(3):
        assert before[i].kind == "Linear" and after[i].kind == "ReLU"
        assert before[i].length == pytest.approx(2, rel=4 * length_error * math.sqrt(i + 1))
        assert before[i].correlation == pytest.approx(expected, abs=4 * correlation_error * math.sqrt(i + 1))
        expected = relu_correlation(expected)
        assert after[i].length == pytest.approx(1, rel=4 * length_error * math.sqrt(i + 1))
        assert after[i].correlation == pytest.approx(expected, abs=4 * correlation_error * math.sqrt(i + 1))
    assert depths.of("Linear").propagation().verdict == depths.of("ReLU").propagation().verdict == "steady"


def test_the_map_against_sampling():
    z = normal(1_000_000, 2, seed=0)
    for c in (-0.9, 0.3, 0.95):
        b = c * z[:, 0] + math.sqrt(1 - c**2) * z[:, 1]
        products = 2 * F.relu(z[:, 0]) * F.relu(b)
        assert float(products.mean()) == pytest.approx(relu_correlation(c), abs=4 * float(products.std()) / 1000)
    with pytest.raises(ValueError, match="-1 to 1"):
        relu_correlation(1.1)


def chain(gain, depth=8, width=64):
    """Orthogonal layers: the mean square is multiplied by gain exactly."""
    layers = [nn.Linear(width, width, bias=False, dtype=F64) for _ in range(depth)]
    for i, layer in enumerate(layers):
        layer.weight.data.copy_(gain**0.5 * orthogonal(width, i))
    return nn.Sequential(*layers)


@pytest.mark.parametrize("gain, verdict", [(0.5, "vanishing"), (1.0, "steady"), (2.0, "exploding"), (1.5, "steady")])
def test_propagation_of_a_chain(gain, verdict):
    """Over 7 steps: 2^7 = 128 is beyond 100, 1.5^7 = 17 is not."""
    found = measure_depth(problem(chain(gain), normal(5, 64, seed=0))).propagation()
    assert found.verdict == verdict and found.layers == 8
    assert found.factor == pytest.approx(gain, rel=1e-12) and found.fold == pytest.approx(gain**7, rel=1e-11)
    assert found.factor_error < 1e-12


def test_propagation_of_numbers():
    noisy = [math.exp(0.2 * i + e) for i, e in enumerate([0.1, -0.1, 0.05, 0.0, -0.05])]
    found = propagation(noisy)
    x, y = torch.arange(5, dtype=F64), torch.tensor(noisy, dtype=F64).log()
    A = torch.stack([torch.ones(5, dtype=F64), x], 1)
    solution = torch.linalg.lstsq(A, y[:, None]).solution[:, 0]
    covariance = torch.linalg.inv(A.T @ A) * (y - A @ solution).square().sum() / 3
    assert found.factor == pytest.approx(math.exp(float(solution[1])), rel=1e-12)
    assert found.factor_error == pytest.approx(found.factor * float(covariance[1, 1].sqrt()), rel=1e-10)
    assert propagation([1.0, 0.0]).verdict == "vanishing" and propagation([1.0, math.inf]).verdict == "exploding"
    assert math.isnan(propagation([1.0, 2.0]).factor_error)
    assert propagation([1.0, 1e-300, 1e300]).verdict == "exploding"
    assert propagation([1.0, 4.0], [0, 2]).factor == pytest.approx(2)
    with pytest.raises(CannotTell, match="two layers"):
        propagation([1.0])
    with pytest.raises(CannotTell, match="NaN"):
        propagation([1.0, math.nan])


def test_modules_are_thinned_evenly():
    model = chain(1.3, depth=31)
    found = measure_depth(problem(model, normal(3, 64, seed=0)), modules=4)
    assert [row.name for row in found.rows] == ["0", "10", "20", "30"] == [str(row.depth) for row in found.rows]
    assert found.propagation().factor == pytest.approx(1.3, rel=1e-12)
    assert len(found.table().splitlines()) == 5
    with pytest.raises(CannotTell, match="match"):
        measure_depth(problem(model, normal(3, 64, seed=0)), names=["nothing"])


def test_a_module_that_is_called_twice_counts_by_its_first_call():
    layer = chain(3.0, depth=1)[0]
    x = normal(5, 64, seed=0)
    (row,) = measure_depth(problem(nn.Sequential(layer, layer), x)).rows
    assert row.length == pytest.approx(3 * float(x.square().mean()), rel=1e-12)


# The probe


def small():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(), nn.Linear(16, 3)
        )


def step(model, x):
    batch = (x, torch.zeros(len(x), dtype=torch.long))
    make = lambda b: Problem(model, F.cross_entropy, b)  # noqa: E731
    return Step(number=1, loss=torch.zeros(()), model=model, problem_of=make, probe_batch=batch)


def test_the_probe():
    model, x = small(), normal(10, 2, 4, 4, seed=0).float()
    before = fingerprint(model)
    found = representation()(step(model, x))
    assert fingerprint(model) == before
    assert {k.split("/", 1)[1] for k in found} == {
        f"{key}/{name}"
        for name in ("0", "5")
        for key in (
            "length",
            "correlation",
            "gain",
            "mean",
            "variance",
            "length_error",
            "correlation_error",
            "effective_rank",
        )
    }
    made = model[0](x).detach()
    assert found["representation/length/0"] == pytest.approx(float(made.square().mean()), rel=1e-5)
    assert found["representation/variance/0"] == pytest.approx(float(made.var(correction=0)), rel=1e-5)
    assert found["representation/effective_rank/0"] <= 4
    relu = representation(names=("2",))(step(model, x))
    assert relu["representation/mean/2"] > 0 and "representation/growth" not in relu


def test_the_cost_is_told():
    x = normal(10, 2, 4, 4, seed=0).float()
    assert representation().cost(step(small(), x).problem) == pytest.approx(1 / 3)


def test_an_activation_that_blows_up_is_reported_layer_by_layer():
    model = chain(1.0, depth=3)
    model[1].weight.data.fill_(math.inf)
    x = normal(4, 64, seed=0)
    found = representation()(step(model, x))
    assert math.isfinite(found["representation/length/0"])
    assert "representation/length/1" not in found and "representation/growth" not in found


def test_one_example_of_a_probe():
    found = representation()(step(small(), normal(1, 2, 4, 4, seed=0).float()))
    assert "representation/correlation/0" not in found and found["representation/length/0"] > 0


def test_hooks_are_gone_when_the_model_raises():
    model = small()
    own = Problem(model, F.cross_entropy, (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.long)), checks=False)
    _ = own.survey
    before = fingerprint(model)
    with pytest.raises(RuntimeError):
        measure_depth(own)
    assert fingerprint(model) == before
