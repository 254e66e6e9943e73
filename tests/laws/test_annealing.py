"""The annealing law: two published curves, nine real schedules, and what it must refuse to say."""

import numpy as np
import pytest

from tests.laws.schedule_runs import TRAIN, real_curves, schedule_of, short_runs, synthetic, taken
from towtank.estimate import Interval
from towtank.laws.annealing import AnnealingLaw, annealing_areas
from towtank.laws.curve_data import read_curves
from towtank.laws.curve_groups import split
from towtank.laws.schedules import Schedule, constant, cosine, hold, piece, wsd

# Tissue, Wang and Wang 2024: loss at step 1000, 2000, ..., 20000 of two runs (peak 2e-4, 500 steps of warm-up)
COSINE = (
    3.6696, 3.3254, 3.1908, 3.1159, 3.0605, 3.0204, 2.9881, 2.9612, 2.9395, 2.9196,
    2.9030, 2.8882, 2.8768, 2.8654, 2.8565, 2.8490, 2.8436, 2.8399, 2.8381, 2.8376,
)  # fmt: skip
FLAT = (
    3.6714, 3.3256, 3.1884, 3.1119, 3.0584, 3.0211, 2.9875, 2.9608, 2.9407, 2.9241,
    2.9054, 2.8942, 2.8808, 2.8703, 2.8622, 2.8531, 2.8448, 2.8384, 2.8327, 2.8294,
)  # fmt: skip
PEAK, STEPS = 2e-4, np.arange(1000, 20001, 1000)
FALL = hold(PEAK, 500).then(piece(PEAK, 0.0, 19500, shape="cosine")).rates
RUNS = {"cosine": Schedule(np.append(FALL, 0.0)), "flat": hold(PEAK, 20001)}
LOSSES = {"cosine": COSINE, "flat": FLAT}
ROWS = {n: [(int(s), float(RUNS[n].rates[s]), y) for s, y in zip(STEPS, LOSSES[n], strict=True)] for n in RUNS}
TRUE = {"L0": 2.6, "A": 0.4, "alpha": 0.5, "C": 0.2}


def fitted(names=("cosine", "flat"), **settings):
    law = AnnealingLaw(draws=60, warmup="peak", **settings)
    return law.fit_curves(taken(ROWS, names), schedules=taken(RUNS, names))


def areas(rates, momentum):
    """S1 and S2 step by step."""
    s1, s2, m, total, sums = [], [], 0.0, 0.0, 0.0
    for i, eta in enumerate(rates):
        m = momentum * m + (rates[i - 1] - eta if i else 0.0)
        total, sums = total + eta, sums + m
        s1.append(total)
        s2.append(sums)
    return np.array(s1), np.array(s2)


def said(c, name, momentum=0.999) -> tuple[float, float]:
    """R2 of the law on a curve, and its error at the end, from sums written out here."""
    s1, s2 = (v[STEPS] for v in areas(RUNS[name].rates, momentum))
    y = np.array(LOSSES[name])
    law = c["L0"] + c["A"] * s1 ** -c["alpha"] - c["C"] * s2
    return 1 - np.sum((law - y) ** 2) / np.sum((y - y.mean()) ** 2), law[-1] - y[-1]


def objective(c, names, momentum):
    residual = []
    for name in names:
        s1, s2 = (v[STEPS] for v in areas(RUNS[name].rates, momentum))
        law = c["L0"] + c["A"] * s1 ** -c["alpha"] - c["C"] * s2
        residual.append(np.abs(np.log(law / LOSSES[name])))
    r = np.concatenate(residual)
    return np.sum(np.where(r <= 1e-3, r**2 / 2, 1e-3 * (r - 5e-4)))


SHEET = [  # fitted on, momentum, coefficients, R2 and end error of the cosine, of the flat curve, as written
    (("cosine", "flat"), 0.999, (2.6278, 0.4297, 0.5498, 0.4108), (0.99965, -0.0014), (0.99962, -0.0012)),
    (("cosine",), 0.999, (2.6844, 0.3728, 0.6033, 0.4635), (0.99987, -0.0030), (0.99698, 0.0165)),
    (("cosine", "flat"), 0.9995, (2.6335, 0.4222, 0.5574, 0.2207), (0.99968, -0.0053), (0.99965, -0.0010)),
    (("cosine", "flat"), 0.99, (2.6207, 0.4387, 0.5412, 3.9157), (0.99946, 0.0022), (0.99951, -0.0016)),
]


