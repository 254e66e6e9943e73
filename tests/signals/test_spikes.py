"""Spikes planted in noise are found; noise, trends and short pasts raise none beyond the stated rates."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from towtank.signals.spikes import LOSS, NORM, Band, Rule, band, diverged, spike, spikes
from towtank.signals.step import CannotTell

Floats = np.ndarray[Any, Any]


def noise(kind: str, shape: tuple[int, ...], seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    draws = {
        "gauss": rng.standard_normal,
        "laplace": lambda s: rng.laplace(size=s),
        "student": lambda s: rng.standard_t(3, size=s),
    }
    return draws[kind](shape)


@pytest.mark.parametrize(("kind", "rate"), [("gauss", 1e-4), ("laplace", 5e-4), ("student", 2e-3)])
@pytest.mark.parametrize("past", [20, 128])
def test_false_alarms_by_step(kind: str, rate: float, past: int) -> None:
    """Independent trials, each with its own past: a count of alarms that is binomial."""
    trials = 1200
    draws = 100.0 + noise(kind, (trials, past + 1), seed=past)
    rule = Rule(rise=0.0)
    alarms = sum(spike(row[:-1].tolist(), float(row[-1]), step=0, rule=rule) is not None for row in draws)
    assert alarms <= binom.ppf(0.999, trials, rate)


def test_a_rise_of_less_than_a_tenth_is_none() -> None:
    past = [2.0 + 1e-4 * (i % 3) for i in range(40)]
    assert spike(past, 2.19, step=41) is None
    assert spike(past, 2.21, step=41) is not None


@pytest.mark.parametrize("seed", range(5))
def test_a_training_curve_of_small_batches(seed: int) -> None:
    """A power law that starts at 10 with 10 % noise: nothing. Planted spikes of 2.5 times the loss: each once."""
    t = np.arange(1, 600)
    curve = (1.0 + 9.0 * t**-0.7) * np.exp(0.1 * noise("gauss", t.shape, seed))
    assert spikes(zip(t.tolist(), curve.tolist())) == ()
    for where in (60, 300, 420):
        curve[where : where + 4] *= 2.5  # log 2.5 = 9 sigma of the noise
    found = spikes(zip(t.tolist(), curve.tolist()))
    assert [s.step for s in found] == [int(t[i]) for i in (60, 300, 420)]
    for s in found:
        assert s.z > LOSS.z and s.value == pytest.approx(curve[s.step - 1])
        # a median of 5 of values with 10 % noise is within 4 * 1.25 * 0.1 / sqrt 5 = 22 %, and the trend moves by less
        assert s.expected == pytest.approx(1 + 9 * s.step**-0.7, rel=0.3)


def test_the_first_steep_decrease_and_its_end() -> None:
    steep = [max(1.0, 100.0 - 4.0 * i) for i in range(60)]  # flat from step 25 on: a line alone would expect less
    assert spikes(enumerate(steep)) == ()


def test_steady_growth_is_no_spike() -> None:
    assert spikes((i, 1.0 + 0.05 * i) for i in range(200)) == ()


def test_a_new_level_is_one_spike() -> None:
    values = [1.0 + 0.01 * (i % 5) for i in range(100)] + [3.0 + 0.01 * (i % 5) for i in range(100)]
    assert [s.step for s in spikes(enumerate(values))] == [100]


def test_a_heavy_tail_widens_the_band() -> None:
    """One value in ten lies half above: as large ones are part of the noise, 2.5 times as large ones are not."""
    past = [1.5 if i % 10 == 7 else 1.0 + 0.01 * (i % 3) for i in range(100)]
    assert spike(past, 1.6, step=100) is None
    assert spike(past, 2.6, step=100) is not None
    calm = [1.0 + 0.01 * (i % 3) for i in range(100)]
    assert spike(calm, 1.6, step=100) is not None


def test_one_earlier_spike_hides_no_second() -> None:
    values = [1.0 + 0.01 * (i % 5) for i in range(128)]
    values[110] = 50.0
    assert spike(values, 5.0, step=128) is not None


def test_gradient_norms_must_double() -> None:
    past = np.exp(0.3 * noise("gauss", (128,), 0)).tolist()
    assert spike(past, 1.9, step=1, key="grad/norm") is None
    found = spike(past, 60.0, step=1, key="grad/norm")
    assert found is not None and found.z == pytest.approx(math.log(60) / 0.3, rel=0.4)  # a scale of 128 values: 4 * 0.1
    assert spike([v * 1e-9 for v in past], 6e-8, step=1, key="grad/norm", rule=NORM) is not None


def test_not_finite_is_a_divergence() -> None:
    past = [1.0, 1.1] * 20
    for value in (math.nan, math.inf):
        with pytest.raises(CannotTell, match="divergence"):
            spike(past, value, step=3)
    series = [(i, v) for i, v in enumerate([*past, math.nan, 1.0, math.inf])]
    assert diverged(series) == 40 and diverged(series[:40]) is None and diverged([]) is None
    assert spikes(series) == ()


def test_short_pasts_tell_nothing() -> None:
    with pytest.raises(CannotTell, match="at least 20"):
        spike([1.0] * 19, 9.0, step=20)
    with pytest.raises(CannotTell, match="got 0"):
        band([])
    with pytest.raises(CannotTell, match="got 19"):
        band([1.0] * 19 + [math.nan] * 30)
    assert spikes([(i, 1.0) for i in range(19)] + [(19, 100.0)]) == ()


def test_a_constant_past() -> None:
    where = band([2.0] * 30)
    assert where.low == where.high == 2.0 and where.scale > 0
    assert where.z(2.0) == 0.0 and spike([0.0] * 30, 1.0, step=31) is not None


def test_the_band_covers_a_line_and_knows_its_error() -> None:
    """Extrapolation of a line with Gaussian noise: z is about standard normal, near and far."""
    for ahead in (1, 60):
        trials, n = 400, 60
        draws = noise("gauss", (trials, n + 1), seed=ahead)
        zs = []
        for row in draws:
            where = band((0.3 * np.arange(n) + row[:n]).tolist(), ahead=ahead)
            zs.append(where.z(0.3 * (n - 1 + ahead) + row[n]))
        outside = sum(abs(z) > 3 for z in zs)
        assert outside <= binom.ppf(0.999, trials, 0.02)  # 0.3 % for a known scale; its own error of 13 % makes more


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="z > 0"):
        Rule(z=0.0)
    with pytest.raises(ValueError, match="rise between 0 and 1"):
        Rule(rise=2.0)
    with pytest.raises(ValueError, match="ahead"):
        band([1.0] * 20, ahead=0)
    assert Band(low=1.0, high=2.0, scale=0.5).z(1.5) == 0.0
    assert Band(low=1.0, high=2.0, scale=0.5).z(0.0) == -2.0
