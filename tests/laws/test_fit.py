"""Every fitted law can be asked the same."""

import numpy as np
import pytest

from tests.laws.schedule_runs import short_runs, synthetic
from towtank.estimate import Interval, Verdict
from towtank.laws import AnnealingLaw, Fit, Power, PowerLaw, SizeFit, SweepLaw
from towtank.laws.product import HorizonLaw

RATES = [2.0**k for k in range(-12, -5)]
SWEEPS = [(d, lr) for d in (1e9, 4e9, 16e9, 64e9) for lr in RATES]
TRUE = {"L0": 2.6, "A": 0.4, "alpha": 0.5, "C": 0.6}


def of_size():
    x = [32, 64, 128, 256, 512]
    y = [3 / w * (1 + 0.02 * (-1) ** i) for i, w in enumerate(x)]
    return PowerLaw().fit({"w": x, "y": y}, x="w", y="y"), 700


def of_formula():
    x = np.geomspace(1, 1000, 12)
    noise = 0.01 * np.random.default_rng(0).standard_normal(12)
    return Power(draws=40).fit({"x": x, "y": 3 * x**-0.2 * np.exp(noise)}, x="x", y="y"), 2000


def of_sweeps():
    law = SweepLaw(tuned=("lr",), sizes=("D",), form=HorizonLaw())
    noise = 1e-3 * np.random.default_rng(0).standard_normal(len(SWEEPS))
    loss = [3 * np.exp(0.01 * np.log(lr * (d / 1e9) ** 0.25 / 0.007) ** 2 + e) for (d, lr), e in zip(SWEEPS, noise)]
    table = {"D": [d for d, _ in SWEEPS], "lr": [lr for _, lr in SWEEPS], "loss": loss}
    return law.fit(table, x={"D": "D", "lr": "lr"}, y="loss"), 1e11


def of_curves():
    law, runs = AnnealingLaw(draws=40), short_runs()
    rows = synthetic(law, TRUE, runs, np.random.default_rng(0), rows=20, each=1e-3, offset=0.0)
    return law.fit_curves(rows, schedules=runs), next(iter(runs.values()))


@pytest.mark.parametrize("fitted", [of_size, of_formula, of_sweeps, of_curves])
def test_every_fit_answers_the_same_questions(fitted):
    fit, point = fitted()
    assert isinstance(fit, Fit) and fit.law and 0 < fit.level < 1
    assert fit.coefficients and all(isinstance(v, Interval) for v in fit.coefficients.values())
    assert len(fit.residuals) > 3 and isinstance(fit.warnings, tuple)
    assert isinstance(fit.verdict, Verdict) and isinstance(fit.judge(point), Verdict)
    assert isinstance(fit.predict(point), Interval)
    told = fit.backtest("largest")
    assert told is None or isinstance(told.predicted, Interval) and told.hit in (True, False)
    assert isinstance(fit.identifiability().pairs, tuple)
    assert len(fit.influence()) > 0


def test_a_line_far_from_size_1_does_not_tell_its_ends_apart():
    """Intercept at size 1 and slope: correlation -mean(x) / rms(x) of a line with equal noise."""
    fit: SizeFit = of_size()[0]
    (pair,) = fit.identifiability().pairs
    x = np.arange(5.0, 10.0)
    assert pair.correlation == pytest.approx(-x.mean() / np.sqrt(np.mean(x**2)), abs=0.02)
    assert pair.combination.startswith("intercept + ")


def test_the_size_that_moves_a_line_most_is_named():
    """Refitted by numpy without each size."""
    x, y = np.arange(5.0, 10.0), -np.arange(5.0)
    y[4] += 1.0
    fit = PowerLaw().fit({"w": 2**x, "y": 2**y}, x="w", y="y")
    keep = ~np.eye(5, dtype=bool)
    slopes = [np.polyfit(x[k], y[k], 1)[0] for k in keep]
    moved = fit.influence()["slope"]
    assert moved.rows == (4,) == (int(np.argmax(np.abs(slopes - np.polyfit(x, y, 1)[0]))),)
    assert moved.coefficients["slope"] == pytest.approx(slopes[4], abs=1e-9)


def test_several_sizes_are_hidden_on_request():
    fit = of_size()[0]
    for hold_out, sizes in ((2, [512.0, 256.0]), (0.3, [512.0, 256.0])):
        assert [p.x["size"] for p in fit.backtest(hold_out).points] == sizes
    assert fit.backtest(4) is None
    with pytest.raises(ValueError, match="hold_out = 5: expected 1 to 4 sizes"):
        fit.backtest(5)
