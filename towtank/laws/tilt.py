"""The optimum of a few rates, with the curvature of the loss curve taken from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr

from towtank.estimate import Interval, Verdict
from towtank.laws.levels import DRAWS, Levels, Noise
from towtank.laws.optimum import Optimum, format_rate
from towtank.laws.sweep import sweep
from towtank.laws.table import Floats

BEYOND = 0.5  # octaves outside the rates tried within which a tilt still tells where the optimum is
CONTRADICTED = 0.01  # probability below which the levels contradict the curvature
SPREAD = 0.2  # least relative spread of a curvature carried from one size to another


@dataclass(frozen=True)
class Curvature:
    """Half the second derivative of loss curves in log2 lr, nats per octave squared, and its relative spread."""

    value: float
    spread: float


def shared_curvature(optima: Iterable[Optimum]) -> Curvature | None:
    """Geometric mean of the curvatures of several sizes, and the standard deviation of their logarithms.

    None if no optimum has a curvature.
    """
    logs = np.log([o.curvature for o in optima if o.curvature is not None and o.curvature > 0])
    if not logs.size:
        return None
    spread = float(logs.std(ddof=1)) if logs.size > 1 else SPREAD
    return Curvature(float(np.exp(logs.mean())), max(spread, SPREAD))


def tilt_optimum(
    lr: Sequence[float],
    loss: Sequence[float | None],
    seed: Sequence[int],
    *,
    curvature: Curvature,
    noise: Noise | None = None,
    level: float = 0.95,
    random_seed: int = 0,
) -> Optimum:
    """Optimum of a parabola of known curvature through the levels of two or more rates.

    loss = a + b x + c x^2 with x = log2 lr and c given: two numbers are fitted, and x* = -b / (2 c). Three rates an octave
    apart tell the tilt b well and the curvature hardly: the vertex of the free parabola through them is mostly noise.

    Args:
        lr: learning rates, shape (N,).
        loss: final losses in nats, None where the run diverged, shape (N,).
        seed: seeds, shape (N,).
        curvature: c and how far to trust it.
        noise: run-to-run variance known from elsewhere, pooled with that of these rows.
        level: coverage of the intervals.
        random_seed: seed of the draws.

    Example:
        >>> rates = [2.0**k for k in (-9, -8, -7)]
        >>> found = tilt_optimum(
        ...     rates * 2, [2 + 0.02 * (k + 8.3) ** 2 + s for s in (0, 0.1) for k in (-9, -8, -7)], [0] * 3 + [1] * 3,
        ...     curvature=Curvature(0.02, 0.2),
        ... )
        >>> round(float(np.log2(found.lr.value)), 6)
        -8.3
    """
    runs = sweep(lr, loss, seed)
    if runs.x_K.size < 2:
        return _refused(f"{runs.x_K.size} rates finished, and a tilt needs 2")
    levels = runs.levels()
    own = levels.noise.pool(noise)
    if not own.dof:
        return _refused("the noise is not known: one run at each rate")
    rng = np.random.default_rng([random_seed, 3])
    level_BK = levels.value + own.draw_sd(rng, DRAWS)[:, None] * (
        rng.standard_normal((DRAWS, runs.x_K.size)) @ levels.factor.T
    )
    c_B = curvature.value * np.exp(curvature.spread * rng.standard_normal(DRAWS))
    x, best = _vertex(runs.x_K, levels.value[None], np.array([curvature.value]), runs.weight_K)
    x_B, loss_B = _vertex(runs.x_K, level_BK, c_B, runs.weight_K)
    p = _bent_alike(runs.x_K, levels, own, curvature, runs.weight_K)
    if p < CONTRADICTED:
        return _refused(f"the losses do not bend as those of other sizes do (p = {p:.1g})")
    if not runs.x_K[0] - BEYOND <= x[0] <= runs.x_K[-1] + BEYOND:
        side, edge = ("below", runs.x_K[0]) if x[0] < runs.x_K[0] else ("above", runs.x_K[-1])
        return _refused(
            f"not bracketed: the losses fall towards rates {side} {format_rate(2.0**edge)}, the last one tried"
        )
    return Optimum(
        lr=_interval(2.0 ** x[0], 2.0**x_B, level), loss=_interval(best[0], loss_B, level), verdict=Verdict("ok"),
        curvature=curvature.value, span=(2.0 ** runs.x_K[0], 2.0 ** runs.x_K[-1]),
        noise=own, between=levels.between, log2_draws=x_B, loss_draws=loss_B, seeds=levels.seeds,
    )  # fmt: skip


def _refused(reason: str) -> Optimum:
    return Optimum(lr=None, loss=None, verdict=Verdict("refuse", reason))


def _bent_alike(x_K: Floats, levels: Levels, noise: Noise, curvature: Curvature, weight_K: Floats) -> float:
    """Probability of levels that bend so differently, if they bent as given: the free curvature against its error."""
    if x_K.size < 3:
        return 1.0
    powers = (x_K - np.average(x_K, weights=weight_K))[:, None] ** np.arange(3)
    root = np.sqrt(weight_K)[:, None]
    bend_K = (np.linalg.pinv(powers * root) * root.T)[2]
    error2 = noise.variance * float(np.sum((bend_K @ levels.factor) ** 2)) + (curvature.spread * curvature.value) ** 2
    t = abs(float(bend_K @ levels.value) - curvature.value) / np.sqrt(error2)
    return float(2 * stdtr(noise.dof, -t))


def _vertex(x_K: Floats, level_BK: Floats, c_B: Floats, weight_K: Floats) -> tuple[Floats, Floats]:
    """Position and value of the minimum of a + b x + c x^2 fitted to each row of levels, with c given."""
    center = float(np.average(x_K, weights=weight_K))
    x = x_K - center
    bent = level_BK - c_B[:, None] * x**2
    slope = (bent * x * weight_K).sum(1) / (weight_K * x**2).sum()
    level = np.average(bent, axis=1, weights=weight_K)
    return center - slope / (2 * c_B), level - slope**2 / (4 * c_B)


def _interval(value: float, draws: Floats, level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(value), float(min(low, value)), float(max(high, value)), level)
