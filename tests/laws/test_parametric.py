"""Parametric laws: derivatives, conformance, censored and weighted rows, bad input, what a fit says of itself."""

import numpy as np
import pytest

from tests.laws.cases import BY_NAME, CASES
from tests.laws.contract import bounds, hits, judged_by_differences
from towtank.laws.crossover import crossover
from towtank.laws.loss import Chinchilla, Power, PowerFloor
from towtank.laws.reward import ComputeSigmoid

SIZES = [1e6 * 4**k for k in range(8)]
SMALL = 24  # tables of the suite; `bench/laws_coverage.py` draws 300


def decay(sd=0.003, seed=0, copies=3):
    rng = np.random.default_rng(seed)
    x = np.repeat(SIZES, copies)
    return {"params": x, "loss": (1.7 + 60 * x**-0.25) * np.exp(sd * rng.standard_normal(x.size))}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.law.name)
def test_derivatives_are_those_of_central_differences(case):
    judged_by_differences(case)


@pytest.mark.parametrize(
    ("case", "grouped"), [(c, i % 2 == 1) for i, c in enumerate(CASES)], ids=[c.law.name for c in CASES]
)
def test_intervals_contain_the_truth_at_the_stated_rate(case, grouped):
    """Every other law with grouped noise. A coverage of 92 % leaves fewer hits in one of 10,000 suites a coefficient."""
    low, _ = bounds(SMALL)
    for name, count in hits(case.quick(60), range(SMALL), grouped=grouped).items():
        assert count >= low, f"{name}: {count} of {SMALL}"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.law.name)
def test_noiseless_tables_give_back_their_coefficients(case):
    fit = case.exact().fit(0, grouped=False)
    for name, value in case.truth.items():
        assert fit.values[name] == pytest.approx(value, rel=1e-5), name


def test_too_narrow_intervals_would_be_noticed():
    """The bound of the suite is one that half the widths would fail."""
    case = BY_NAME["power"].quick(60)
    target, narrow = case.targets()["b"], 0
    for draw in range(SMALL):
        told = case.fit(draw, grouped=False).coefficients["b"]
        narrow += abs(target - told.value) < 0.25 * (told.value - told.low)
    assert narrow < bounds(SMALL)[0]


def test_groups_widen_what_their_rows_share():
    """Rows repeated 4 times are 4 times the rows, and no more is known."""
    rows = decay(copies=1)
    four = {name: np.repeat(v, 4) for name, v in rows.items()} | {"run": np.repeat(np.arange(8), 4)}
    widths = {}
    for groups in (None, "run"):
        told = Power().fit(four, x="params", y="loss", groups=groups).coefficients["b"]
        widths[groups] = told.high - told.low
    assert widths["run"] > 1.6 * widths[None]  # 2, and more for few groups, were the fit linear


def test_weights_are_numbers_of_rows():
    rows = decay(copies=1)
    weight = np.array([1, 2, 1, 3, 1, 1, 2, 1])
    repeated = {name: np.repeat(v, weight) for name, v in rows.items()}
    one = Power().fit({**rows, "w": weight}, x="params", y="loss", weights="w")
    other = Power().fit(repeated, x="params", y="loss")
    assert one.objective == pytest.approx(other.objective, rel=1e-9)
    assert one.values["b"] == pytest.approx(other.values["b"], rel=1e-6)


def test_a_censored_row_contradicts_only_from_below():
    """A run that diverged at 4 says nothing where the law is above 4, and pulls the law up where it is below."""
    rows = decay(copies=2)
    plain = PowerFloor(draws=50).fit(rows, x="params", y="loss")
    largest = plain.predict(SIZES[-1]).value
    for bound, moved in ((0.9 * largest, False), (1.02 * largest, True)):
        more = {"params": np.append(rows["params"], [SIZES[-1]] * 3), "loss": np.append(rows["loss"], [bound] * 3)}
        more["diverged"] = np.append(np.zeros(16), np.ones(3))
        fit = PowerFloor(draws=50).fit(more, x="params", y="loss", censored="diverged")
        change = fit.predict(SIZES[-1]).value - largest
        assert change > 1e-3 if moved else abs(change) < 1e-6
        by_number = PowerFloor(draws=50).fit(more, x="params", y="loss", censored=[16, 17, 18])
        assert by_number.values == fit.values


def test_the_same_seed_gives_the_same_numbers():
    fits = [PowerFloor(draws=50).fit(decay(), x="params", y="loss", seed=s) for s in (3, 3, 4)]
    assert fits[0].coefficients == fits[1].coefficients != fits[2].coefficients