@pytest.mark.parametrize(("names", "momentum", "sheet", "on_cosine", "on_flat"), SHEET)
def test_two_published_curves(names, momentum, sheet, on_cosine, on_flat):
    """The sheet's own search ended within 1e-9 of the least objective (its ftol): that moves coefficients by 2e-4."""
    fit = fitted(names, momentum=momentum)
    stated = dict(zip(("L0", "A", "alpha", "C"), sheet, strict=True))
    assert fit.objective == pytest.approx(objective(fit.values, names, momentum), rel=1e-12)
    assert fit.objective <= objective(stated, names, momentum) + 1e-15
    for name, value in stated.items():
        assert fit.values[name] == pytest.approx(value, abs=2.5e-4)
    for name, (r2, end) in (("cosine", on_cosine), ("flat", on_flat)):
        found = said(fit.values, name, momentum)
        assert found[0] == pytest.approx(r2, abs=1.1e-5) and found[1] == pytest.approx(end, abs=1.1e-4)


def test_a_flat_curve_alone_leaves_c_open():
    fit = fitted(("flat",))
    assert [fit.values[n] for n in ("L0", "A", "alpha")] == pytest.approx([2.6263, 0.4314, 0.5487], abs=1.5e-4)
    assert said(fit.values, "flat") == (pytest.approx(0.99960, abs=6e-6), pytest.approx(-0.0015, abs=6e-5))
    assert fit.coefficients["C"].low == 0 and fit.coefficients["C"].high == 1e9
    assert fit.verdict.status == "weak" and "C cannot be determined" in fit.verdict.reason
    # with C where it started, 1, the end of the cosine is missed as the sheet says; so the law must not speak of it
    assert said({**fit.values, "C": 1.0}, "cosine") == (pytest.approx(0.885, abs=6e-4), pytest.approx(-0.118, abs=6e-4))
    with pytest.raises(ValueError, match="in the fitted runs at most 0"):
        fit.predict_curve(STEPS, RUNS["cosine"])
    with pytest.raises(ValueError, match="do not determine"):
        fit.profile("C")


def test_c_over_one_minus_momentum_is_what_is_determined():
    pair = fitted().identifiability().pairs[0]
    assert (pair.first, pair.second, pair.combination) == ("C", "momentum", "C / (1 - momentum)")
    assert (round(pair.value.low), round(pair.value.value), round(pair.value.high)) == (392, 411, 441)


def test_areas_are_the_recursion():
    run = wsd(peak=1e-3, steps=400, decay=100, final=1e-4)
    for found, expected in zip(annealing_areas(run, 0.99), areas(run.rates, 0.99), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-18)


def test_warmup_is_left_out_of_the_second_area_and_may_count_as_the_peak_in_the_first():
    warm, flat = constant(peak=1.0, steps=50, warmup=10), constant(peak=1.0, steps=50)
    s1, s2 = annealing_areas(warm, 0.9)
    assert not s2.any() and s1[-1] == pytest.approx(50 - 4.5)
    np.testing.assert_array_equal(annealing_areas(warm, 0.9, warmup="peak")[0], annealing_areas(flat, 0.9)[0])


@pytest.mark.parametrize(
    ("size", "stated", "error"),
    [
        ("25M", (3.15829, 0.513580, 0.513376, 0.401908), 0.00141),
        ("100M", (2.78890, 0.592569, 0.454978, 0.481219), 0.00153),
    ],
)
def test_nine_real_schedules(size, stated, error):
    curves = real_curves(size)
    law, runs = AnnealingLaw(), {n: schedule_of(n) for n in curves}
    fit = law.fit_points(law.prepare(read_curves(taken(curves, TRAIN), schedules=taken(runs, TRAIN))), draw=False)
    assert list(fit.values.values()) == pytest.approx(stated, rel=2e-6)  # half a unit of the last of six digits
    off = []
    for name in set(curves) - set(TRAIN):
        steps, loss = np.array([r[0] for r in curves[name]]), np.array([r[2] for r in curves[name]])
        predicted = law.value(fit.values, law.features(runs[name], steps, np.nan))[0]
        off.append(np.mean(np.abs(predicted - loss) / loss))
    assert round(float(np.mean(off)), 5) == error


@pytest.fixture(scope="module")
def noisy():
    """Nine short curves with an offset from run to run of 1e-3."""
    runs = short_runs()
    law = AnnealingLaw(draws=100, momentum=0.995)
    rows = synthetic(law, TRUE, runs, np.random.default_rng(3), each=4e-4, offset=1e-3)
    return law.fit_curves(rows, schedules=runs), runs


def test_intervals_of_nine_curves(noisy):
    fit, runs = noisy
    assert fit.resampled == "curves" and fit.verdict.status == "ok"
    steps = np.array([500, 1500, 2999])
    law, run = (fit.predict_curve(steps, runs["wsd"], scatter=s) for s in (False, True))
    assert ((run.high - run.low) > (law.high - law.low)).all() and (law.low <= law.loss).all()
    assert run.final == run[2] and isinstance(run.final, Interval)


