"""Draws of fitted coefficients: bootstrap over rows or groups, widened for the few rows or groups there are."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtri, stdtrit

from towtank.laws.rows import Rows
from towtank.laws.solve import Model, solve
from towtank.laws.table import Floats

MANY = 20_000  # rows above which the refits are replaced by their linearization, exact in the limit


def draw_coefficients(
    model: Model,
    rows: Rows,
    best: Floats,
    *,
    delta: float,
    box: tuple[Floats, Floats],
    draws: int,
    seed: int,
    level: float,
) -> Floats:
    """Inner coefficients refitted to bootstrap samples, shape (B, P), spread about the fit.

        draw = fit + k (refit - fit),  k = t_{G - P} / z sqrt(G / (G - P))

    with G independent rows or groups, P coefficients and t, z the quantiles of the level: a bootstrap of few rows is too
    narrow by the factors of a variance divided by G and of a normal quantile in place of Student's.

    Hesterberg 2015, "What teachers should know about the bootstrap", section 4 (expanded percentile interval).

    Args:
        model: residuals and derivatives.
        rows: the rows fitted.
        best: the fit, shape (P,).
        delta: corner of the Huber function.
        box: bounds of the coefficients.
        draws: number of samples B.
        seed: seed of the samples.
        level: coverage of the intervals to come.
    """
    low, high = box
    if len(rows) > MANY:
        found = _linearized(model, rows, best, delta, box, draws, seed)
    else:
        starts, weights = np.repeat(best[None], draws, axis=0), resample(rows, draws, seed)
        found = solve(model, starts, weights=weights, lower=low, upper=high, delta=delta).theta
    return np.clip(best + widening(rows.groups, int((low < high).sum()), level) * (found - best), low, high)


def widening(groups: int, parameters: int, level: float) -> float:
    """The factor k of `draw_coefficients`: 1 for many groups."""
    dof = max(groups - parameters, 1)
    tail = (1 + level) / 2
    return float(stdtrit(dof, tail) / ndtri(tail) * np.sqrt(groups / dof))


def resample(rows: Rows, draws: int, seed: int) -> Floats:
    """How many times each row stands in each bootstrap sample, times its weight, shape (B, R).

    Rows of one group are drawn together: they are not independent.
    """
    groups = rows.groups
    counts = np.random.default_rng([seed, 5]).multinomial(groups, np.full(groups, 1 / groups), size=draws)
    return counts[:, rows.group] * rows.weight


def _linearized(
    model: Model, rows: Rows, best: Floats, delta: float, box: tuple[Floats, Floats], draws: int, seed: int
) -> Floats:
    """Normal draws with the covariance H^-1 S H^-1 of the estimate, S summed over groups; coefficients at a bound stay.

    Huber 1967, "The behavior of maximum likelihood estimates under nonstandard conditions".
    """
    residual, jacobian = (a[0] for a in model(best[None]))
    free = (best > box[0]) & (best < box[1])
    jacobian = jacobian[:, free]
    bent = np.clip(residual, -delta, delta)
    scale = np.sqrt(np.mean(jacobian**2, axis=0)) + 1e-300  # coefficients of unlike units
    jacobian = jacobian / scale
    inverse = np.linalg.pinv((jacobian * (rows.weight * (bent == residual))[:, None]).T @ jacobian)
    pull = jacobian * (rows.weight * bent)[:, None]
    score_GP = np.stack([np.bincount(rows.group, column, rows.groups) for column in pull.T], axis=1)
    spread = np.linalg.cholesky(inverse @ (score_GP.T @ score_GP) @ inverse + 1e-300 * np.eye(len(scale)))
    found = np.repeat(best[None], draws, axis=0)
    found[:, free] += np.random.default_rng([seed, 5]).standard_normal((draws, len(scale))) @ spread.T / scale
    return found