def test_backtest_hides_the_largest_runs():
    rows = decay()
    fit = PowerFloor(draws=50).fit(rows, x="params", y="loss")
    told = fit.backtest("largest")
    assert told is not None and len(told.points) == 3 and told.size == SIZES[-1] and told.hit
    rest = PowerFloor(draws=50).fit({n: v[:-3] for n, v in rows.items()}, x="params", y="loss")
    assert told.predicted.value == pytest.approx(rest.predict(SIZES[-1]).value, rel=1e-9)
    for hold_out, count in ((4, 4), (0.25, 6)):
        assert len(fit.backtest(hold_out).points) == count
    for wrong in ("smallest", 0, 24, 1.5, True):
        with pytest.raises(ValueError, match="hold_out"):
            fit.backtest(wrong)


def test_a_backtest_that_misses_is_said():
    rows = decay()
    rows["loss"][-3:] *= 1.2
    fit = PowerFloor(draws=50).fit(rows, x="params", y="loss")
    assert fit.verdict.status == "weak" and "hiding the largest run" in fit.verdict.reason


def test_extrapolation_is_judged():
    fit = PowerFloor(draws=50).fit(decay(), x="params", y="loss")
    top = SIZES[-1]
    assert fit.verdict.status == "ok"
    assert [fit.judge(top * k).status for k in (2, 50, 2000)] == ["ok", "weak", "refuse"]
    with pytest.raises(ValueError, match="2e.03 times beyond the data"):
        fit.predict(2000 * top)
    for wrong in (-1.0, 0.0, np.nan):
        with pytest.raises(ValueError, match="positive"):
            fit.predict(wrong)
    with pytest.raises(ValueError, match="expected values for"):
        fit.predict(size=3.0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: {"param": t["params"], "loss": t["loss"]}, "did you mean 'param'"),
        (lambda t: {**t, "loss": np.where(np.arange(24) == 5, -1.0, t["loss"])}, "'loss', got -1 .1 row: 5"),
        (lambda t: {**t, "params": np.where(np.arange(24) < 7, 0.0, t["params"])}, "7 rows: 0, 1, 2, 3, 4, ..."),
        (
            lambda t: {**t, "loss": np.where(np.arange(24) == 2, np.nan, t["loss"])},
            "1 row with missing or infinite ones: 2",
        ),
        (lambda t: {**t, "loss": list(t["loss"][:-1]) + [np.inf]}, "drop=True"),
        (lambda t: {**t, "loss": t["loss"][:-1]}, "equal length"),
    ],
)
def test_bad_columns_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        Power().fit(change(decay()), x="params", y="loss")


def test_rows_are_dropped_on_request_and_counted():
    rows = decay()
    rows["loss"][[3, 9]] = np.nan, np.inf
    fit = Power().fit(rows, x="params", y="loss", drop=True)
    assert len(fit.rows) == 22 and fit.warnings == ("2 rows with missing or infinite numbers left out: 3, 9",)
    assert fit.residuals.shape == (22,)


def test_duplicates_and_units_are_warned_of():
    n, d = np.repeat([1e8, 1e9, 1e10], 3), np.tile([2.0, 20.0, 200.0], 3)
    rows = {"params": n, "billions": d, "loss": 1.8 + 480 / n**0.35 + 1 / d**0.37}
    rows = {name: np.append(v, v[0]) for name, v in rows.items()}
    fit = Chinchilla(draws=20).fit(rows, x={"N": "params", "D": "billions"}, y="loss")
    assert any("1 row repeated exactly: 9" in w for w in fit.warnings)
    assert any("'params' is typically 5e+07 times 'billions'" in w for w in fit.warnings)


def test_what_cannot_be_fitted_is_refused_with_the_reason():
    rows = decay()
    cases = [
        ({"params": np.full(24, 1e6), "loss": rows["loss"]}, "one distinct 'params'"),
        ({name: v[:2] for name, v in rows.items()}, "2 rows for 2 coefficients"),
    ]
    for table, reason in cases:
        fit = Power().fit(table, x="params", y="loss")
        assert fit.verdict.status == "refuse" and reason in fit.verdict.reason
        assert not fit.coefficients and fit.backtest() is None and not fit.selection() and not fit.influence()
        assert fit.judge(1e7) == fit.verdict
        with pytest.raises(ValueError, match="no prediction of the law 'power'"):
            fit.predict(1e7)


def test_a_coefficient_at_its_bound_is_said():
    x = np.repeat(SIZES, 2)
    fit = PowerFloor(draws=20).fit({"x": x, "y": 60 * x**-0.25 - 0.05}, x="x", y="y")  # bends down: no floor above 0
    assert "E at the bound" in fit.verdict.reason and fit.values["E"] == 0
    assert fit.identifiability().at_bound == ("E",)