@pytest.mark.parametrize("noise", [{"each": 1e-3}, {"each": 4e-4, "offset": 1e-3}], ids=["rows", "curves"])
def test_intervals_hold_the_truth(noise):
    """A small part of `bench/laws_schedules.py`."""
    law, runs, hits = AnnealingLaw(draws=40, momentum=0.995), short_runs(), []
    new = wsd(peak=1e-3, steps=4000, decay=1000, warmup=100, final=1e-4)
    truth = law.value(TRUE, law.features(new, np.array([3999]), np.nan))[0][0]
    for seed in range(20):
        rows = synthetic(law, TRUE, runs, np.random.default_rng(seed), rows=12, **noise)
        fit = law.fit_points(
            law.prepare(read_curves(rows, schedules=runs)), start=law.inner(TRUE), judge=False, seed=seed
        )
        low, high = (float(v[0]) for v in fit.forecast([new], np.array([3999]), np.nan, False)[1:])
        hits.append([low <= truth <= high, *(v in fit.coefficients[n] for n, v in TRUE.items())])
    # of 20 at 95 %: fewer than 15 has probability 3e-4 for each of the 5 numbers
    assert (np.sum(hits, axis=0) >= 15).all()


def test_few_curves_say_what_their_intervals_know():
    runs = short_runs(3)
    law = AnnealingLaw(draws=30, momentum=0.995)
    fit = law.fit_curves(synthetic(law, TRUE, runs, np.random.default_rng(1), each=1e-3), schedules=runs)
    assert fit.resampled == "blocks within curves" and "not from run to run" in fit.verdict.reason


def test_ranks_what_differs_and_not_what_does_not(noisy):
    fit, runs = noisy
    clear = fit.compare(runs["wsd"], runs["constant"])
    assert clear.better == "first" and clear.difference.high < 0 and str(clear).startswith("the first ends lower")
    back = fit.compare(runs["constant"], runs["wsd"])
    assert back.better == "second" and back.difference.value == pytest.approx(-clear.difference.value)
    almost = wsd(peak=1e-3, steps=3000, decay=610, warmup=100, final=1e-4)
    same = fit.compare(runs["wsd"], almost)
    assert same.better is None and 0 in same.difference and str(same).startswith("cannot rank these: difference")
    itself = fit.compare(runs["wsd"], runs["wsd"])
    assert itself.difference == Interval(0.0, 0.0, 0.0) and itself.better is None


def test_schedules_of_one_family_cannot_be_ranked_on_real_curves():
    curves = real_curves("25M")
    runs = {n: schedule_of(n) for n in curves}
    fit = AnnealingLaw(draws=60).fit_curves(curves, schedules=runs)
    close = fit.compare(runs["wsd_20000_24000"], runs["wsdld_20000_24000"])
    assert close.better is None  # measured: 3.2766 and 3.2776
    assert fit.compare(runs["cosine_24000"], runs["constant_24000"]).better == "first"  # measured: 3.3044 and 3.3473


@pytest.mark.parametrize(
    ("run", "status", "reason"),
    [
        (wsd(peak=1e-3, steps=3000, decay=600, warmup=100, final=1e-4).then(Schedule(np.array([1e-4, *[0.0] * 200]))),
         "refuse", "200 steps in a row at rate zero"),
        (cosine(peak=2e-3, steps=3000, warmup=100, final=2e-4), "refuse", "peak rate 0.002 is above the fitted 0.001"),
        (hold(1e-3, 1500).then(hold(1e-7, 1500)), "refuse", "50% of its steps run below 1%"),
        (cosine(peak=1e-3, steps=3000, warmup=100), "weak", "its rate falls to"),
        (cosine(peak=4e-4, steps=3000, warmup=100, final=1e-4), "weak", "far below the fitted"),
        (constant(peak=1e-3, steps=60000, warmup=100), "weak", "times beyond the fitted"),
        (constant(peak=1e-3, steps=200000, warmup=100), "refuse", "times beyond the fitted"),
        (hold(1e-3, 1000).then(hold(5e-4, 1000), hold(9e-4, 1000)), "weak", "rises again"),
        (wsd(peak=1e-3, steps=5000, decay=1000, warmup=100, final=1e-4), "ok", ""),
    ],
)  # fmt: skip
def test_known_abuses_are_refused(noisy, run, status, reason):
    fit, runs = noisy
    verdict = fit.judge(run)
    assert verdict.status == status and reason in verdict.reason
    if status == "refuse":
        with pytest.raises(ValueError, match="no prediction of the law 'annealing'"):
            fit.predict_curve([10], run)
        ranked = fit.compare(run, runs["wsd"])
        assert ranked.better is None and str(ranked).startswith("cannot rank these")


