"""Moments of activations against sums in float64, and units that are dead."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.worlds import generator
from towtank.signals.activations import activations
from towtank.signals.capture import capture
from towtank.signals.moments import Moments
from towtank.signals.step import CannotTell, Step


def by_hand(values: list[float]) -> dict[str, float]:
    n = len(values)
    mean = math.fsum(values) / n
    second = math.fsum((v - mean) ** 2 for v in values) / n
    fourth = math.fsum((v - mean) ** 4 for v in values) / n
    rms = math.sqrt(math.fsum(v * v for v in values) / n)
    return {"mean": mean, "variance": second, "rms": rms, "max": max(map(abs, values)), "kurtosis": fourth / second**2}


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (1e-25, 0.0), (1e25, 0.0), (1.0, 100.0)])
def test_moments_against_float64(scale, shift, monkeypatch):
    monkeypatch.setattr("towtank.signals.moments._PIECE", {"cpu": 1000})
    x = scale * (torch.randn(4321, generator=generator(0)) ** 3 + shift)
    found, want = Moments.of(x), by_hand(x.double().tolist())
    eps = torch.finfo(torch.float32).eps
    # entries are rounded to eps of the largest; a deviation is good to that against the standard deviation
    tolerance = 100 * eps * want["max"] / math.sqrt(want["variance"])
    for key, value in want.items():
        assert float(getattr(found, key)) == pytest.approx(value, rel=tolerance, abs=eps * want["max"]), key


def test_pooling_is_the_whole():
    x = torch.randn(3000, generator=generator(1), dtype=torch.float64).exp()
    whole = Moments.of(x)
    parts = Moments.pooled([Moments.of(x[:10] * 1), Moments.of(x[10:11]), Moments.of(x[11:])])
    for key in ("count", "mean", "variance", "rms", "max", "kurtosis"):
        assert float(getattr(parts, key)) == pytest.approx(float(getattr(whole, key)), rel=1e-12)


def test_gaussian_and_two_point_distributions():
    n = 200_000
    x = torch.randn(n, generator=generator(2))
    assert abs(float(Moments.of(x).kurtosis) - 3) < 5 * math.sqrt(24 / n)  # standard error of a kurtosis
    assert float(Moments.of(torch.tensor([1.0, -1.0] * 50)).kurtosis) == pytest.approx(1)
    assert float(Moments.of(torch.full((9,), 2.0)).kurtosis) == 1
    assert float(Moments.of(torch.zeros(9)).rms) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    x = (300 * torch.randn(5000, generator=generator(3))).to(dtype)  # squares beyond float16
    want = by_hand(x.double().tolist())
    assert float(Moments.of(x).rms) == pytest.approx(want["rms"], rel=1e-5)
    assert float(Moments.of(x).kurtosis) == pytest.approx(want["kurtosis"], rel=1e-4)


def test_what_is_not_finite_shows():
    assert math.isnan(float(Moments.of(torch.tensor([1.0, torch.nan])).max))
    assert float(Moments.of(torch.tensor([1.0, -torch.inf])).max) == math.inf
    for bad in (torch.zeros(0), torch.zeros(3, dtype=torch.long)):
        with pytest.raises(ValueError, match="expected a real tensor"):
            Moments.of(bad)


def test_memory_layouts():
    x = torch.randn(2, 3, 4, 5, generator=generator(4))
    for y in (x.to(memory_format=torch.channels_last), x.transpose(0, 3), x[:, ::2]):
        assert float(Moments.of(y).kurtosis) == pytest.approx(by_hand(y.flatten().tolist())["kurtosis"], rel=1e-5)


# Dead units


def readings(model, *inputs):
    with capture(model) as seen:
        for x in inputs:
            model(x)
    return activations()(Step(number=1, loss=torch.tensor(0.0), model=model, recorded={"seen": seen}))


def layer(units: int, dead: int) -> nn.Linear:
    """Outputs are all positive for positive inputs, but for the dead ones."""
    linear = nn.Linear(3, units)
    nn.init.constant_(linear.weight, 0.1)
    nn.init.ones_(linear.bias)
    linear.bias.data[:dead] = -100
    return linear


class Functional(nn.Module):
    """ReLU as a function, twice, with other units dead."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = layer(4, 1), nn.Linear(4, 8)
        nn.init.zeros_(self.two.weight)
        self.two.bias.data = torch.tensor([-1.0] * 6 + [1.0] * 2)

    def forward(self, x):
        return torch.relu(self.two(F.relu(self.one(x))))


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Threshold(0.0, 0.0), nn.Hardswish()]
)
def test_planted_dead_units_of_modules(activation):
    found = readings(nn.Sequential(layer(8, 2), activation), torch.rand(16, 3, generator=generator(0)))
    assert float(found["activation/dead/1"]) == 0.25 == float(found["activation/dead_max"])


def test_activation_functions_that_are_never_zero_have_no_dead_units():
    found = readings(nn.Sequential(layer(8, 2), nn.Tanh(), nn.GELU()), torch.rand(16, 3))
    assert not [key for key in found if "dead" in key]


def test_functions_are_told_apart():
    found = readings(Functional(), torch.rand(5, 7, 3, generator=generator(0)))
    dead = {key: float(value) for key, value in found.items() if "dead" in key}
    assert dead == {"activation/dead/relu": 0.25, "activation/dead/relu.1": 0.75, "activation/dead_max": 0.75}


def test_units_of_convolutions_are_channels():
    conv = nn.Conv2d(1, 4, 3)
    nn.init.zeros_(conv.weight)
    conv.bias.data = torch.tensor([1.0, -1.0, -1.0, -1.0])
    x = torch.rand(2, 1, 8, 8)
    for model in (nn.Sequential(conv, nn.ReLU()), nn.Sequential(conv, nn.Identity(), nn.Dropout(0.0), nn.ReLU())):
        assert float(readings(model, x)["activation/dead_max"]) == 0.75
    assert float(readings(nn.Sequential(conv, nn.ReLU()), x[0])["activation/dead_max"]) == 0.75  # unbatched


def test_a_unit_is_dead_only_if_every_example_says_so():
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU())
    model[0].weight.data = torch.tensor([[1.0], [-1.0]])
    one, other = torch.tensor([[1.0], [2.0]]), torch.tensor([[-1.0]])
    assert float(readings(model, one)["activation/dead/1"]) == 0.5
    assert float(readings(model, one, other)["activation/dead/1"]) == 0  # accumulated
    assert float(readings(model, torch.tensor([[torch.nan]]))["activation/dead/1"]) == 0  # NaN is not dead
    assert math.isnan(float(readings(model, torch.tensor([[torch.nan]]))["activation/max/0"]))


def test_readings_of_a_network_and_of_accumulated_batches():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))
    a, b = torch.randn(5, 3, generator=generator(0)), torch.randn(9, 3, generator=generator(1))
    both, split = readings(model, torch.cat([a, b])), readings(model, a, b)
    assert set(both) == {
        f"activation/{what}/{name}" for what in ("rms", "max", "kurtosis") for name in ("0", "1.0", "1.1")
    }
    for key, value in both.items():
        assert float(split[key]) == pytest.approx(float(value), rel=1e-5)
    want = by_hand(model[0](torch.cat([a, b])).flatten().tolist())
    assert float(both["activation/rms/0"]) == pytest.approx(want["rms"], rel=1e-5)
    with pytest.raises(CannotTell, match="none of its modules was called"):
        readings(model)
