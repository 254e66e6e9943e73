"""Synthetic sweeps with a known optimum, and published ones with a known answer."""

from __future__ import annotations

import numpy as np

# width -> (log2 of the first rate, losses at rates a factor 2 apart): two-layer byte-level GPT, standard
# parametrization, one seed, 200 steps.
SP_CURVES = {
    32: (-10, [2.973, 2.780, 2.664, 2.589, 2.601, 2.707, 2.890, 2.970]),
    64: (-10, [2.724, 2.607, 2.560, 2.564, 2.635, 2.696, 2.797, 2.879]),
    128: (-10, [2.550, 2.474, 2.451, 2.516, 2.592, 2.740]),
}
SP_OPTIMA = {32: -6.64, 64: -7.58, 128: -8.24}  # parabola through the best three points

# microsoft/mup issue 66: nanoGPT, validation loss; None is the run that diverged.
MUP_66 = {
    96: {-8: 4.1291, -9: 4.1184, -10: 4.1627, -11: 4.2398, -12: 4.3393},
    192: {-8: 3.7287, -9: 3.7086, -10: 3.7074, -11: 3.7363, -12: 3.8111},
    384: {-8: 3.4713, -9: 3.4041, -10: 3.3809, -11: 3.3776, -12: 3.4135},
    768: {-8: None, -10: 3.1226, -11: 3.1009, -12: 3.1074},
}


def three_point(low: float, middle: float, high: float) -> float:
    """Vertex of the parabola through (-1, low), (0, middle), (1, high)."""
    return (low - high) / (2 * (low + high - 2 * middle))


def parabola(x: np.ndarray, optimum: float) -> np.ndarray:
    return 2.5 + 0.04 * (x - optimum) ** 2


def skewed(x: np.ndarray, optimum: float) -> np.ndarray:
    """Steeper above the optimum than below it, as loss curves are."""
    z = 0.5 * (x - optimum)
    return 2.5 + 0.32 * (np.exp(z) - 1 - z)


def columns(curve, optimum, *, seeds=2, extra=0, sd=0.01, offset_sd=0.02, rng, grid=range(-10, -2)):
    """(lr, loss, seed): seeds on the whole grid with a common offset each, extra seeds at three rates about the optimum."""
    rows = []
    middle = round(optimum)
    for seed in range(seeds + extra):
        offset = rng.normal(0, offset_sd)
        for k in grid if seed < seeds else (middle - 1, middle, middle + 1):
            rows.append((2.0**k, float(curve(np.float64(k), optimum)) + offset + rng.normal(0, sd), seed))
    lr, loss, seed = zip(*rows, strict=True)
    return list(lr), list(loss), list(seed)
