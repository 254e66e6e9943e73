"""What a fit rests on: coefficients that cannot be told apart, rows that decide, rows held out, profiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import ndtr, ndtri

from towtank.estimate import Interval
from towtank.laws.fit import (
    Backtest,
    Confounded,
    HeldOut,
    Identifiability,
    Moved,
    allowed_misses,
    hidden_count,
)
from towtank.laws.rows import Rows
from towtank.laws.solve import solve
from towtank.laws.table import Floats

if TYPE_CHECKING:
    from towtank.laws.formula_fit import FormulaFit

CONFOUNDED = 0.95  # correlation of two coefficients above which the data hardly separate them
DECADES = 0.5  # decades of a variable below which a law of it is weak
FAR, STRAY, ENOUGH = 10.0, 0.1, 20  # median residuals away, the share of rows that may be, rows to tell it by
ROUNDING = 1e-12  # relative spread of draws that is nothing but rounding
CUTS = (0.02, 0.1, 0.25)  # shares of the rows left out at either end


@dataclass(frozen=True)
class Selection:
    """The coefficients without a share of the rows at one end of a column."""

    column: str
    end: str
    share: float
    coefficients: dict[str, float]


def doubts(fit: FormulaFit) -> list[str]:
    """Why a fit is weak inside the range of its own rows; empty if it is not."""
    said = []
    bound = _at_bound(fit, fit.inner)
    if bound:
        said.append(f"{', '.join(bound)} at the bound of what is allowed")
    for name, values in fit.rows.x.items():
        decades = float(np.log10(values.max() / values.min())) if values.min() > 0 else np.inf
        if decades < DECADES:
            said.append(f"{fit.rows.columns[name]!r} spans {decades:.2g} decades, and a law needs {DECADES:g}")
    spare = len(fit.rows) - int(fit.rows.censored.sum()) - fit.form.free
    if spare < 3:
        said.append(f"{spare + fit.form.free} rows for {fit.form.free} coefficients leave {spare} to tell the error by")
    if fit.rows.grouped and fit.rows.groups <= fit.form.free:
        said.append(f"{fit.rows.groups} groups for {fit.form.free} coefficients: the intervals are rough")
    off = np.abs(fit.residuals[~fit.rows.censored])
    far = float(np.mean(off > FAR * max(float(np.median(off)), ROUNDING))) if off.size >= ENOUGH else 0.0
    if far > STRAY:
        said.append(
            f"{far:.0%} of the rows lie more than {FAR:g} times the median residual away: are they of one kind?"
        )
    test = backtest(fit, "largest")
    if test is not None and not test.hit:
        said.append(f"hiding the largest run and predicting it missed by a factor {test.factor:.3g}")
    return said


def backtest(fit: FormulaFit, hold_out: str | int | float) -> Backtest | None:
    """See `FormulaFit.backtest`."""
    rows = fit.rows
    if not fit.draws.size:
        return None
    size = np.prod([v for n, v in rows.x.items() if n not in fit.form.zero_allowed], axis=0)
    hidden = _hidden(rows, size, hold_out) & ~rows.censored
    rest = fit.form.fit_rows(rows.take(~hidden), seed=fit.seed, judge=False)
    if not rest.draws.size or not hidden.any():
        return None
    at = np.flatnonzero(hidden)
    at = at[np.argsort(-size[at], kind="stable")]
    x = {name: values[at] for name, values in rows.x.items()}
    points = tuple(
        HeldOut(
            x={n: float(v[i]) for n, v in x.items()}, predicted=p, measured=float(rows.y[r]), row=int(rows.number[r])
        )
        for i, (r, p) in enumerate(zip(at, rest.forecast(x, scatter=True), strict=True))
    )
    last = points[0]
    return Backtest(
        size=float(size[at[0]]),
        predicted=last.predicted,
        measured=Interval(last.measured, last.measured, last.measured, fit.level),
        factor=max(p.factor for p in points),
        hit=sum(not p.hit for p in points) <= allowed_misses(len(points), fit.level),
        points=points,
    )


def _hidden(rows: Rows, size: Floats, hold_out: str | int | float) -> Any:
    """Largest runs first; a group goes whole."""
    whole = np.zeros(rows.groups)
    np.maximum.at(whole, rows.group, size)
    order = np.argsort(-whole, kind="stable")
    if hold_out == "largest":
        return whole[rows.group] >= whole[order[0]]
    count = hidden_count(hold_out, rows.groups, "runs")
    return np.isin(rows.group, order[:count])


def identifiability(fit: FormulaFit) -> Identifiability:
    """See `FormulaFit.identifiability`."""
    if not fit.draws.size:
        return Identifiability((), ())
    names = [p.name for p in fit.form.parameters]
    labels = [f"log {p.name}" if p.log else p.name for p in fit.form.parameters]
    pairs = confounded(names, labels, fit.inner, fit.draws, fit.level)
    return Identifiability(pairs, tuple(_at_bound(fit, fit.inner)))


def confounded(
    names: Sequence[str], labels: Sequence[str], values_P: Floats, draws_BP: Floats, level: float
) -> tuple[Confounded, ...]:
    """Pairs of coefficients whose draws go together, each with the combination whose draws spread least.

    Args:
        names: of the coefficients.
        labels: what they are called in a combination.
        values_P: their values, (P,).
        draws_BP: draws of them, (B, P).
        level: coverage of the intervals.

    Example:
        >>> a = np.linspace(-1, 1, 101)
        >>> pair, = confounded(["a", "b"], ["a", "b"], np.zeros(2), np.stack([a, 2 * a], axis=1), 0.95)
        >>> pair.combination, round(pair.correlation, 6), abs(pair.value.high) < 1e-9
        ('a - 0.5 b', 1.0, True)
    """
    sd = draws_BP.std(axis=0)
    moving = [int(i) for i in np.flatnonzero(sd > ROUNDING * (1 + np.abs(values_P)))]
    pairs = []
    for n, i in enumerate(moving):
        for j in moving[n + 1 :]:
            rho = float(np.corrcoef(draws_BP[:, i], draws_BP[:, j])[0, 1])
            if abs(rho) < CONFOUNDED:
                continue
            slope = float(np.sign(rho) * sd[i] / sd[j])
            text = f"{labels[i]} {'-' if slope > 0 else '+'} {abs(slope):.4g} {labels[j]}"
            value = percentiles(
                float(values_P[i] - slope * values_P[j]), draws_BP[:, i] - slope * draws_BP[:, j], level
            )
            pairs.append(Confounded(names[i], names[j], rho, text, value))
    return tuple(pairs)


def influence(fit: FormulaFit, most: int) -> dict[str, Moved]:
    """See `FormulaFit.influence`."""
    rows = fit.rows
    most = min(most, rows.groups - fit.form.free - 1)
    if most < 1 or not fit.draws.size:
        return {}
    pull_GP = _pull(fit)
    names = [p.name for p in fit.form.parameters]
    sets = [np.argsort(-side * pull_GP[:, j], kind="stable")[:most] for j in range(len(names)) for side in (1, -1)]
    found = _refit(fit, np.array([np.where(np.isin(rows.group, s), 0.0, rows.weight) for s in sets]), fit.inner)
    moved = {}
    for j, name in enumerate(names):
        at = max((2 * j, 2 * j + 1), key=lambda k: abs(found[k, j] - fit.inner[j]))
        without = {n: float(v) for n, v in fit.form.coefficients(found[at]).items()}
        left = tuple(int(r) for r in rows.number[np.isin(rows.group, sets[at])])
        moved[name] = Moved(left, fit.values[name], without, ratio(without[name], fit.values[name]))
    return moved


def selection(fit: FormulaFit) -> tuple[Selection, ...]:
    """See `FormulaFit.selection`."""
    rows, cuts, weights = fit.rows, [], []
    for column, values in {**{fit.rows.columns[n]: v for n, v in rows.x.items()}, rows.columns[""]: rows.y}.items():
        rank = np.argsort(np.argsort(values, kind="stable"), kind="stable")
        for share in CUTS:
            left = int(np.ceil(share * len(rows)))
            if len(rows) - left <= fit.form.free:
                continue
            cuts += [(column, "lowest", share), (column, "highest", share)]
            weights += [rows.weight * (rank >= left), rows.weight * (rank < len(rows) - left)]
    if not cuts or not fit.draws.size:
        return ()
    found = fit.form.coefficients(_refit(fit, np.array(weights), fit.inner))
    return tuple(
        Selection(cut[0], cut[1], cut[2], {n: float(v[i]) for n, v in found.items()}) for i, cut in enumerate(cuts)
    )


def percentiles(value: float, draws: Floats, level: float) -> Interval:
    """Percentile interval of draws, moved half way towards the bias-corrected one, and widened to hold the value.

        tails Phi(z0 -+ z),  z0 = Phi^-1(share of the draws below the value)

    Efron 1981 moves by 2 z0. The median bias is itself estimated with noise, most where delta is small; half the
    correction keeps the coverage of generated tables nearest to nominal (`bench/laws_coverage.py`).

    Args:
        value: the estimate.
        draws: its bootstrap draws, shape (B,); NaN are left out.
        level: coverage.

    Example:
        >>> print(percentiles(0.5, np.linspace(0, 1, 201), 0.9))
        0.5 [0.05, 0.95]
    """
    draws = draws[~np.isnan(draws)]
    if not draws.size:
        return Interval(value, -np.inf, np.inf, level)
    below = float(np.mean(draws < value) + 0.5 * np.mean(draws == value))
    tails = ndtr(ndtri(np.clip(below, 0.02, 0.98)) + ndtri([(1 - level) / 2, (1 + level) / 2]))
    low, high = np.quantile(draws, tails, method="inverted_cdf")  # draws may be infinite
    return Interval(value, float(min(low, value)), float(max(high, value)), level)


def _refit(fit: FormulaFit, weights: Floats, start: Floats) -> Floats:
    low, high = fit.form.box
    starts = np.repeat(start[None], len(weights), axis=0)
    return solve(fit.form.model(fit.rows), starts, weights=weights, lower=low, upper=high, delta=fit.form.delta).theta


def _pull(fit: FormulaFit) -> Floats:
    """To first order, how far each group pulls each inner coefficient, shape (G, P)."""
    residual, jacobian = (a[0] for a in fit.form.model(fit.rows)(fit.inner[None]))
    slack = fit.rows.weight * np.minimum(1.0, fit.form.delta / np.maximum(np.abs(residual), 1e-300))
    jacobian = jacobian * [p.name not in fit.form.fixed for p in fit.form.parameters]
    metric = (jacobian * slack[:, None]).T @ jacobian
    scale = np.sqrt(np.diag(metric)) + 1e-300
    pull = (jacobian / scale * (slack * residual)[:, None]) @ np.linalg.pinv(metric / np.outer(scale, scale))
    return np.stack(
        [np.bincount(fit.rows.group, column, fit.rows.groups) for column in pull.T], axis=1, dtype=np.float64
    )


def _at_bound(fit: FormulaFit, inner: Floats) -> list[str]:
    ends = zip(fit.form.parameters, inner, *fit.form.box, strict=True)
    near = 1e-9
    return [
        p.name for p, v, a, b in ends
        if p.name not in fit.form.fixed and (v - a <= near * abs(v) or b - v <= near * abs(v))
    ]  # fmt: skip


def ratio(a: float, b: float) -> float:
    """The larger of a / b and its inverse; infinite where the sign changes.

    Example:
        >>> ratio(2.0, 8.0), ratio(-1.0, 1.0)
        (4.0, inf)
    """
    if a * b <= 0:
        return np.inf if a != b else 1.0
    return max(a / b, b / a)
