"""Profile likelihood: how much worse the best fit gets when one coefficient is held elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtrit

from towtank.estimate import Interval
from towtank.laws.bootstrap import MANY, widening
from towtank.laws.solve import solve
from towtank.laws.table import Floats

if TYPE_CHECKING:
    from towtank.laws.formula_fit import FormulaFit

REACH, WIDER, TRIES = 4.0, 4.0, 4  # standard errors looked at on either side; how much farther, how often
ONE_SD = 0.1587  # normal tail beyond one standard deviation


@dataclass(frozen=True)
class Profile:
    """The least objective at each value of one coefficient, and the likelihood interval.

    Args:
        name: the coefficient.
        values: where it was held, ascending.
        objective: the least objective there, over all other coefficients.
        threshold: objective at the ends of the interval.
        interval: where the objective is below the threshold; an end at which it never rises is that of the box.
    """

    name: str
    values: Floats
    objective: Floats
    threshold: float
    interval: Interval


def profile(fit: FormulaFit, name: str, points: int) -> Profile:
    """Hold a coefficient at a row of values and refit the others.

    The interval is {z: Q(z) - Q* <= s t^2 / 2} with t the Student quantile. A Huber objective is no log-likelihood: its
    rise is chi-squared only after division by a scale s, taken here from the bootstrap as the mean rise at one standard
    error on either side, times 2. So the bootstrap sets the size, with its groups and weights, and the objective the shape.

    Kent 1982, "Robust properties of likelihood ratio tests".

    Raises:
        ValueError: if the law has no such coefficient, or the fit is refused.
    """
    names = [p.name for p in fit.form.parameters]
    if name not in names or name in fit.form.fixed:
        raise ValueError(f"expected a free coefficient of {names}, got {name!r}")
    if not fit.draws.size:
        raise ValueError(f"no profile of the law {fit.law!r}: {fit.verdict.reason}")
    j = names.index(name)
    points = max(
        9, min(points, 41 * MANY // len(fit.rows))
    )  # of many rows the profile is a parabola: few points draw it
    best, wide = fit.inner[j], widening(fit.rows.groups, fit.form.free, fit.level)
    ends = np.quantile(fit.draws[:, j], [ONE_SD, 1 - ONE_SD])
    below, above = (max(abs(e - best) / wide, 1e-9 * max(abs(best), 1e-9)) for e in ends)
    scale = float(np.mean(_held(fit, j, np.array([best - below, best + above])) - fit.objective))
    t = float(stdtrit(max(fit.rows.groups - fit.form.free, 1), (1 + fit.level) / 2))
    limit = fit.objective + max(scale, 1e-15 * fit.objective) * t**2
    low_box, high_box = (b[j] for b in fit.form.box)
    reach = [REACH * below, REACH * above]
    for _ in range(TRIES):
        inside = np.linspace(max(best - reach[0], low_box), min(best + reach[1], high_box), points)
        values = np.unique(np.append(inside, best))
        objective = np.where(values == best, fit.objective, _held(fit, j, values))
        ends = _crossings(values, objective, best, limit)
        if None not in ends:
            break
        reach = [r if end is not None else WIDER * r for r, end in zip(reach, ends, strict=True)]
    low, high = (found if found is not None else box for found, box in zip(ends, (low_box, high_box), strict=True))
    shown = np.exp if fit.form.parameters[j].log else np.asarray
    ends = shown(np.array([min(low, best), max(high, best)]))
    interval = Interval(fit.values[name], float(ends[0]), float(ends[1]), fit.level)
    return Profile(name, shown(values), objective, limit, interval)


def _held(fit: FormulaFit, j: int, values: Floats) -> Floats:
    """Least objective with inner coefficient j held at each value."""
    low, high = (np.repeat(b[None], values.size, axis=0) for b in fit.form.box)
    values = np.clip(values, low[:, j], high[:, j])
    low[:, j] = high[:, j] = values
    covariance = np.atleast_2d(np.cov(fit.draws.T))
    along = covariance[j] / covariance[j, j] if covariance[j, j] > 0 else np.zeros(fit.inner.size)
    starts = fit.inner + (values - fit.inner[j])[:, None] * along  # the others follow as they do in the bootstrap
    weight = fit.rows.weight
    found = solve(fit.form.model(fit.rows), starts, weights=weight, lower=low, upper=high, delta=fit.form.delta)
    return found.objective


def _crossings(values: Floats, objective: Floats, best: float, limit: float) -> list[float | None]:
    """Where the objective first passes the limit below and above the best value."""
    found: list[float | None] = []
    for side in (-1, 1):
        at = np.flatnonzero((values - best) * side >= 0)[::side]
        over = np.flatnonzero(objective[at] > limit)
        if not over.size:
            found.append(None)
            continue
        a, b = at[over[0] - 1], at[over[0]]
        root = np.sqrt(np.maximum(objective[[a, b]] - objective[at[0]], 0))  # a parabola is a line in this scale
        share = (np.sqrt(limit - objective[at[0]]) - root[0]) / (root[1] - root[0])
        found.append(float(values[a] + share * (values[b] - values[a])))
    return found
