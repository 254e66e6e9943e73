"""The optimum with a borrowed curvature: exact on parabolas, honest in noise, and silent outside of what was tried."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from towtank.laws.levels import Noise
from towtank.laws.optimum import find_optimum
from towtank.laws.tilt import Curvature, shared_curvature, tilt_optimum

RATES = [-9.0, -8.0, -7.0]


def runs(
    best: float, c: float, rng: np.random.Generator, sd: float, rates: list[float] = RATES
) -> tuple[list, list, list]:
    rows = [(2.0**x, s) for s in (0, 1) for x in rates]
    offset = rng.normal(0, 0.05, 2)
    losses = [2 + c * (np.log2(lr) - best) ** 2 + offset[s] + rng.normal(0, sd) for lr, s in rows]
    return [lr for lr, _ in rows], losses, [s for _, s in rows]


def test_least_squares_written_out() -> None:
    """Unequal spacing: the tilt by numpy's least squares on loss - c x^2."""
    rng = np.random.default_rng(0)
    lr, loss, seed = runs(-7.6, 0.03, rng, 0.01, [-9.0, -8.2, -6.9, -6.0])
    found = tilt_optimum(lr, loss, seed, curvature=Curvature(0.02, 0.2))
    x, s = np.log2(lr), np.array(seed)
    design = np.stack([s == 0, s == 1, x], axis=1).astype(float)
    slope = np.linalg.lstsq(design, np.array(loss) - 0.02 * x**2, rcond=None)[0][2]
    assert np.log2(found.lr.value) == pytest.approx(-slope / 0.04, abs=1e-9)


@pytest.mark.parametrize("true_c", [0.016, 0.02, 0.025])
def test_intervals_cover_and_beat_the_free_parabola(true_c: float) -> None:
    rng = np.random.default_rng(1)
    hits, told, error, free = 0, 0, [], []
    for _ in range(100):
        best = rng.uniform(-8.6, -7.4)
        rows = runs(best, true_c, rng, 0.015)
        found = tilt_optimum(*rows, curvature=Curvature(0.02, 0.25), noise=Noise(0.015**2, 20))
        if found.lr is None:
            continue
        told += 1
        hits += 2.0**best in found.lr
        error.append(np.log2(found.lr.value) - best)
        other = find_optimum(*rows, noise=Noise(0.015**2, 20))
        free.append(abs(np.log2(other.lr.value) - best) if other.lr else 2.0)
    assert told > 90
    assert hits >= binom.ppf(1e-3, told, 0.95)  # fewer in one case of 1000
    assert np.median(np.abs(error)) < np.median(free)


def test_an_optimum_beyond_the_rates_is_refused() -> None:
    rng = np.random.default_rng(2)
    low = tilt_optimum(*runs(-11.0, 0.02, rng, 1e-4), curvature=Curvature(0.02, 0.2))
    high = tilt_optimum(*runs(-4.0, 0.02, rng, 1e-4), curvature=Curvature(0.02, 0.2))
    assert low.lr is None and "below" in low.verdict.reason
    assert high.lr is None and "above" in high.verdict.reason


def test_too_little_is_refused() -> None:
    assert tilt_optimum([0.1], [2.0], [0], curvature=Curvature(0.02, 0.2)).verdict.status == "refuse"
    alone = tilt_optimum([0.1, 0.2, 0.4], [2.0, 1.9, 2.0], [0, 0, 0], curvature=Curvature(0.02, 0.2))
    assert "noise is not known" in alone.verdict.reason
    diverged = tilt_optimum([0.1, 0.2, 0.4], [None] * 3, [0, 0, 0], curvature=Curvature(0.02, 0.2))
    assert diverged.verdict.status == "refuse"


def test_shared_curvature_is_the_geometric_mean() -> None:
    x = np.arange(-10.0, -4.0)
    optima = [find_optimum(2.0**x, 2 + c * (x + 7.2) ** 2, np.zeros(6, dtype=int)) for c in (0.01, 0.04)]
    shared = shared_curvature(optima)
    assert shared is not None and shared.value == pytest.approx(0.02, rel=1e-6)
    assert shared.spread == pytest.approx(np.log(4) / np.sqrt(2), rel=1e-6)
    assert shared_curvature([]) is None


def test_levels_that_contradict_the_curvature_are_refused() -> None:
    rng = np.random.default_rng(3)
    flat = tilt_optimum(*runs(-8.0, 0.0, rng, 0.002), curvature=Curvature(0.02, 0.2), noise=Noise(0.002**2, 20))
    assert flat.lr is None and "do not bend" in flat.verdict.reason
    noisy = tilt_optimum(*runs(-8.0, 0.0, rng, 0.02), curvature=Curvature(0.02, 0.2), noise=Noise(0.02**2, 20))
    assert noisy.lr is not None  # too noisy to contradict
