"""Forecasts of a crossing hold the truth as often as they say, and are not made where nothing grows."""

from __future__ import annotations

import numpy as np
import pytest

from towtank.signals.forecast import crossing


@pytest.mark.parametrize("form", ["exponential", "power", "linear"])
def test_intervals_hold_the_truth(form: str) -> None:
    """All growths, 20 % noise of independent readings, seen until 7 tenths of the way: 95 % intervals, 200 repetitions."""
    rng, hits, told = np.random.default_rng(1), 0, 0
    s = np.arange(10.0, 1010.0, 10.0)
    truth = 1400.0
    growth = {"exponential": np.exp((s - truth) / 200), "power": (s / truth) ** 4, "linear": 0.2 + 0.8 * s / truth}
    clean = 1e4 * growth[form]
    for _ in range(200):
        found = crossing(s, clean * np.exp(0.2 * rng.standard_normal(len(s))), 1e4)
        if found is not None:
            told += 1
            hits += found.low <= truth <= found.high
    assert told >= 100  # the rest said that it cannot tell, which is no miss
    # the pool of three forms is wider than any needs: coverage is at least 95 % less two binomial errors of 200
    assert hits >= (0.95 - 2 * (0.95 * 0.05 / told) ** 0.5) * told


def test_noise_without_growth_gives_no_forecast() -> None:
    """A slope beyond 97.5 % in both forms, by chance, in about 2.5 % of 300 series: at most 5 % with its error of 0.9 %."""
    rng, s = np.random.default_rng(2), np.arange(1.0, 201.0)
    told = sum(crossing(s, np.exp(0.3 * rng.standard_normal(200)), 4.0, horizon=np.inf) is not None for _ in range(300))
    assert told <= 0.05 * 300


def test_correlated_noise_gives_no_more() -> None:
    rng, s, told = np.random.default_rng(3), np.arange(1.0, 201.0), 0
    for _ in range(200):
        walk = np.zeros(200)
        for i in range(1, 200):
            walk[i] = 0.8 * walk[i - 1] + 0.2 * rng.standard_normal()
        told += crossing(s, np.exp(walk), 50.0) is not None
    assert told <= 0.05 * 200 + 2 * (0.05 * 0.95 * 200) ** 0.5


def test_a_falling_signal() -> None:
    s = np.arange(1.0, 121.0)
    found = crossing(s, 1e-3 * 10 ** (-s / 50), 1e-7, falling=True)  # reaches 1e-7 at step 200
    assert found is not None and found.low <= 200 <= found.high


def test_growth_that_bends_has_no_forecast_yet() -> None:
    """As of attention logits in a warm-up: 4 to 27 in 22 steps, then almost flat at 80."""
    s = np.arange(2.0, 24.0, 2.0)
    assert crossing(s, 80 * (1 - np.exp(-((s / 30) ** 1.5))) + 4, 1e4) is None  # 300 times what was seen
    s = np.arange(1.0, 41.0)
    slower = np.where(s <= 30, np.exp(s / 6), np.exp(5 + (s - 30) / 40))
    assert crossing(s, slower, 1000.0) is None  # the first three quarters say 41
    assert crossing(s, np.exp(s / 6), 1000.0) is not None


def test_far_crossings_are_not_forecast() -> None:
    s = np.arange(1.0, 101.0)
    assert crossing(s, 10 ** (s / 1000), 1e6) is None


def test_what_cannot_be_used() -> None:
    s = np.arange(1.0, 41.0)
    assert crossing(s[:4], 2 ** s[:4], 1e6) is None
    assert crossing(s, np.full(40, np.nan), 1e6) is None
    assert crossing(s, -np.ones(40), 1e6) is None
    found = crossing(s, np.where(s % 5 == 0, np.nan, 2 ** (s / 2)), 2.0**24)  # gaps are left out
    assert found is not None and found.low <= 48 <= found.high
    with pytest.raises(ValueError, match="positive limit"):
        crossing(s, s, 0.0)
