"""Names of planted behaviors, their slopes and crossings, and what noise and short series may not be called."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import t

from towtank.signals.trend import early_peak, sharpness_trend, slope_of

S = np.arange(1.0, 401.0, 10.0)  # 40 readings
LR = 0.02  # limit 100
NOISE = 0.01


def noisy(y: NDArray, seed: int = 0, scale: float = NOISE) -> NDArray:
    return y * (1 + scale * np.random.default_rng(seed).standard_normal(y.shape))


RISE = 20 + 0.15 * S
PLANTED = {
    "progressive sharpening": RISE,
    "edge of stability": np.minimum(20 + 0.5 * S, 103 + 4 * np.sin(S)),
    "self-stabilization": np.where(S < 150, 40 + 0.6 * S, np.maximum(130 - 0.35 * (S - 150), 60)),
    "catapult": 40 + 110 * np.exp(-S / 40),
    "flattening": 80 * np.exp(-S / 300),
    "unstable": 150 + 0.1 * S,
    "stable": np.full_like(S, 50.0),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_behavior_is_named_in_every_draw_of_the_noise(kind: str) -> None:
    for seed in range(20):
        assert sharpness_trend(S, noisy(PLANTED[kind], seed), lr=LR).kind == kind


def test_the_limit_is_that_of_each_reading() -> None:
    """The same sharpness is far from its limit, at it, and beyond it, by learning rate and factor."""
    flat = noisy(np.full_like(S, 50.0))
    kinds = [
        sharpness_trend(S, flat, lr=lr, factor=c).kind for lr, c in ((0.01, 2.0), (0.04, 2.0), (0.76, 38.0), (0.1, 2.0))
    ]
    assert kinds == ["stable", "edge of stability", "edge of stability", "unstable"]
    warmup = np.minimum(S / 100, 1.0) * 0.02
    found = sharpness_trend(S, np.full_like(S, 70.0), lr=warmup)
    assert found.kind == "stable" and found.peak == pytest.approx(0.7) and found.ratio == pytest.approx(0.7)


def test_the_slope_is_that_of_least_squares_with_its_interval() -> None:
    """Against numpy, where the residuals are not positively correlated."""
    x = np.arange(12.0)
    y = 3 * x + np.resize([1.0, -1.0], 12)
    (slope, _), covariance = np.polyfit(x, y, 1, cov=True)
    found, error = slope_of(x, y), float(covariance[0, 0]) ** 0.5
    half = t.ppf(0.975, 10) * error
    assert [found.low, found.value, found.high] == pytest.approx([slope - half, slope, slope + half])


def test_slope_intervals_cover_under_white_and_correlated_noise() -> None:
    """95 % nominal; 400 draws have a standard error of 1.1 %. Correlation 0.6 is allowed for: no less than 85 %."""
    rng = np.random.default_rng(0)
    for rho, least in ((0.0, 0.95 - 4 * 0.011), (0.6, 0.85)):
        hits = 0
        for _ in range(400):
            e = rng.standard_normal(40)
            for i in range(1, 40):
                e[i] += rho * e[i - 1]
            hits += 2.0 in slope_of(S, 2 * S + e)
        assert hits / 400 >= least


def test_the_crossing_is_forecast() -> None:
    """20 + 0.15 s reaches 100 at step 533; two forms of growth are open, so that the interval is wide."""
    hits = 0
    for seed in range(20):
        found = sharpness_trend(S, noisy(RISE, seed), lr=LR).crossing
        assert found is not None and found.low >= S[-1] and 0.8 * 533 < found.value < 1.2 * 533
        hits += 533.3 in found
    assert hits >= 16  # 19 expected of 20 at 95 %; 16 has a chance of 2 % to be missed by luck
    assert sharpness_trend(S, np.full_like(S, 50.0), lr=LR).crossing is None
    assert sharpness_trend(S, 20 + 0.002 * S, lr=LR).crossing is None  # 40,000 steps ahead of 400


def test_noise_is_not_called_a_trend() -> None:
    """Pure noise of 20 % may not be called sharpening or flattening more often than the 2.5 % of each side, doubled."""
    kinds = [sharpness_trend(S, noisy(np.full_like(S, 40.0), seed, 0.2), lr=LR).kind for seed in range(200)]
    wrong = sum(k in ("progressive sharpening", "flattening") for k in kinds)
    assert wrong <= 200 * 0.05 + 4 * (200 * 0.05 * 0.95) ** 0.5
    assert kinds.count("cannot tell") > 100


@pytest.mark.parametrize(
    ("lr", "steps", "kind"),
    [
        (0.25, 600, "stable"),
        (0.4, 300, "progressive sharpening"),
        (0.4, 1200, "edge of stability"),
        (0.35, 600, "edge of stability"),
    ],
)
def test_real_gradient_descent(lr: float, steps: int, kind: str) -> None:
    """f = (x_1 x_2 x_3 x_4 - 1)^2 / 2, whose sharpness rises from 1.6 to 6.3, or to 2 / lr = 5 and 5.7 where that is less."""
    x, found = np.array([2.2, 1.1, 0.45, 0.35]), []
    gradient = lambda x: (x.prod() - 1) * x.prod() / x  # noqa: E731
    for step in range(1, steps):
        if step % 10 == 1:
            H = np.stack([(gradient(x + 1e-6 * e) - gradient(x - 1e-6 * e)) / 2e-6 for e in np.eye(4)])
            found.append((step, float(np.linalg.eigvalsh((H + H.T) / 2)[-1])))
        x = x - lr * gradient(x)
    s, y = np.array(found).T
    assert sharpness_trend(s, y, lr=lr).kind == kind


def test_bad_input() -> None:
    assert sharpness_trend([], [], lr=0.1).kind == "cannot tell"
    one = sharpness_trend([1.0], [3.0], lr=0.1)
    assert one.kind == "cannot tell" and one.ratio == pytest.approx(0.15) and "6 readings" in str(one)
    assert sharpness_trend(S, np.full_like(S, np.nan), lr=LR).kind == "cannot tell"
    holes = np.where(np.arange(40) % 5 == 0, np.nan, RISE)
    assert sharpness_trend(S, holes, lr=LR).kind == "progressive sharpening"
    with pytest.raises(ValueError, match="one value"):
        sharpness_trend(S, RISE[:-1], lr=LR)
    with pytest.raises(ValueError, match="positive learning"):
        sharpness_trend(S, RISE, lr=0.0)
    with pytest.raises(ValueError, match="ascend"):
        sharpness_trend(S[::-1], RISE, lr=LR)


BUMP = 1 + 9 * np.exp(-(((S - 100) / 40) ** 2))


@pytest.mark.parametrize(
    ("y", "kind"),
    [
        (BUMP, "early peak"),
        (BUMP[::-1], "late peak"),
        (np.exp(S / 150), "rising"),
        (np.exp(-S / 150), "none"),
        (np.full_like(S, 3.0), "none"),
    ],
)
def test_the_peak_of_a_fisher_trace(y: NDArray, kind: str) -> None:
    for seed in range(10):
        found = early_peak(S, noisy(y, seed, 0.05))
        assert found.kind == kind
        if kind == "early peak":
            assert abs(found.step - 101) <= 20 and 7 < found.rise < 12 and 7 < found.fall < 12 and found.share < 0.5


def test_a_single_outlier_is_no_peak_and_errors_are_heeded() -> None:
    spike = np.ones(40)
    spike[7] = 50.0
    assert early_peak(S, spike).kind == "none"
    low = 1 + 1.5 * (BUMP - 1) / 9
    assert early_peak(S, low).kind == "early peak"
    assert early_peak(S, low, 0.3 * low).kind == "none"


def test_bad_peaks() -> None:
    assert early_peak([], []).kind == "cannot tell"
    assert early_peak(S, np.full_like(S, np.nan)).kind == "cannot tell"
    with pytest.raises(ValueError, match="one value"):
        early_peak(S, S[:-1])
