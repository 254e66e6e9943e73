"""The one-call table against closed forms, and its learning-rate limits against the optimizers themselves."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import worlds
from tests.state import fingerprint
from towtank.curvature.limits import stability_limits
from towtank.curvature.measure import Measurement, measure
from towtank.estimate import Estimate
from towtank.problem import Problem

F64 = torch.float64
SIGMAS = 4.5  # a chance of 7e-6 for each sampled number


def near(found: Measurement, name: str, wanted: float) -> None:
    """Within the stated error: a bound holds, a standard error holds up to chance, and exact means rounding."""
    reading = found[name]
    allowed = {"bound": 1.0, "standard error": SIGMAS, "exact": 0.0}[reading.kind] * reading.error
    assert abs(reading.value - wanted) <= allowed + 1e-9 * abs(wanted), (name, reading, wanted)
    assert reading.verdict.status == "ok"


def test_logistic_regression() -> None:
    world = worlds.logistic_regression(n=60, size=25)
    found = measure(world.model, world.loss, world.data, top=3)
    H, (X, y) = world.hessian, world.data
    p = torch.sigmoid(world.model(X)).detach()
    g = (X * (p - y)).mean(0)
    values, vectors = torch.linalg.eigh(H)
    near(found, "loss", float(F.binary_cross_entropy(p, y)))
    near(found, "gradient norm", float(g.norm()))
    near(found, "sharpness", float(values[-1]))
    near(found, "smallest eigenvalue", float(values[0]))
    near(found, "gradient alignment", float((vectors[:, -3:].T @ g).square().sum() / g.square().sum()))
    near(found, "trace", float(H.trace()))
    near(found, "Frobenius norm", float(H.norm()))
    near(found, "Fisher trace", world.fisher_trace or math.nan)
    near(found, "effective rank", float(H.trace() ** 2 / H.norm() ** 2))
    near(found, "limit: gradient descent", float(2 / values[-1]))
    near(found, "limit: SGD, batch of 1", 2 / (world.fisher_trace or math.nan))
    assert found.size == 25 and "60 terms" in found.convention


def test_an_indefinite_bowl_and_one_without_positive_curvature() -> None:
    spectrum = torch.tensor([-3.0, -1.0, 0.5, 1.5, 2.0] + [1.0] * 20, dtype=F64)
    world = worlds.quadratic_bowl(spectrum)
    found = measure(world.model, world.loss, world.data, top=2)
    near(found, "sharpness", 2.0)
    near(found, "smallest eigenvalue", -3.0)
    near(found, "trace", 20.0)
    near(found, "limit: momentum 0.9", 1.9)
    assert "no likelihood" in found["effective rank"].note
    down = worlds.quadratic_bowl(-torch.arange(1.0, 6.0))
    found = measure(down.model, down.loss, down.data)
    assert found["limit: gradient descent"].value == math.inf
    assert "no positive curvature" in found["limit: gradient descent"].note


def test_effective_rank_counts_equal_eigenvalues() -> None:
    world = worlds.quadratic_bowl(torch.tensor([2.0] * 7 + [1e-9] * 5, dtype=F64))
    near(measure(world.model, world.loss, world.data, top=1), "effective rank", 7.0)


def scalar() -> tuple[nn.Module, tuple]:
    """L = 2 w^2 at w = 1e-60: 300 diverging steps stay far below any eps."""
    model = nn.Linear(1, 1, bias=False, dtype=F64)
    nn.init.constant_(model.weight, 1e-60)
    data = torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)
    return model, (lambda z, y: 2 * (z - y).square().mean(), data)


OPTIMIZERS = {
    "gradient descent": (torch.optim.SGD, {}),
    "momentum 0.9": (torch.optim.SGD, {"momentum": 0.9}),
    "Nesterov momentum 0.8": (torch.optim.SGD, {"momentum": 0.8, "nesterov": True}),
    "momentum 0.5": (torch.optim.SGD, {"momentum": 0.5, "dampening": 0.3}),
    "Adam": (torch.optim.Adam, {"eps": 10.0, "betas": (0.9, 0.999)}),
    "AdamW": (torch.optim.AdamW, {"eps": 10.0, "betas": (0.5, 0.99), "weight_decay": 0.0}),
    "RMSprop": (torch.optim.RMSprop, {"eps": 10.0, "momentum": 0.6}),
    "Adagrad": (torch.optim.Adagrad, {"eps": 10.0}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def steps(model: nn.Module, rest: tuple, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    """|w| after each step."""
    loss, (x, y) = rest
    sizes = []
    for _ in range(count):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
        sizes.append(abs(next(model.parameters()).item()))
    return sizes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_diverges_just_beyond_its_limit_and_only_there(name: str) -> None:
    """With eps far above the gradients an adaptive optimizer has a constant D; 100 steps let the start die away."""
    kind, options = OPTIMIZERS[name]
    model, rest = scalar()
    optimizer = kind(model.parameters(), lr=1e-9, **options)
    steps(model, rest, optimizer, 1)
    limit = measure(model, *rest, optimizer)[f"limit: {name}"].value
    for share, diverges in ((0.97, False), (1.03, True)):
        model, rest = scalar()
        sizes = steps(model, rest, kind(model.parameters(), lr=share * limit, **options), 300)
        assert (max(sizes[250:]) > max(sizes[100:150])) is diverges, (share, sizes[120], sizes[299])
        assert max(sizes) < 1e-3  # as said above


def network() -> tuple[nn.Module, tuple]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).train()
    return model, (F.cross_entropy, (torch.randn(20, 6), torch.arange(20) % 3))


def test_the_state_of_model_optimizer_and_generators_is_untouched() -> None:
    model, (loss, data) = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss(model(data[0]), data[1]).backward()
    optimizer.step()
    before = fingerprint(model, optimizer)
    found = measure(model, loss, data, optimizer, top=2, rtol=0.2)
    assert fingerprint(model, optimizer) == before
    assert all(r.verdict.status == "ok" for r in found.readings)
    assert "lr = 0.001 is" in found["limit: AdamW"].note


def test_the_table_and_the_json_say_the_same_and_a_seed_repeats_it() -> None:
    model, (loss, data) = network()
    problem = Problem(model, loss, data)
    found, again = (measure(problem, generator=3, top=2, rtol=0.3) for _ in range(2))
    assert [(r.value, r.error) for r in found.readings] == [(r.value, r.error) for r in again.readings]
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["parameters"] == found.size == sum(p.numel() for p in model.parameters())
    for reading, said in zip(found.readings, plain["readings"], strict=True):
        assert said["name"] == reading.name and reading.name in str(found) and said["value"] == reading.value
    with pytest.raises(KeyError, match="sharpness"):
        found["sharpnes"]


def test_what_cannot_be_measured_says_why_and_the_rest_goes_on() -> None:
    model, (loss, data) = network()
    fresh = torch.optim.Adam(model.parameters())
    found = measure(model, loss, data, fresh, top=1, rtol=0.3)
    assert found["preconditioned sharpness"].verdict.status == "refuse"
    assert "has taken a step" in found["preconditioned sharpness"].shown()
    assert found["limit: Adam"].verdict.status == "refuse" and math.isnan(found["limit: Adam"].value)
    assert found["sharpness"].verdict.status == "ok"
    said = found.to_json()["readings"]
    assert next(r for r in said if r["name"] == "limit: Adam")["value"] is None
    assert "has taken a step" in str(found)


def test_at_a_stationary_point_there_is_no_gradient_to_align() -> None:
    model = nn.Linear(2, 1, bias=False, dtype=F64)
    nn.init.zeros_(model.weight)
    found = measure(model, F.mse_loss, (torch.ones(3, 2, dtype=F64), torch.zeros(3, 1, dtype=F64)))
    assert "gradient is zero" in found["gradient alignment"].shown()


def test_an_unreached_accuracy_is_weak(monkeypatch: pytest.MonkeyPatch) -> None:
    short = lambda op, k, **given: real(op, k, **{**given, "max_products": 5})  # noqa: E731
    module = sys.modules[measure.__module__]  # the package has the function under the module's name
    real = module.eigsh
    monkeypatch.setattr(module, "eigsh", short)
    world = worlds.quadratic_bowl(torch.linspace(0.5, 1.0, 60, dtype=F64))
    found = measure(world.model, world.loss, world.data, top=1)
    weak = found["smallest eigenvalue"]
    assert weak.verdict.status == "weak" and weak.error > 1e-3
    assert "stopped before" in str(found)


def test_bad_input() -> None:
    model, (loss, data) = network()
    with pytest.raises(TypeError, match="no loss or no data"):
        measure(model, loss)
    with pytest.raises(TypeError, match="inside the Problem"):
        measure(Problem(model, loss, data), loss, data)
    with pytest.raises(ValueError, match="at least one eigenvector"):
        measure(model, loss, data, top=0)
    with pytest.raises(ValueError, match="finite|nan"):
        measure(model, loss, (data[0] * math.nan, data[1]))


def test_limits_without_measurements_refuse() -> None:
    assert all(limit.rate is None for limit in stability_limits(None, {}))
    (gd, _, sgd) = stability_limits(None, {"sharpness": Estimate(4.0, 0.4), "Fisher trace": Estimate(8.0, 0.8)})
    assert gd.rate and math.isclose(gd.rate.stderr, 0.05) and sgd.rate and math.isclose(sgd.rate.stderr, 0.025)
