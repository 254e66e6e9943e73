"""Laws of the batch size: regimes told apart or not, the spiked matrix, critical batch sizes, coverage."""

import numpy as np
import pytest

from tests.laws.contract import LawCase, bounds, hits
from towtank.laws.batch import BatchRateLaw, CriticalBatchLaw, regime, with_batch
from towtank.laws.product import HorizonLaw

B = np.repeat(2.0 ** np.arange(3, 15), 2)
RUN = np.repeat(np.arange(12), 2)
CASES = [
    LawCase(law=BatchRateLaw(draws=200), truth={"u": 100.0, "s": 51200.0, "p": 1.0}, x={"b": B}, at={"b": 5e4}, sd=0.05, group=RUN),
    LawCase(law=CriticalBatchLaw(draws=200), truth={"S_min": 1e3, "E_min": 5e5}, x={"b": B}, at={"b": 5e4}, sd=0.05, group=RUN),
]  # fmt: skip


def rates(p, *, saturation=512.0, sd=0.03, low=3, high=15, seed=0):
    b = np.repeat(2.0 ** np.arange(low, high), 2)
    noise = sd * np.random.default_rng(seed).standard_normal(b.size)
    return {"batch": b, "lr": 0.01 / (1 + (saturation / b) ** p) * np.exp(noise)}


def fitted(table, **kwargs):
    return BatchRateLaw(draws=200).fit(table, x="batch", y="lr", **kwargs)


@pytest.mark.parametrize(("p", "said"), [(1.0, "1/b"), (0.5, "1/sqrt(b)")])
def test_data_of_a_regime_name_it(p, said):
    found = regime(fitted(rates(p)))
    assert found.exponent == said and p in found.p
    assert (found.log_likelihood_ratio > 0) == (p == 1.0)


@pytest.mark.parametrize("saturation", [2.0, 1e-3])
def test_saturated_data_cannot_tell(saturation):
    found = regime(fitted(rates(1.0, saturation=saturation, sd=0.1, low=4)))
    assert found.exponent == "cannot tell" and found.verdict.status == "weak"
    assert abs(found.log_likelihood_ratio) < 1.92


def test_data_that_never_saturate_tell_the_exponent_and_no_largest_rate():
    fit = fitted(rates(0.5, saturation=1e9))
    told = fit.coefficients
    assert regime(fit).exponent == "1/sqrt(b)"
    assert np.isinf(told["lr_max"].high) and np.isinf(told["B"].high)
    assert told["lr_max"].low > 0.01 / (1 + (1e9 / 2**14) ** 0.5) / 2  # half the largest rate that was seen


def test_neither_regime_is_an_answer():
    found = regime(fitted(rates(0.25, sd=0.01)))
    assert found.exponent == "neither" and found.p.high < 0.5


def test_a_wrong_regime_is_named_no_more_often_than_the_level_allows():
    """A regime is excluded only where the interval leaves it out: at most 8 % of tables, the coverage being 92 % or more."""
    wrong = sum(regime(fitted(rates(1.0, sd=0.1, seed=s), seed=s)).exponent == "1/sqrt(b)" for s in range(8))
    assert wrong <= 4  # more happen in 1.5 of 10^4 at 8 % of 8


def test_log_likelihood_ratio_is_that_of_two_plain_fits():
    from scipy.optimize import minimize

    table = rates(1.0, sd=0.1)
    x, y = table["batch"], np.log(table["lr"])

    def left(p):
        def loss(t):
            return np.sum((y - t[0] + np.log1p((np.exp(t[1]) / x) ** p)) ** 2)

        return min(
            minimize(loss, [np.log(0.01), np.log(s)], method="Nelder-Mead", tol=1e-12).fun for s in (10, 500, 5e4)
        )

    expected = y.size / 2 * np.log(left(0.5) / left(1.0))
    assert regime(fitted(table)).log_likelihood_ratio == pytest.approx(expected, rel=1e-5)


