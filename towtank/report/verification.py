"""Did it hold? The target size, trained at the predicted learning rate and around it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from towtank.estimate import Interval
from towtank.laws.levels import Noise
from towtank.laws.optimum import Optimum, format_rate
from towtank.laws.sweep import sweep
from towtank.laws.tilt import shared_curvature, tilt_optimum
from towtank.record.record import Record
from towtank.report.analysis import Analysis, optimum_of, rate_points
from towtank.report.answer import Prediction, Verification
from towtank.report.grouping import FITTED_STATUS, loss_of, rate_of, seed_of, size_of

NEAR = 0.25  # octaves: a run so near the predicted rate was a run at it


def verify(analysis: Analysis, prediction: Prediction) -> Verification | None:
    """Judge a prediction by the runs of the stage `verify` at its size; None if there are none, or no prediction.

    The optimum there is that of a parabola with the curvature of the fitted sizes (three rates do not tell a curvature)
    and with their run-to-run variance pooled in. The prediction held if that optimum lies in the predicted interval, or if the loss at the predicted rate exceeds the best by no
    more than the noise of a difference of two levels explains. It is not told while fewer than three rates have been
    tried.
    """
    own = [r for r in analysis.group.records if r.stage == "verify"]
    records = [r for r in own if size_of(r, analysis.axis) == prediction.size]
    tried = [r for r in records if r.status in FITTED_STATUS]
    if not records or prediction.lr is None:
        return None
    optimum = _measured(analysis, tried)
    excess = _excess(tried, prediction.lr.value, optimum)
    held, reason = _judge(tried, prediction.lr, optimum, excess, _tolerance(tried, analysis.noise, optimum))
    lost = len(records) - len(tried)
    measured = optimum.lr
    factor = max(measured.value / prediction.lr.value, prediction.lr.value / measured.value) if measured else None
    return Verification(
        size=prediction.size,
        predicted=prediction.lr,
        measured=measured,
        rates=rate_points(records),
        factor=factor,
        excess_loss=excess,
        held=held,
        reason=reason + (f"; {lost} runs failed" if lost else ""),
    )


def _measured(analysis: Analysis, tried: Sequence[Record]) -> Optimum:
    """The optimum at the target: of a parabola as curved as those of the fitted sizes, or where that fails a free one."""
    curvature = shared_curvature(analysis.optima.values())
    if curvature is not None:
        rates, losses, seeds = [rate_of(r) for r in tried], [loss_of(r) for r in tried], [seed_of(r) for r in tried]
        found = tilt_optimum(rates, losses, seeds, curvature=curvature, noise=analysis.noise)
        if found.lr is not None:
            return found
    return optimum_of(tried, noise=analysis.noise)


def _judge(
    tried: Sequence[Record], predicted: Interval, optimum: Optimum, excess: float | None, tolerance: float | None
) -> tuple[bool | None, str]:
    rates = sorted({rate_of(r) for r in tried})
    if len(rates) < 3:
        return None, f"not told: {len(rates)} rates tried, and 3 are needed"
    at = [r for r in tried if abs(np.log2(rate_of(r) / predicted.value)) < NEAR]
    if not at:
        return None, f"not told: no run near the predicted rate {format_rate(predicted.value)}"
    if all(loss_of(r) is None for r in at):
        return False, "all runs at the predicted rate diverged"
    found = optimum.lr
    if found is not None and found.value in predicted:
        return True, f"the measured optimum {format_rate(found.value)} lies inside the predicted interval"
    where = (
        f"the measured optimum {format_rate(found.value)} lies outside the predicted interval"
        if found
        else ("the runs do not bracket their optimum")
    )
    if excess is None or tolerance is None:
        return (False, f"{where}; the noise is not known") if found else (None, f"not told: {optimum.verdict.reason}")
    cost = f"{excess:.3f} nats above the best (noise {tolerance:.3f})"
    if excess <= tolerance:
        return True, f"{where}, but the loss at the predicted rate is within noise of the best: {cost}"
    return False, f"{where}, and the loss at the predicted rate is {cost}"


def _excess(tried: Sequence[Record], predicted: float, optimum: Optimum) -> float | None:
    """Loss at the predicted rate minus the best: of the fitted parabola, or of the levels where there is none; nats."""
    if optimum.lr is not None and optimum.curvature is not None:
        return float(optimum.curvature * np.log2(predicted / optimum.lr.value) ** 2)
    runs = sweep([rate_of(r) for r in tried], [loss_of(r) for r in tried], [seed_of(r) for r in tried])
    near = np.flatnonzero(np.abs(runs.x_K - np.log2(predicted)) < NEAR)
    if not near.size:
        return None
    level = runs.levels().value
    return float(level[near].mean() - level.min())


def _tolerance(tried: Sequence[Record], noise: Noise | None, optimum: Optimum) -> float | None:
    """97.5 % quantile of the difference of two levels that are equal, nats."""
    noise = optimum.noise or noise
    if noise is None or noise.dof == 0:
        return None
    seeds = len({seed_of(r) for r in tried if loss_of(r) is not None})
    return float(stdtrit(noise.dof, 0.975) * np.sqrt(2 * noise.variance / max(seeds, 1)))