def test_few_decades_are_weak():
    x = np.linspace(1, 2, 20)
    fit = Power(draws=20).fit({"x": x, "y": 3 * x**-0.3}, x="x", y="y")
    assert fit.verdict.status == "weak" and "spans 0.3 decades" in fit.verdict.reason


def test_two_kinds_of_rows_in_one_table_are_said():
    """A robust fit follows two thirds of the rows and would call itself good."""
    rows = decay()
    rows["loss"][::3] *= 0.8
    fit = PowerFloor(draws=20).fit(rows, x="params", y="loss")
    assert "33% of the rows lie more than 10 times the median residual away" in fit.verdict.reason
    assert PowerFloor(draws=20).fit(decay(), x="params", y="loss").verdict.status == "ok"


def test_rows_without_noise_determine_every_coefficient():
    """Draws that differ by rounding alone are not confounded."""
    x = np.geomspace(1, 1e4, 5)
    fit = PowerFloor().fit({"x": x, "y": 2 + 3 * x**-0.3}, x="x", y="y")
    assert fit.identifiability().pairs == ()


def test_a_known_coefficient_is_held():
    c = np.geomspace(1, 1000, 20)
    law = ComputeSigmoid(fixed={"R0": 0.1}, draws=20)
    fit = law.fit({"c": c, "r": 0.1 + 0.5 / (1 + (20 / c) ** 1.5)}, x="c", y="r")
    assert fit.coefficients["R0"].low == fit.coefficients["R0"].high == 0.1
    assert fit.values["A"] == pytest.approx(0.6, rel=1e-6)
    with pytest.raises(ValueError, match="expected to fix some of"):
        ComputeSigmoid(fixed={"R": 0.1}).fit({"c": c, "r": c}, x="c", y="r")


def test_columns_of_several_variables_are_asked_for_by_name():
    with pytest.raises(ValueError, match="give x={'N': ..., ...}"):
        Chinchilla().fit({}, x="params", y="loss")
    with pytest.raises(ValueError, match="expected columns for the variables"):
        Chinchilla().fit({}, x={"N": "params"}, y="loss")


def test_many_rows():
    rng = np.random.default_rng(0)
    x = 10 ** rng.uniform(4, 9, 100_000)
    rows = {"x": x, "y": 5 * x**-0.1 * np.exp(0.01 * rng.standard_normal(x.size))}
    fit = Power().fit(rows, x="x", y="y")
    told = fit.coefficients["b"]
    assert fit.verdict.status == "ok"
    # the spread of a slope of least absolute deviations: sd sqrt(pi / 2) / (sd of log x sqrt(R))
    sd = 0.01 * np.sqrt(np.pi / 2) / (np.std(np.log(x)) * np.sqrt(x.size))
    assert (told.high - told.low) / (2 * 1.96) == pytest.approx(sd, rel=0.2)
    assert abs(told.value + 0.1) < 4 * sd


def methods(scale, seed):
    """Two methods: the first is better below where 3 x^-0.2 = scale x^-0.1."""
    rng = np.random.default_rng(seed)
    x = np.repeat(np.geomspace(1e3, 1e6, 7), 3)
    noise = np.exp(0.005 * rng.standard_normal((2, x.size)))
    laws = scale * x**-0.1 * noise[0], 3 * x**-0.2 * noise[1]
    return [Power(draws=100).fit({"c": x, "y": y}, x="c", y="y", seed=i) for i, y in enumerate(laws)]


def test_methods_cross_where_their_laws_do():
    """Of 6 intervals of 95 % three or fewer hold the truth in one case of 400."""
    truth, covered = 3e4, 0
    for seed in range(6):
        found = crossover(*methods(3 * truth**-0.1, seed))
        assert found.at is not None and found.better_below == 0 and found.share == 1
        covered += truth in found.at
    assert covered > 3


def test_no_crossover_is_said():
    found = crossover(*methods(3 * 1e9**-0.1, 0))
    assert (
        found.at is None and found.verdict.reason == "no crossover within 10x of the data" and found.better_below == 0
    )
    near = crossover(*methods(3 * (9.7e6) ** -0.1, 1))
    assert 0 < near.share < 1
    assert near.verdict.status == "weak" or "draws" in near.verdict.reason
    with pytest.raises(ValueError, match="one variable"):
        case = BY_NAME["chinchilla"].quick(20)
        crossover(case.fit(0, grouped=False), case.fit(0, grouped=False))
