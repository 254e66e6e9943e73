"""The optimum of one size: against closed forms, under symmetries, at the stated coverage, and where it must refuse."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from tests.laws.sweeps import SP_CURVES, SP_OPTIMA, columns, parabola, skewed, three_point
from towtank.laws.levels import Noise
from towtank.laws.optimum import find_optimum

GRID = [2.0**k for k in range(-10, -2)]


def replicated(seed=0, optimum=-6.7, sd=0.01, extra=2):
    return columns(parabola, optimum, extra=extra, sd=sd, rng=np.random.default_rng(seed))


@pytest.mark.parametrize("width", SP_CURVES)
def test_is_near_the_three_point_parabola_of_measured_curves(width):
    first, losses = SP_CURVES[width]
    best = int(np.argmin(losses))
    closed_form = first + best + three_point(*losses[best - 1 : best + 2])
    assert closed_form == pytest.approx(SP_OPTIMA[width], abs=0.01)
    found = find_optimum([2.0 ** (first + k) for k in range(len(losses))], losses)
    assert np.log2(found.lr.value) == pytest.approx(closed_form, abs=0.1)
    assert 2**closed_form in found.lr
    assert found.verdict.status == "weak" and "one seed" in found.verdict.reason


def test_exact_parabola_is_recovered():
    x = np.log2(GRID)
    found = find_optimum(GRID * 2, [*parabola(x, -6.37), *(parabola(x, -6.37) + 0.1)], [0] * 8 + [1] * 8)
    assert np.log2(found.lr.value) == pytest.approx(-6.37, abs=1e-6)
    assert found.curvature == pytest.approx(0.04, rel=1e-6)
    assert found.loss.value == pytest.approx(2.55, abs=1e-6)
    assert found.verdict.status == "ok"


def test_unbalanced_seeds_do_not_bend_the_curve():
    """A lucky extra seed at three rates lowers them all; naive means over seeds would move the optimum."""
    x = np.arange(-10.0, -2.0)
    y = parabola(x, -6.7)
    near = (x >= -9) & (x <= -7)
    lr, loss = [*(2**x), *(2**x), *(2 ** x[near])], [*(y + 0.01), *(y - 0.01), *(y[near] - 0.2)]
    found = find_optimum(lr, loss, [0] * 8 + [1] * 8 + [2] * 3)
    assert np.log2(found.lr.value) == pytest.approx(-6.7, abs=1e-6)
    naive = np.array([np.mean([v for r, v in zip(lr, loss, strict=True) if r == 2**k]) for k in (-8, -7, -6)])
    assert abs(-7 + three_point(*naive) - -6.7) > 0.3


def test_noise_is_that_of_replicates_about_their_offsets():
    """Against dense least squares: y = level of the rate + offset of the seed, on the five rates about the lowest."""
    lr, loss, seed = replicated(extra=0)
    found = find_optimum(lr, loss, seed)
    near = [i for i, r in enumerate(lr) if 2.0**-9 <= r <= 2.0**-5]
    design = np.array([[lr[i] == 2.0**k for k in range(-9, -4)] + [seed[i] == 1] for i in near], dtype=float)
    y = np.array([loss[i] for i in near])
    left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    assert found.noise.dof == 10 - 6
    assert found.noise.variance == pytest.approx(left @ left / 4, rel=1e-9)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), optimum=st.floats(-8, -5), octaves=st.sampled_from([-3, 1, 5]))
def test_scaling_all_rates_moves_the_optimum_by_as_much(seed, optimum, octaves):
    lr, loss, labels = replicated(seed, optimum)
    one = find_optimum(lr, loss, labels)
    two = find_optimum([r * 2.0**octaves for r in lr], loss, labels)
    for a, b in ((one.lr.value, two.lr.value), (one.lr.low, two.lr.low), (one.lr.high, two.lr.high)):
        assert np.log2(b / a) == pytest.approx(octaves, abs=1e-7)
    assert one.verdict == two.verdict


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), optimum=st.floats(-8, -5), constant=st.floats(-2, 50))
def test_adding_a_constant_to_all_losses_changes_nothing(seed, optimum, constant):
    lr, loss, labels = replicated(seed, optimum)
    one = find_optimum(lr, loss, labels)
    two = find_optimum(lr, [y + constant for y in loss], labels)
    assert two.lr.value == pytest.approx(one.lr.value, rel=1e-6)
    assert (two.lr.low, two.lr.high) == pytest.approx((one.lr.low, one.lr.high), rel=1e-6)
    assert two.loss.value - one.loss.value == pytest.approx(constant, abs=1e-7)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), order=st.randoms(use_true_random=False))
def test_the_order_of_rows_changes_nothing(seed, order):
    rows = list(zip(*replicated(seed), strict=True))
    one = find_optimum(*zip(*rows, strict=True))
    order.shuffle(rows)
    two = find_optimum(*zip(*rows, strict=True))
    assert (one.lr, one.loss, one.verdict) == (two.lr, two.loss, two.verdict)


DRAWS = 60


@pytest.mark.parametrize(
    ("curve", "extra", "sd"),
    [(parabola, 0, 0.01), (parabola, 2, 0.005), (skewed, 0, 0.005), (skewed, 0, 0.02), (skewed, 2, 0.01)],
)
def test_95_percent_intervals_contain_the_truth(curve, extra, sd):
    """A coverage of 95 % leaves fewer hits in one case of 1000."""
    hits = losses = told = 0
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        optimum = rng.uniform(-7.5, -6.5)
        found = find_optimum(*columns(curve, optimum, extra=extra, sd=sd, rng=rng))
        if found.lr is not None:
            told += 1
            hits += 2**optimum in found.lr
            losses += 2.5 in found.loss
    assert told >= 0.95 * DRAWS
    assert min(hits, losses) >= binom.ppf(1e-3, told, 0.95)


def test_intervals_shrink_with_seeds_and_grow_with_noise():
    def width(**more):
        found = [find_optimum(*replicated(s, **more)).lr for s in range(20)]
        return np.median([np.log2(i.high / i.low) for i in found])

    assert width(extra=2) < width(extra=0)
    assert width(sd=0.005) < width(sd=0.01) < width(sd=0.02)


def test_lowest_loss_at_the_lowest_rate_is_not_bracketed():
    found = find_optimum(GRID, parabola(np.log2(GRID), -11.0))
    assert found.lr is None and found.loss is None and found.verdict.status == "refuse"
    assert "not bracketed" in found.verdict.reason and "next grid: 1.2e-4 to 2.0e-3" in found.verdict.reason


def test_lowest_loss_at_the_highest_rate_is_not_bracketed():
    found = find_optimum(GRID, parabola(np.log2(GRID), -2.0))
    assert found.lr is None and found.verdict.status == "refuse"
    assert "not bracketed" in found.verdict.reason and "next grid: 6.2e-2 to 1.0e0" in found.verdict.reason


def test_divergence_above_brackets_without_a_parabola():
    x = np.log2(GRID)
    lr, loss, seed = GRID * 2, [*parabola(x, -4.0), *(parabola(x, -4.0) + 0.01)], [0] * 8 + [1] * 8
    loss = [None if r > 2.0**-4.5 else y for r, y in zip(lr, loss, strict=True)]
    found = find_optimum(lr, loss, seed)
    assert found.verdict.status == "weak" and "divergence" in found.verdict.reason and found.curvature is None
    assert found.lr.value == 2.0**-5
    assert (found.lr.low, found.lr.high) == (2.0**-6, 2.0**-4)


def test_diverged_rows_are_censored_not_averaged():
    lr, loss, seed = replicated(extra=0)
    half = [None if r == 2.0**-3 and s == 0 else y for r, y, s in zip(lr, loss, seed, strict=True)]
    far = find_optimum(lr, half, seed)
    assert far.lr == find_optimum(lr, loss, seed).lr and far.verdict.status == "ok"
    near = find_optimum(
        lr, [np.nan if r == 2.0**-6 and s == 0 else y for r, y, s in zip(lr, loss, seed, strict=True)], seed
    )
    assert near.verdict.status == "weak" and "diverged" in near.verdict.reason


def test_noise_larger_than_the_effect_is_refused():
    refused = 0
    for draw in range(20):
        rng = np.random.default_rng(draw)
        flat = columns(lambda x, _: 2.5 + 0 * x, -6.5, sd=0.02, rng=rng)
        refused += find_optimum(*flat).verdict.status == "refuse"
    assert refused >= 18  # a test at 5 % lets 1 of 20 through


@pytest.mark.parametrize(
    ("lr", "loss", "seed", "why"),
    [
        ([], [], [], "no runs"),
        (GRID[:3], [None, float("nan"), float("inf")], [0, 0, 0], "all 3 runs diverged"),
        (GRID[:3], [2.0, None, None], [0, 0, 0], "only one rate finished"),
        (GRID[:3] * 2, [2.0] * 6, [0, 0, 0, 1, 1, 1], "all losses are equal"),
        (GRID[:3] * 2, [2.0] * 3 + [2.3] * 3, [0, 0, 0, 1, 1, 1], "all losses are equal"),
        (GRID[:2], [2.0, 2.1], [0, 0], "not bracketed"),
    ],
)
def test_refuses_without_a_number(lr, loss, seed, why):
    found = find_optimum(lr, loss, seed)
    assert found.lr is None and found.loss is None
    assert found.verdict.status == "refuse" and why in found.verdict.reason
    if lr and "equal" not in why:
        assert "next grid" in found.verdict.reason


def test_three_rates_of_one_seed_give_the_bracket():
    found = find_optimum(GRID[:3], [2.1, 2.0, 2.1], [0, 0, 0])
    assert found.verdict.status == "weak" and "noise unknown" in found.verdict.reason
    assert found.lr.value == pytest.approx(GRID[1])
    assert found.lr.low < 1.1 * GRID[0] and found.lr.high > 0.9 * GRID[2]


def test_noise_known_from_elsewhere_is_pooled():
    found = find_optimum(GRID[:3], [2.1, 2.0, 2.1], [0, 0, 0], noise=Noise(1e-4, 20))
    assert found.verdict.status == "ok"
    assert 1 < found.lr.high / found.lr.low < 1.5


def test_seeds_not_shared_between_rates_count_as_noise():
    lr, loss, _ = replicated(extra=0)
    found = find_optimum(lr, loss, range(len(lr)))
    assert found.verdict.status in ("ok", "weak") and found.between is None


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan")])
def test_rates_must_be_positive(bad):
    with pytest.raises(ValueError, match="expected positive numbers in 'lr'"):
        find_optimum([0.1, bad], [1.0, 2.0])


def test_columns_must_be_equally_long():
    with pytest.raises(ValueError, match="equal length"):
        find_optimum([0.1, 0.2], [1.0])
