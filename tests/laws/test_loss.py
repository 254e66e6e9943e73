"""Laws of the loss on tables of real experiments, at the precision their sources give."""

import numpy as np
import pytest

from tests.laws.tables import chinchilla, table, where
from towtank.laws.allocation import allocate
from towtank.laws.loss import Chinchilla, OverTraining

X = {"N": "params", "D": "tokens"}
OPTIMUM = {"A": 477.83, "B": 2143.4, "E": 1.8172, "alpha": 0.3473, "beta": 0.3672}
HALF_UNIT = {"A": 0.005, "B": 0.05, "E": 5e-5, "alpha": 5e-5, "beta": 5e-5}  # of the last digit stated
BOUNDS = {"A": (289, 700), "B": (1119, 6770), "E": (1.775, 1.878), "alpha": (0.317, 0.370), "beta": (0.335, 0.423)}
SD = {"A": 115, "E": 0.028, "alpha": 0.0147, "beta": 0.0216}


@pytest.fixture(scope="module")
def fit():
    return Chinchilla(draws=1000).fit(chinchilla(), x=X, y="loss")


def objective(rows, c, delta=1e-3):
    """Sum of Huber terms of log residuals, written out."""
    n, d, y = (np.array(rows[name]) for name in ("params", "tokens", "loss"))
    size = np.abs(np.log(y) - np.log(c["E"] + c["A"] / n ** c["alpha"] + c["B"] / d ** c["beta"]))
    return float(np.sum(np.where(size <= delta, size**2 / 2, delta * (size - delta / 2))))


def test_the_global_optimum_of_the_compute_optimal_table(fit):
    assert len(fit.rows) == 240
    for name, value in OPTIMUM.items():
        assert abs(fit.values[name] - value) <= HALF_UNIT[name] * 1.0001, name
    assert fit.objective == pytest.approx(0.00101827, abs=5e-9)
    assert fit.objective == pytest.approx(objective(chinchilla(), fit.values), rel=1e-12)
    assert fit.coefficients["a"].value == pytest.approx(0.514, abs=5e-4)


def test_published_coefficients_score_as_stated(fit):
    rows = chinchilla()
    hoffmann = {"A": 406.4, "B": 410.7, "E": 1.69, "alpha": 0.34, "beta": 0.28}
    assert objective(rows, hoffmann) == pytest.approx(0.0041210, abs=5e-8)
    replication = {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658}
    assert objective(rows, replication) > fit.objective


def test_all_rows_give_another_law_and_the_five_rows_are_named():
    everything = Chinchilla(draws=100).fit(chinchilla(drop=0), x=X, y="loss")
    stated = {
        "A": (495.7, 0.05),
        "B": (12846, 0.5),
        "E": (1.8913, 5e-5),
        "alpha": (0.3493, 5e-5),
        "beta": (0.4530, 1e-4),
    }
    for name, (value, half) in stated.items():
        assert everything.values[name] == pytest.approx(value, abs=half * 1.0001), name
    assert everything.objective == pytest.approx(0.00182601, abs=5e-9)
    moved = everything.influence(5)["B"]
    largest = sorted(range(245), key=lambda i: -chinchilla(drop=0)["loss"][i])[:5]
    assert sorted(moved.rows) == sorted(largest)
    assert moved.coefficients["B"] == pytest.approx(2143.4, abs=0.05)
    assert moved.factor == pytest.approx(12846 / 2143.4, rel=1e-3)


def test_bootstrap_errors_are_those_of_300_resamples(fit):
    """A standard error from B draws has itself a relative error of about 1 / sqrt(2 B), and more with long tails.

    Three of them, for 300 and for 1000 draws together, is 3 sqrt(1/600 + 1/2000) = 14 %; B, whose tail is long, is left out.
    """
    drawn = fit.form.coefficients(fit.draws)
    for name, sd in SD.items():
        assert np.std(drawn[name]) == pytest.approx(sd, rel=0.15), name
    assert np.std(drawn["beta"] / (drawn["alpha"] + drawn["beta"])) == pytest.approx(0.0191, rel=0.15)
    for name, (low, high) in BOUNDS.items():  # each end within a third of the stated width
        third = (high - low) / 3
        assert fit.coefficients[name].low == pytest.approx(low, abs=third)
        assert fit.coefficients[name].high == pytest.approx(high, abs=third)


