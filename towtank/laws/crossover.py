"""Where two methods change places: the small-scale winner need not win at scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from towtank.estimate import Interval, Verdict
from towtank.laws.formula_fit import FormulaFit
from towtank.laws.table import Floats

WITHIN = 10.0  # factor beyond the data that is looked at
POINTS = 400
RARE = 0.025  # share of draws that may disagree before it is said


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """Where the laws of two methods cross.

    Args:
        at: where they last cross, with an interval whose ends are 0 or infinite where that many draws do not cross; None
            if they do not cross within reach.
        better_below: which of the two (0 or 1) has the lower law below the crossing, or everywhere.
        share: share of the paired draws that cross within reach.
        verdict: how far to trust it, and "no crossover within 10x of the data" where there is none.
    """

    at: Interval | None
    better_below: int
    share: float
    verdict: Verdict


def crossover(first: FormulaFit, second: FormulaFit, *, within: float = WITHIN) -> Crossover:
    """Where two fitted laws of one variable cross, within a factor of the data.

    Args:
        first: the law of one method.
        second: the law of the other, fitted to the same variable.
        within: how many times beyond the data of both to look.

    Raises:
        ValueError: if a law has several variables or a fit is refused, or `within` is below 1.

    Example:
        >>> from towtank.laws.loss import Power
        >>> x = [1.0, 10.0, 100.0, 1000.0]
        >>> a = Power().fit({"c": x, "y": [v**-0.1 for v in x]}, x="c", y="y")
        >>> b = Power().fit({"c": x, "y": [3 * v**-0.2 for v in x]}, x="c", y="y")
        >>> crossover(a, b).verdict.reason, round(crossover(a, b, within=100).at.value / 3**10, 3)
        ('no crossover within 10x of the data', 1.0)
    """
    for fit in (first, second):
        if len(fit.form.variables) != 1:
            raise ValueError(f"expected laws of one variable, got {fit.law!r} of {list(fit.form.variables)}")
        if not fit.draws.size:
            raise ValueError(f"no crossover: the law {fit.law!r} is refused: {fit.verdict.reason}")
    if not within >= 1:
        raise ValueError(f"expected within >= 1, got {within}")
    data = [next(iter(f.rows.x.values())) for f in (first, second)]
    low, high = min(d.min() for d in data), max(d.max() for d in data)
    x = np.geomspace(low / within, high * within, POINTS)
    count = min(len(first.draws), len(second.draws))
    pick = np.random.default_rng([first.seed, second.seed, 11]).permutation(
        count
    )  # fits of one seed share their resamples
    gap = _curve(first, first.inner[None], x) - _curve(second, second.inner[None], x)
    gaps = _curve(first, first.draws[:count], x) - _curve(second, second.draws[:count][pick], x)
    at, drawn = _last(gap, x)[0], _last(gaps, x)
    crossing = np.isfinite(drawn) & (drawn > 0)
    share = float(crossing.mean())
    better = int(gap[0, 0] > 0)
    verdict = first.verdict.worse(second.verdict)
    if not np.isfinite(at) or at == 0:
        said = f"no crossover within {within:g}x of the data"
        if share > RARE:
            said += f" (but in {share:.0%} of the draws)"
        return Crossover(at=None, better_below=better, share=share, verdict=Verdict(verdict.status, said))
    tail = (1 - first.level) / 2
    ends = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf")
    if share < 1 - RARE:
        verdict = verdict.worse(
            Verdict("weak", f"{1 - share:.0%} of the draws do not cross within {within:g}x of the data")
        )
    if not low <= at <= high:
        verdict = verdict.worse(
            Verdict("weak", f"the crossing at {at:.3g} lies outside the data ({low:g} to {high:g})")
        )
    interval = Interval(float(at), float(min(ends[0], at)), float(max(ends[1], at)), first.level)
    return Crossover(at=interval, better_below=better, share=share, verdict=verdict)


def _curve(fit: FormulaFit, inner: Floats, x: Floats) -> Floats:
    return fit.law_at(inner, {next(iter(fit.form.variables)): x})


def _last(gap: Floats, x: Floats) -> Floats:
    """Last sign change of each row, between grid points by a line in log x.

    A row without one gets infinity if its gap closes towards large x, where it may cross farther out, else 0.
    """
    found = np.empty(len(gap))
    for i, g in enumerate(gap):
        change = np.flatnonzero(np.sign(g[1:]) != np.sign(g[:-1]))
        if change.size:
            k = change[-1]
            share = g[k] / (g[k] - g[k + 1])
            found[i] = float(np.exp(np.log(x[k]) + share * np.log(x[k + 1] / x[k])))
        else:
            found[i] = np.inf if abs(g[-1]) < abs(g[0]) else 0.0
    return found
