"""Products of powers: published exponents, least squares, known noise, coverage."""

import numpy as np
import pytest

from tests.laws.contract import LawCase, bounds, hits
from tests.laws.hyperparameters import porian, step_law
from towtank.laws.optima import near_best
from towtank.laws.product import AllocationLaw, BatchLaw, HorizonLaw, RateLaw, with_noise
from towtank.laws.rows import read_rows

N, D = (m.ravel() for m in np.meshgrid(np.geomspace(2e8, 1e9, 5), np.geomspace(4e9, 1e11, 6), indexing="ij"))
PLANE = LawCase(
    law=RateLaw(draws=200), truth={"c": 2.0, "exponent_N": -0.7, "exponent_D": 0.3}, x={"N": N, "D": D},
    at={"N": 7e9, "D": 1e12}, sd=0.1, group=np.arange(30) // 2,
)  # fmt: skip
LINE = LawCase(
    law=HorizonLaw(draws=200), truth={"c": 5.0, "exponent_D": -0.32},
    x={"D": np.geomspace(1e9, 1e11, 24)}, at={"D": 1e12}, sd=0.1, group=np.arange(24) // 2,
)  # fmt: skip


def test_all_15_exponents_of_porian_2024():
    settings = list(porian())
    assert len(settings) == 15
    for setting, table, stored in settings:
        fit = AllocationLaw(draws=50).fit(table, x="flops", y="n")
        assert fit.values["exponent_C"] == pytest.approx(stored["basic"], abs=5e-5), setting
        precise = table | {"weight": [s**-2 for s in table["n_star_std"]]}
        weighted = AllocationLaw(draws=50).fit(precise, x="flops", y="n", weights="weight")
        assert weighted.values["exponent_C"] == pytest.approx(stored["weighted"], abs=5e-5), setting
    corrections = [round(stored["basic"], 3) for setting, _, stored in settings if setting[0] == "summary_df"]
    assert corrections == [0.834, 0.701, 0.604, 0.571, 0.497]


def test_interval_from_stored_noise_has_the_width_of_its_closed_form():
    _, table, _ = next(porian())
    fit = with_noise(AllocationLaw(draws=4000).fit(table, x="flops", y="n"), table["n_star_std"])
    x = np.log(table["flops"])
    slope = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    sd = np.sqrt(np.sum((slope * table["n_star_std"]) ** 2))
    found = fit.coefficients["exponent_C"]
    # an end is the 2.5 % quantile of 4000 normal draws: standard error sqrt(p (1 - p) / 4000) / density = 0.042 sd
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * sd, abs=4 * 0.042 * sd)
    assert 0.834 in found and fit.verdict.status == "ok"


def test_noise_that_is_too_small_for_the_scatter_is_inflated_and_said():
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 1e4, 40)
    table = {"x": x, "y": x**0.5 * np.exp(0.1 * rng.standard_normal(40))}
    fit = HorizonLaw().fit(table, x="x", y="y")
    small, right = with_noise(fit, [0.01] * 40), with_noise(fit, [0.1] * 40)
    assert small.verdict.status == "weak" and "more than their noise" in small.verdict.reason
    assert "more than their noise" not in right.verdict.reason
    widths = [f.coefficients["exponent_D"].high - f.coefficients["exponent_D"].low for f in (small, right)]
    # both are the same draws times 0.01 Birge and 0.1 max(Birge, 1); the Birge ratio is the scatter over the noise
    residual = np.log(table["y"]) - np.polyval(np.polyfit(np.log(x), np.log(table["y"]), 1), np.log(x))
    scatter = np.sqrt(residual @ residual / 38)
    assert widths[0] / widths[1] == pytest.approx(scatter / max(scatter, 0.1), rel=1e-6)


@pytest.mark.parametrize("sd", [[0.1] * 3, [0.1] * 3 + [0.0], [0.1] * 3 + [np.nan]])
def test_noise_must_be_one_positive_number_per_row(sd):
    fit = HorizonLaw(draws=20).fit({"x": [1, 2, 4, 8], "y": [1, 2, 4, 8.5]}, x="x", y="y")
    with pytest.raises(ValueError, match="expected 4 positive"):
        with_noise(fit, sd)


def test_noise_needs_least_squares():
    fit = HorizonLaw(draws=20, delta=1e-3).fit({"x": [1, 2, 4, 8], "y": [1, 2, 4, 8.5]}, x="x", y="y")
    with pytest.raises(ValueError, match="delta=numpy.inf"):
        with_noise(fit, [0.1] * 4)


def test_plane_is_the_least_squares_plane():
    table = PLANE.table(np.random.default_rng(3), grouped=False)
    fit = RateLaw(draws=20).fit(table, x={"N": "N", "D": "D"}, y="y")
    log_c, *exponents = np.linalg.lstsq(
        np.stack([np.ones(N.size), np.log(N), np.log(D)], axis=1), np.log(table["y"]), rcond=None
    )[0]
    # the solver ends where a step gains less than 1e-13 of the objective: within 5e-7 standard errors, here below 1e-6
    assert fit.values["exponent_N"] == pytest.approx(exponents[0], abs=1e-6)
    assert fit.values["exponent_D"] == pytest.approx(exponents[1], abs=1e-6)
    assert np.log(fit.values["c"]) == pytest.approx(log_c, abs=1e-4)


@pytest.mark.parametrize(
    ("within", "lr", "batch"),
    [(0.0025, (77.7, -0.766, 0.197), (0.209, 0.613)), (0.0, (30.1, -0.823, 0.288), (3.42, 0.498))],
)
def test_selection_rules_of_the_step_law(within, lr, batch):
    """Coefficients at the precision they are printed with: 3 digits, exponents 3 decimals."""
    near = near_best(step_law(), cell=["N", "D"], y="smooth_loss", within=within)
    rate = RateLaw(draws=100).fit(near, x={"N": "N", "D": "D"}, y="lr", groups="cell").values
    size = BatchLaw(draws=100).fit(near, x="D", y="batch", groups="cell").values
    assert float(f"{rate['c']:.3g}") == lr[0] and float(f"{size['c']:.3g}") == batch[0]
    assert (round(rate["exponent_N"], 3), round(rate["exponent_D"], 3)) == lr[1:]
    assert round(size["exponent_D"], 3) == batch[1]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("case", [PLANE, LINE], ids=["plane", "line"])
def test_coverage(case, grouped):
    low, high = bounds(25)
    found = hits(case, range(25), grouped=grouped)
    assert all(low <= count <= high for count in found.values()), found


def test_coverage_of_intervals_from_known_noise():
    x = np.geomspace(1e16, 1e19, 12)
    inside = 0
    for draw in range(25):
        rng = np.random.default_rng(draw)
        sd = rng.uniform(0.1, 0.25, 12)
        table = {"x": x, "y": 3e-4 * x**0.5 * np.exp(sd * rng.standard_normal(12))}
        fit = AllocationLaw(draws=200).fit_rows(read_rows(table, {"C": "x"}, "y"), judge=False)
        inside += 0.5 in with_noise(fit, sd).coefficients["exponent_C"]
    low, high = bounds(25)
    assert low <= inside <= high
