"""The gradient noise scale: the unbiased pair, Gaussian gradients, gradients lost in their noise."""

import numpy as np
import pytest

from tests.laws.contract import bounds
from towtank.laws.noise_scale import NoiseScaleLaw
from towtank.laws.rows import read_rows

SMALL, BIG, DIMENSION = 8, 64, 40


def norms(square, trace, steps, seed, sizes=(SMALL, BIG)):
    """Squared gradient norms at several batch sizes, all of the same examples of each step."""
    rng = np.random.default_rng(seed)
    mean = np.zeros(DIMENSION)
    mean[0] = np.sqrt(square)
    table = {"step": [], "batch": [], "square": []}
    for step in range(steps):
        examples = mean + np.sqrt(trace / DIMENSION) * rng.standard_normal((max(sizes), DIMENSION))
        for b in sizes:
            batches = examples.reshape(-1, b, DIMENSION).mean(axis=1)
            table["step"].append(step)
            table["batch"].append(b)
            table["square"].append(float(np.mean(np.sum(batches**2, axis=1))))
    return table


def fitted(table, seed=0):
    rows = read_rows(table, {"b": "batch"}, "square", groups="step", positive_y=False)
    return NoiseScaleLaw(draws=200).fit_rows(rows, seed=seed, judge=False)


def test_two_batch_sizes_give_the_unbiased_pair():
    table = norms(1.0, 50.0, 12, 0)
    small, big = (
        np.mean([s for s, b in zip(table["square"], table["batch"], strict=True) if b == n]) for n in (SMALL, BIG)
    )
    square = (BIG * big - SMALL * small) / (BIG - SMALL)
    trace = (small - big) / (1 / SMALL - 1 / BIG)
    found = {name: i.value for name, i in fitted(table).coefficients.items()}
    # the solver ends within 5e-7 standard errors of the coefficients, which are below 1 here but for the trace
    assert found["G2"] == pytest.approx(square, abs=1e-6)
    assert found["trace"] == pytest.approx(trace, rel=1e-6)
    assert found["B_simple"] == pytest.approx(trace / square, rel=1e-5)


def test_more_batch_sizes_give_the_least_squares_line():
    table = norms(1.0, 50.0, 6, 1, sizes=(2, 8, 32, 64))
    b, weight = np.array(table["batch"]), np.array(table["batch"], dtype=float) ** 2
    x = np.stack([np.ones(b.size), 1 / b], axis=1) * np.sqrt(weight)[:, None]
    expected = np.linalg.lstsq(x, np.array(table["square"]) * np.sqrt(weight), rcond=None)[0]
    found = NoiseScaleLaw(draws=50).fit(table | {"w": weight}, x="batch", y="square", weights="w", groups="step").values
    assert [found["G2"], found["trace"]] == pytest.approx(expected, rel=1e-5)


def test_forecast_is_the_mean_square_at_another_batch_size():
    fit = fitted(norms(1.0, 50.0, 60, 2))
    assert 1.0 + 50 / 1024 in fit.forecast({"b": np.array([1024.0])})[0]


def test_gradient_lost_in_its_noise_has_no_upper_end():
    found = fitted(norms(0.0, 50.0, 30, 0)).coefficients
    assert found["G2"].low < 0 and np.isinf(found["B_simple"].high)
    assert 0 < found["B_simple"].low < np.inf


@pytest.mark.parametrize("square", [1.0, 0.1], ids=["clear", "near the noise"])
def test_coverage(square):
    draws, trace = 40, 50.0
    hits = dict.fromkeys(("G2", "trace", "B_simple"), 0)
    for draw in range(draws):
        told = fitted(norms(square, trace, 30, draw), seed=draw).coefficients
        for name, truth in (("G2", square), ("trace", trace), ("B_simple", trace / square)):
            hits[name] += truth in told[name]
    low, high = bounds(draws)
    assert all(low <= count <= high for count in hits.values()), hits


def test_one_batch_size_is_refused():
    fit = NoiseScaleLaw().fit({"batch": [8] * 4, "square": [1.0, 2.0, 1.5, 1.1]}, x="batch", y="square")
    assert fit.verdict.status == "refuse" and "one distinct" in fit.verdict.reason