def test_both_kinds_of_interval_agree(fit):
    """Likelihood and bootstrap intervals of a law well inside its data: ends within a third of the width."""
    for name in ("alpha", "beta", "E"):
        profile, drawn = fit.profile(name), fit.coefficients[name]
        third = (drawn.high - drawn.low) / 3
        assert profile.interval.low == pytest.approx(drawn.low, abs=third)
        assert profile.interval.high == pytest.approx(drawn.high, abs=third)
        assert (profile.objective >= fit.objective * (1 - 1e-9)).all()
        assert profile.values[np.argmin(profile.objective)] == pytest.approx(fit.values[name])


def test_coefficients_that_cannot_be_told_apart_are_paired(fit):
    pairs = {(p.first, p.second): p for p in fit.identifiability().pairs}
    assert set(pairs) == {("A", "alpha"), ("B", "beta")}
    term = pairs["A", "alpha"]
    assert term.correlation > 0.99
    slope = float(
        term.combination.split()[3]
    )  # log A - slope alpha: the term at N = exp(slope), large where N is small
    assert 0.1 * min(chinchilla()["params"]) < np.exp(slope) < np.median(chinchilla()["params"])
    assert term.value.high - term.value.low < 0.1 * (np.log(700) - np.log(289))


def test_exponents_depend_on_the_rows_selected(fit):
    cuts = {(s.column, s.end, s.share): s.coefficients for s in fit.selection()}
    assert len(cuts) == 18
    rows = chinchilla()
    kept = sorted(range(240), key=lambda i: rows["loss"][i])[:216]
    again = Chinchilla(draws=10).fit({n: [v[i] for i in kept] for n, v in rows.items()}, x=X, y="loss")
    assert cuts["loss", "highest", 0.1]["beta"] == pytest.approx(again.values["beta"], rel=1e-5)


def test_allocation_minimises_the_loss_at_its_compute(fit):
    best = allocate(fit, 5.76e23)
    n = best.N.value * np.geomspace(0.5, 2, 801)
    loss = fit.law_at(fit.inner[None], {"N": n, "D": 5.76e23 / 6 / n})[0]
    assert n[np.argmin(loss)] == pytest.approx(best.N.value, rel=2e-3)  # the step of the grid
    assert best.loss.value == pytest.approx(loss.min(), rel=1e-7)
    assert best.N.value * best.D.value * 6 == pytest.approx(5.76e23)
    assert 20 in best.ratio and 70e9 in best.N  # the model the original paper trained


SMALL = ("d=96_l=8_h=4", "d=512_l=8_h=4", "d=576_l=24_h=8", "d=1024_l=24_h=8")
FORECASTS = [
    (
        "rpj",
        {"a": 166.2, "beta": 366.7, "b": -0.27285, "E": 1.8366},
        {("open_lm_1b", 640): 0.710, ("open_lm_7b", 20): 0.732},
    ),
    ("c4_original", {"a": 113.7, "beta": 189.5, "b": -0.24247, "E": 1.5083}, {("open_lm_7b", 20): 4.30}),
    ("rw_original", {"a": 125.1, "beta": 246.2, "b": -0.25439, "E": 1.7345}, {("open_lm_7b", 20): 1.62}),
]


@pytest.mark.parametrize(("dataset", "stated", "errors"), FORECASTS, ids=[f[0] for f in FORECASTS])
def test_five_small_runs_forecast_the_largest_within_the_stated_error(dataset, stated, errors):
    """On one training set the forecast of 7B parameters misses by 4.3 %; that failure is part of the record."""
    runs = where(table("gadre_openlm/openlm_104_runs.csv"), lambda row: row["dataset_name"] == dataset)
    small = where(runs, lambda r: (r["tok_mult"] == 20 and r["model_name"] in SMALL) or (
        r["tok_mult"] == 320 and r["model_name"] == SMALL[0]))  # fmt: skip
    fit = OverTraining(draws=50).fit(small, x={"N": "N", "M": "tok_mult"}, y="loss_c4_val")
    assert len(fit.rows) == 5
    for name, value in stated.items():
        digits = len(str(value).split(".")[1])
        assert fit.values[name] == pytest.approx(value, abs=0.5001 * 10**-digits), name
    for (model, multiple), percent in errors.items():
        run = where(runs, lambda r, m=model, k=multiple: r["model_name"] == m and r["tok_mult"] == k)
        x = {"N": np.array(run["N"]), "M": np.array(run["tok_mult"])}
        error = abs(fit.law_at(fit.inner[None], x)[0, 0] / run["loss_c4_val"][0] - 1)
        assert 100 * error == pytest.approx(percent, abs=0.005 if percent > 1 else 0.0005)
    assert fit.verdict.status == "weak" and "5 rows for 4 coefficients" in fit.verdict.reason