def test_regime_of_another_law_or_of_too_few_rows():
    with pytest.raises(TypeError, match="BatchRateLaw"):
        regime(HorizonLaw(draws=20).fit({"x": [1, 2, 4, 8], "y": [1, 2, 4, 9]}, x="x", y="y"))
    few = regime(fitted({"batch": [1, 2, 4], "lr": [1, 2, 3]}))
    assert few.exponent == "cannot tell" and few.p is None and few.verdict.status == "refuse"


@pytest.mark.parametrize(("noise", "said"), [((0.05, 0.8), "1/b"), ((1.2, 12.0), "1/sqrt(b)")])
def test_curvature_of_a_spiked_random_matrix_gives_either_regime(noise, said):
    """Largest eigenvalue of a spike of 1 in symmetric noise of size s = 1/sqrt(b): 1 + s^2 below s = 1, 2 s above.

    Drawn anew, 300 x 300: its fluctuations, of relative size 300^(-2/3), are the noise of the rows.
    """
    rng, size, rows = np.random.default_rng(0), 300, {"batch": [], "lr": []}
    for s in np.geomspace(*noise, 10):
        draw = rng.standard_normal((size, size))
        matrix = s * (draw + draw.T) / np.sqrt(2 * size)
        matrix[0, 0] += 1.0
        rows["batch"].append(s**-2)
        rows["lr"].append(2 / np.linalg.eigvalsh(matrix)[-1])
    assert regime(fitted(rows)).exponent == said


def test_hyperbola_of_steps_and_examples():
    """Points on (S / 400 - 1) (E / 3e5 - 1) = 1."""
    steps = np.array([500.0, 800.0, 2000.0, 8000.0])
    examples = 3e5 * (1 + 1 / (steps / 400 - 1))
    table = with_batch({"s": steps, "e": examples}, steps="s", examples="e")
    fit = CriticalBatchLaw().fit(table, x="batch", y="s")
    found = {name: i.value for name, i in fit.coefficients.items()}
    assert found == pytest.approx({"S_min": 400, "E_min": 3e5, "B_crit": 750}, rel=1e-6)


def test_small_batches_alone_determine_the_examples_only():
    b = np.repeat([1.0, 2.0, 4.0, 8.0, 16.0], 3)
    steps = 1e3 * (1 + 1e4 / b) * np.exp(0.02 * np.random.default_rng(1).standard_normal(15))
    fit = CriticalBatchLaw().fit({"batch": b, "steps": steps}, x="batch", y="steps")
    told = fit.coefficients
    assert told["E_min"].high / told["E_min"].low < 1.1 and 1e7 in told["E_min"]
    assert told["S_min"].low < 0 and 1e3 in told["S_min"]
    assert np.isinf(told["B_crit"].high) and 1e4 in told["B_crit"]
    assert fit.judge(b=1e4).status != "ok"


def test_run_that_ended_before_the_target_is_a_bound():
    b = 2.0 ** np.arange(4, 14)
    steps = 1e3 * (1 + 512 / b)
    cut = steps.copy()
    cut[0] = steps[0] / 4
    table = {"batch": b, "steps": cut}
    honest = CriticalBatchLaw().fit(table, x="batch", y="steps", censored=[0]).values
    naive = CriticalBatchLaw().fit(table, x="batch", y="steps").values
    assert honest["E_min"] == pytest.approx(512e3, rel=1e-6)
    assert naive["E_min"] < 0.9 * 512e3


def test_batch_column_needs_positive_numbers():
    with pytest.raises(ValueError, match="positive numbers in 's'"):
        with_batch({"s": [0, 1], "e": [1, 1]}, steps="s", examples="e")


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.law.name)
def test_coverage(case, grouped):
    draws = 16
    low, high = bounds(draws)
    found = hits(case, range(draws), grouped=grouped)
    assert all(low <= count <= high for count in found.values()), found
