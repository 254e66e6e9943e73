"""Laws of size: published tables, generated coefficients, extrapolation, backtests, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.laws.sweeps import MUP_66, columns, parabola, skewed, three_point
from towtank.estimate import Verdict
from towtank.laws import LearningRateLaw, LossLaw, Measured, PowerLaw, fit_points


def table(slope, *, widths=(32, 64, 128), sd=0.01, extra=2, draw=0, curve=parabola):
    """Runs whose optimum moves by `slope` octaves per doubling and whose best loss falls as width^-0.05."""
    rng = np.random.default_rng(draw)
    rows = {"width": [], "lr": [], "loss": [], "seed": []}
    for width in widths:
        lr, loss, seed = columns(curve, -5.6 + slope * np.log2(width / 32), extra=extra, sd=sd, rng=rng)
        rows["width"] += [width] * len(lr)
        rows["lr"] += lr
        rows["loss"] += [y - 2.5 + 2.5 * (width / 32) ** -0.05 for y in loss]
        rows["seed"] += seed
    return rows


def points(values, sd=0.05, draw=0):
    """Points with Gaussian noise on log2, `sd` octaves."""
    rng = np.random.default_rng(draw)
    found = []
    for size, value in values.items():
        centre = np.log2(value) + rng.normal(0, sd)
        found.append(Measured(size=size, value=2.0**centre, log2_draws=centre + rng.normal(0, sd, 2000)))
    return found


def test_transfer_fails_in_the_table_of_mup_66():
    """The best rate falls from width to width although the parametrization should hold it; three-point parabolas say so."""
    rows = [(w, 2.0**k, y) for w, losses in MUP_66.items() for k, y in losses.items()]
    columns_ = dict(zip(("width", "lr", "loss"), zip(*rows, strict=True), strict=True))
    fit = LearningRateLaw().fit(columns_, x="width", y="loss")
    minima = []
    for losses in MUP_66.values():
        best = min((k for k in losses if losses[k] is not None), key=lambda k: losses[k])
        minima.append(best + three_point(losses[best - 1], losses[best], losses[best + 1]))
    slope = np.polyfit(np.log2(list(MUP_66)), minima, 1)[0]
    assert minima[0] - minima[-1] > 1.5
    assert fit.coefficients["slope"].value == pytest.approx(slope, abs=0.15)
    assert 0 not in fit.coefficients["slope"]
    assert fit.verdict.status == "weak"  # one seed


@settings(max_examples=6, deadline=None)
@given(slope=st.floats(-1.2, 0.3), draw=st.integers(0, 1000))
def test_generated_slope_and_prediction_are_recovered(slope, draw):
    fit = LearningRateLaw().fit(table(slope, draw=draw, sd=0.003), x="width", y="loss")
    assert fit.coefficients["slope"].value == pytest.approx(slope, abs=0.08)
    assert np.log2(fit.predict(256).value) == pytest.approx(-5.6 + 3 * slope, abs=0.15)


@pytest.mark.parametrize("curve", [parabola, skewed])
def test_slope_and_prediction_intervals_contain_the_truth(curve):
    """16 draws from runs to law: if 95 % are covered, fewer than 13 is one case in 140."""
    slopes = predictions = 0
    for draw in range(16):
        fit = LearningRateLaw().fit(table(-0.9, draw=draw, curve=curve, extra=0), x="width", y="loss")
        slopes += -0.9 in fit.coefficients["slope"]
        predictions += 2 ** (-5.6 - 2.7) in fit.predict(256)
        assert 0 not in fit.coefficients["slope"]
    assert slopes >= 13 and predictions >= 13


@pytest.mark.parametrize(("sizes", "scatter"), [(3, 0.0), (3, 0.1), (5, 0.0), (5, 0.1)])
def test_line_intervals_contain_the_truth(sizes, scatter):
    """Points of known noise 0.1 octave, and with as much again that nobody stated."""
    hits = np.zeros(2)
    for draw in range(100):
        rng = np.random.default_rng([1, draw])
        truth = {32 * 2**k: 2 ** (-1 - 0.9 * (5 + k)) for k in range(sizes)}
        moved = {s: v * 2 ** rng.normal(0, scatter) for s, v in truth.items()}
        fit = fit_points(points(moved, 0.1, draw), law="x")
        next_point = 2 ** (-1 - 0.9 * (5 + sizes) + rng.normal(0, scatter))
        hits += (-0.9 in fit.coefficients["slope"], next_point in fit.predict(32 * 2**sizes))
    assert (hits >= 85).all()  # 95 expected; 85 is more than four standard errors below


def test_line_is_least_squares():
    """Equal noise: the dense weighted fit is the ordinary one."""
    exact = {s: 0.3 * s**-0.8 * (1.1 if s == 64 else 1) for s in (16, 32, 64, 128)}
    fit = fit_points(points(exact, 1e-6), law="x")
    slope, intercept = np.polyfit(np.log2(list(exact)), np.log2(list(exact.values())), 1)
    assert fit.coefficients["slope"].value == pytest.approx(slope, abs=1e-4)
    assert fit.coefficients["intercept"].value == pytest.approx(intercept, abs=1e-3)
    assert sum(fit.residuals) == pytest.approx(0, abs=1e-9)


def test_scatter_beyond_the_noise_widens_the_interval_and_is_said():
    truth = {s: 1.0 / s for s in (16, 32, 64, 128, 256)}
    calm = fit_points(points(truth, 0.02), law="x")
    ragged = {s: v * 2 ** (0.3 * (-1) ** i) for i, (s, v) in enumerate(truth.items())}
    wild = fit_points(points(ragged, 0.02), law="x")
    width = [f.coefficients["slope"].high - f.coefficients["slope"].low for f in (calm, wild)]
    assert width[1] > 4 * width[0]
    assert calm.verdict.status == "ok" and "scatter" in wild.verdict.reason


@pytest.mark.parametrize(
    ("logits", "line", "quadratic", "outcome"),
    [([10.6, 21.6, 70.6], 168, 370, 299), ([7.4, 13.4, 22.7], 40, 36, None)],
)
def test_attention_logits_of_three_widths_predict_the_fourth(logits, line, quadratic, outcome):
    """Learning rates 2^-7 and 2^-8: line and quadratic by dense least squares, both inside, and the run made afterwards."""
    x, y = np.log2([32, 64, 128]), np.log2(logits)
    dense = [float(2 ** np.polyval(np.polyfit(x, y, d), 8)) for d in (1, 2)]
    assert dense == pytest.approx([line, quadratic], rel=0.02)
    law = PowerLaw(name="attention logit", degrees=(1, 2))
    fit = law.fit({"width": [32, 64, 128], "logit": logits}, x="width", y="logit")
    predicted = fit.predict(256)
    assert predicted.value == pytest.approx(np.sqrt(dense[0] * dense[1]), rel=1e-6)
    assert dense[0] in predicted and dense[1] in predicted
    assert outcome is None or outcome in predicted
    assert fit.verdict.status == "weak" and "no check" in fit.verdict.reason


def test_the_size_where_a_law_reaches_a_threshold():
    fit = fit_points(points({s: 0.5 * s**1.5 for s in (32, 64, 128, 256)}, 1e-3), law="logit")
    at = fit.crossing(1e4)
    assert at.value == pytest.approx((1e4 / 0.5) ** (1 / 1.5), rel=0.06)
    assert fit.crossing(1e12) is None


def test_backtest_hides_the_largest_size():
    values = {32: 1.0, 64: 0.5, 128: 0.25, 256: 0.5}  # the last turns up again
    fit = fit_points(points(values, 0.01), law="x")
    test = fit.backtest(hold_out="largest")
    rest = fit_points(points(values, 0.01)[:3], law="x").predict(256)
    assert test.size == 256 and not test.hit
    assert test.factor == pytest.approx(4, rel=0.1)
    assert test.predicted.value == pytest.approx(rest.value, rel=1e-9)
    assert fit.verdict.status == "weak" and "missed" in fit.verdict.reason
    with pytest.raises(ValueError, match="hold_out"):
        fit.backtest(hold_out="smallest")


def test_extrapolation_is_judged():
    fit = fit_points(points({s: 1.0 / s for s in (32, 64, 128, 256)}, 0.01), law="learning rate")
    assert fit.judge(512).status == "ok"
    assert fit.judge(2048).status == "weak"
    assert fit.judge(8192).status == "refuse"
    with pytest.raises(ValueError, match="32 times beyond the fitted sizes"):
        fit.predict(8192)
    with pytest.raises(ValueError, match="positive size"):
        fit.predict(0)
    assert [s for s, _ in fit.predict_many([64, 8192])] == [64]


def test_two_sizes_are_weak_one_is_refused():
    two = fit_points(points({32: 1.0, 64: 0.5}), law="x")
    assert two.verdict.status == "weak" and "2 sizes" in two.verdict.reason and two.backtest() is None
    one = fit_points(points({32: 1.0}), law="x")
    assert one.verdict.status == "refuse" and one.coefficients == {} and one.backtest() is None
    assert fit_points([], law="x").backtest() is None
    with pytest.raises(ValueError, match="1 usable size"):
        one.predict(64)
    bare = fit_points([Measured(size=32, value=1.0), Measured(size=64, value=0.5)], law="x")
    assert bare.verdict.status == "refuse" and "noise" in bare.verdict.reason
    three = fit_points([Measured(size=s, value=1.0 / s) for s in (32, 64, 128)], law="x")
    assert three.verdict.status == "ok" and three.backtest() is None  # two bare points predict nothing


def test_refused_sizes_are_left_out_and_named():
    bad = Measured(size=256, value=np.nan, verdict=Verdict("refuse", "not bracketed"))
    fit = fit_points([*points({32: 1.0, 64: 0.5, 128: 0.25}), bad], law="x")
    assert len(fit.used) == 3 and fit.verdict.status == "weak" and "256: not bracketed" in fit.verdict.reason


def test_best_loss_law_predicts_the_next_width():
    fit = LossLaw().fit(table(-0.9, sd=0.003), x="width", y="loss")
    assert 2.5 * 8**-0.05 in fit.predict(256)
    assert fit.coefficients["slope"].value == pytest.approx(-0.05, abs=0.02)
    assert set(fit.coefficients) == {"slope", "intercept", "curvature"}


def test_order_of_rows_changes_nothing():
    rows = table(-0.9)
    order = np.random.default_rng(0).permutation(len(rows["lr"]))
    mixed = {name: [values[i] for i in order] for name, values in rows.items()}
    fits = [LearningRateLaw().fit(t, x="width", y="loss") for t in (rows, mixed)]
    assert fits[0].coefficients == fits[1].coefficients and fits[0].verdict == fits[1].verdict


def test_diverged_runs_are_censored():
    law, sizes = PowerLaw(), [32, 32, 64, 64, 128, 128]
    one = law.fit({"n": sizes, "y": [1, 1.1, 2, 2.1, 4, None]}, x="n", y="y")
    assert one.verdict.status == "weak" and "1 of 2 runs diverged" in one.verdict.reason
    both = law.fit({"n": sizes, "y": [1, 1.1, 2, 2.1, None, None]}, x="n", y="y")
    assert [p.size for p in both.used] == [32, 64] and "all 2 runs diverged" in both.verdict.reason


def test_weights_count_rows():
    sizes, y = [32, 32, 64, 64, 128, 128], [1.0, 2.0, 2.0, 4.0, 4.0, 8.0]
    weighted = PowerLaw().fit({"n": sizes, "y": y, "w": [3, 1] * 3}, x="n", y="y", weights="w")
    assert weighted.predict(64).value == pytest.approx(2 * 2**0.25, rel=1e-6)


def test_a_missing_column_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'width'"):
        PowerLaw().fit({"width": [1, 2], "y": [1, 2]}, x="widht", y="y")
    with pytest.raises(ValueError, match="expected positive numbers in 'width', got -1.0 in row 1"):
        PowerLaw().fit({"width": [1, -1], "y": [1, 2]}, x="width", y="y")