def test_a_schedule_optimized_under_the_law_is_not_trusted(noisy):
    """Coordinate descent on ten rates of a run, with every rate up to the peak allowed, ends at an idle stretch."""
    fit, _ = noisy
    law, rates = fit.form, np.full(10, 1e-3)

    def final(values):
        s1, s2 = annealing_areas(Schedule(np.repeat(values, 300)), law.momentum)
        c = fit.values
        return c["L0"] + c["A"] * s1[-1] ** -c["alpha"] - c["C"] * s2[-1]

    for _ in range(3):
        for i in range(10):
            tried = [np.where(np.arange(10) == i, r, rates) for r in np.linspace(0, 1e-3, 11)]
            rates = min((v for v in tried if v.any()), key=final)
    assert final(rates) < final(np.full(10, 1e-3))
    assert fit.judge(Schedule(np.repeat(rates, 300))).status == "refuse"


def test_backtest_influence_and_profile(noisy):
    fit, runs = noisy
    test = fit.backtest()
    assert test.curve == "long constant" and test.hit and test.error < 5e-3 and test.measured in test.predicted
    assert fit.backtest("cosine").curve == "cosine"
    moved = fit.influence()
    assert len(moved) == 9 and moved[0].factor == max(m.factor for m in moved)
    rest = fit.form.fit_points(fit.form.without(fit.points, list(runs).index(moved[0].curve)), draw=False)
    assert rest.values == pytest.approx(moved[0].coefficients, rel=1e-5)
    curve = fit.profile("alpha")
    assert curve.objective.min() == pytest.approx(fit.objective, rel=1e-9)
    assert curve.interval.low < fit.values["alpha"] < curve.interval.high
    wide = fit.coefficients["alpha"]
    assert 0.5 < (curve.interval.high - curve.interval.low) / (wide.high - wide.low) < 2
    with pytest.raises(ValueError, match="did you mean 'alpha'"):
        fit.profile("alhpa")
    with pytest.raises(ValueError, match="expected 'largest' or one of"):
        fit.backtest("none")


def test_model_sizes():
    law = AnnealingLaw(by_size=True, momentum=0.995, draws=20)
    true = {**TRUE, "L0": 1.6, "B": 40.0, "beta": 0.25}
    runs = {f"{kind} {i}": run for i in range(3) for kind, run in short_runs(3).items()}
    sizes = {name: 1e7 * 4 ** int(name[-1]) for name in runs}
    fit = law.fit_curves(synthetic(law, true, runs, sizes=sizes), schedules=runs, sizes=sizes)
    assert fit.values == pytest.approx(true, rel=1e-4)
    expected = law.value(true, law.features(runs["wsd 0"], np.array([2999]), 3e8))[0][0]
    assert fit.predict_curve([2999], runs["wsd 0"], size=3e8).loss[0] == pytest.approx(expected, rel=1e-6)
    assert "size" in fit.judge(runs["wsd 0"], size=1e9).reason
    with pytest.raises(ValueError, match="expected the size of the model"):
        fit.predict_curve([2999], runs["wsd 0"])
    with pytest.raises(ValueError, match="give sizes="):
        law.fit_curves(synthetic(law, true, runs, sizes=sizes), schedules=runs)


def test_same_seed_same_numbers_and_a_table_is_the_same_fit():
    law, runs = AnnealingLaw(draws=10, momentum=0.995), short_runs(5)
    rows = synthetic(law, TRUE, runs, np.random.default_rng(0), each=1e-3)
    one, two = (law.fit_curves(rows, seed=4) for _ in range(2))
    assert one.coefficients == two.coefficients and "constant, cosine" in one.warnings[0]
    flat = [(name, *row) for name, values in rows.items() for row in values]
    columns = dict(zip(("curve", "step", "lr", "loss"), zip(*flat, strict=True), strict=True))
    assert law.fit(columns, seed=4).coefficients == one.coefficients
    with pytest.raises(ValueError, match="expected a column 'curve'"):
        law.fit({"curv": [1], "step": [1], "lr": [1], "loss": [1]})
    assert law.fit_curves({"a": rows["cosine"][:4]}).verdict.status == "refuse"


def test_corrected_errors_of_a_mean():
    """Of G means of groups, the corrected standard error is s / sqrt(G) and Student's t has G - 1 degrees of freedom."""
    rng = np.random.default_rng(0)
    y = rng.standard_normal(6).repeat(4)
    residual = y - y.mean()
    groups = split(-np.ones((24, 1)), residual, residual, np.arange(6).repeat(4))
    plain = np.sqrt(np.sum((residual.reshape(6, 4).sum(1) / 24) ** 2))
    student = 2.570581835636314  # 0.975 quantile, 5 degrees of freedom
    expected = student * y[::4].std(ddof=1) / np.sqrt(6) / (plain * 1.959963984540054)
    assert groups.factor(np.ones((1, 1)), 0.95)[0] == pytest.approx(expected, rel=1e-9)
