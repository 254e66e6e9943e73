"""What a fit of loss curves rests on: curves held out, curves that decide, coefficients that cannot be told apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from towtank.estimate import Interval
from towtank.laws.diagnose import CONFOUNDED
from towtank.laws.fit import Confounded, Identifiability
from towtank.laws.profile import Profile
from towtank.laws.solve import solve
from towtank.laws.table import Floats, near

if TYPE_CHECKING:
    from towtank.laws.curve_fit import CurveFit

JUDGING = 40  # bootstrap refits of the backtest that the verdict asks for
WIDTH = 2.0  # half-width of a profile, in half-widths of the interval


@dataclass(frozen=True, kw_only=True)
class CurveBacktest:
    """A curve that was hidden, and what the others said of it.

    Args:
        curve: its name.
        predicted: its last loss as predicted, with the scatter of one run.
        measured: its last loss.
        error: mean of |predicted - measured| / measured over its rows.
        worst: the largest of these.
        hit: whether the interval holds the last loss.
    """

    curve: str
    predicted: Interval
    measured: float
    error: float
    worst: float
    hit: bool


@dataclass(frozen=True, kw_only=True)
class WithoutCurve:
    """The coefficients without one curve, and the largest ratio by which that moves one of them."""

    curve: str
    coefficients: dict[str, float]
    factor: float


def doubts(fit: CurveFit) -> list[str]:
    """Why a fit is weak for schedules like its own; empty if it is not."""
    names = [p.name for p in fit.form.parameters]
    said = []
    lost = [n for n, gone in zip(names, fit.undetermined, strict=True) if gone]
    if lost:
        said.append(f"{', '.join(lost)} cannot be determined: no curve depends on it; add one whose rate falls")
    bound = [n for n in _at_bound(fit) if n not in lost]
    if bound:
        said.append(f"{', '.join(bound)} at the bound of what is allowed")
    loose = [n for n in _loose(fit) if n not in lost]
    if loose:
        said.append(f"the curves hardly determine {', '.join(loose)}: all that is allowed is in the interval")
    if fit.resampled != "curves":
        said.append(
            f"{len(fit.points.curves)} curves: the intervals know the scatter within curves, not from run to run"
        )
    test = backtest(fit, "largest", draws=JUDGING) if len(fit.points.curves) > 2 else None
    if test is not None and not test.hit:
        said.append(
            f"hiding {test.curve!r} and predicting its last loss missed by {test.predicted.value - test.measured:+.3g}"
        )
    return said


def backtest(fit: CurveFit, hold_out: str, *, draws: int | None = None) -> CurveBacktest | None:
    """See `CurveFit.backtest`.

    Raises:
        ValueError: if there is no such curve.
    """
    curves = fit.points.curves
    names = [c.name for c in curves]
    if hold_out != "largest" and hold_out not in names:
        raise ValueError(f"hold_out = {hold_out!r}: expected 'largest' or one of {names}{near(hold_out, names)}")
    hidden = int(np.argmax([c.steps[-1] for c in curves])) if hold_out == "largest" else names.index(hold_out)
    if len(curves) < 2 or fit.verdict.status == "refuse":
        return None
    form = replace(fit.form, draws=fit.form.draws if draws is None else draws)
    rest = form.fit_points(form.without(fit.points, hidden), start=fit.inner, judge=False)
    if rest.undetermined[~fit.undetermined].any() or not rest.drawn.size:
        return None
    curve = curves[hidden]
    loss, low, high = rest.forecast([curve.schedule], curve.steps, curve.size, True)
    off = np.abs(loss - curve.loss) / curve.loss
    last = Interval(float(loss[-1]), float(low[-1]), float(high[-1]), fit.level)
    measured = float(curve.loss[-1])
    return CurveBacktest(
        curve=curve.name, predicted=last, measured=measured, error=float(off.mean()), worst=float(off.max()),
        hit=measured in last,
    )  # fmt: skip


def identifiability(fit: CurveFit) -> Identifiability:
    """See `CurveFit.identifiability`."""
    if not fit.drawn.size:
        return Identifiability((), ())
    pairs = [p for p in (_rivals(fit),) if p is not None]
    names = [p.name for p in fit.form.parameters]
    labels = [f"log {p.name}" if p.log else p.name for p in fit.form.parameters]
    sd = fit.drawn.std(axis=0)
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            if not sd[i] * sd[j]:
                continue
            rho = float(np.corrcoef(fit.drawn[:, i], fit.drawn[:, j])[0, 1])
            if abs(rho) >= CONFOUNDED:
                slope = float(np.sign(rho) * sd[i] / sd[j])
                direction = np.eye(len(names))[[i]] - slope * np.eye(len(names))[[j]]
                text = f"{labels[i]} {'-' if slope > 0 else '+'} {abs(slope):.4g} {labels[j]}"
                pairs.append(Confounded(first, names[j], rho, text, fit.interval(direction[0])))
    return Identifiability(tuple(pairs), tuple(_at_bound(fit)))


def influence(fit: CurveFit) -> tuple[WithoutCurve, ...]:
    """See `CurveFit.influence`."""
    curves = fit.points.curves
    if len(curves) < 2 or not fit.drawn.size:
        return ()
    weights = (np.arange(len(curves))[:, None] != fit.points.curve).astype(np.float64)
    low, high = fit.form.box
    starts = np.repeat(fit.inner[None], len(curves), axis=0)
    found = solve(
        fit.form.model(fit.points), starts, weights=weights, lower=low, upper=high, delta=fit.form.delta
    ).theta
    moved = []
    for curve, inner in zip(curves, found, strict=True):
        values = {n: float(v) for n, v in fit.form.coefficients(inner).items()}
        ratio = max(_ratio(values[n], v) for n, v in fit.values.items())
        moved.append(WithoutCurve(curve=curve.name, coefficients=values, factor=ratio))
    return tuple(sorted(moved, key=lambda m: -m.factor))


def profile(fit: CurveFit, name: str, points: int) -> Profile:
    """See `CurveFit.profile`; the rise of the objective at one standard deviation of the bootstrap sets the scale.

    Raises:
        ValueError: if the law has no such coefficient, or the curves do not determine it.
    """
    names = [p.name for p in fit.form.parameters]
    if name not in names:
        raise ValueError(f"expected a coefficient, one of {names}, got {name!r}{near(name, names)}")
    at = names.index(name)
    sd = float(fit.drawn[:, at].std()) if fit.drawn.size else 0.0
    if not sd:
        raise ValueError(f"no profile of {name!r}: the curves do not determine it")
    best, log = fit.inner[at], fit.form.parameters[at].log
    direction = np.eye(fit.inner.size)[at]
    whole = fit.interval(direction)
    wide = (whole.high - whole.low) / 2 / sd
    floor, ceiling = (float(b[at]) for b in fit.form.box)
    one = np.clip([best - sd, best + sd], floor, ceiling)
    rise = float(np.mean(_held(fit, at, one))) - fit.objective
    limit = fit.objective + rise * wide**2
    values = np.unique(
        [best, *np.linspace(max(best - WIDTH * wide * sd, floor), min(best + WIDTH * wide * sd, ceiling), points)]
    )
    objective = _held(fit, at, values)
    low = _crossing(values[values <= best][::-1], objective[values <= best][::-1], limit, floor)
    high = _crossing(values[values >= best], objective[values >= best], limit, ceiling)
    shown = np.exp([best, low, high]) if log else np.array([best, low, high])
    interval = Interval(float(shown[0]), float(shown[1]), float(shown[2]), fit.level)
    return Profile(name, np.exp(values) if log else values, objective, limit, interval)


def _held(fit: CurveFit, at: int, values: Floats) -> Floats:
    """The least objective with one coefficient held at each of some values."""
    low, high = (np.repeat(b[None], values.size, axis=0) for b in fit.form.box)
    starts = np.repeat(fit.inner[None], values.size, axis=0)
    starts[:, at] = low[:, at] = high[:, at] = values
    return solve(fit.form.model(fit.points), starts, lower=low, upper=high, delta=fit.form.delta).objective


def _crossing(values: Floats, objective: Floats, limit: float, end: float) -> float:
    """Where the objective, going away from the minimum, first exceeds the limit; the end of the box if it does not."""
    above = np.flatnonzero(objective > limit)
    if not above.size:
        return end
    i = max(int(above[0]), 1)
    share = (limit - objective[i - 1]) / (objective[i] - objective[i - 1])
    return float(values[i - 1] + share * (values[i] - values[i - 1]))


def _rivals(fit: CurveFit) -> Confounded | None:
    """The combination that the same law with other settings agrees on, fitted to the same curves."""
    found = []
    for rival in fit.form.rivals():
        points = rival.prepare(fit.points.curves)
        found.append(rival.combined(rival.fit_points(points, draw=False).values))
    combined = fit.form.combined(fit.values)
    known = [c[3] for c in found if c is not None]
    if combined is None or not known or fit.undetermined.any():
        return None
    first, second, text, value = combined
    return Confounded(first, second, 1.0, text, Interval(value, min(value, *known), max(value, *known), fit.level))


def _at_bound(fit: CurveFit) -> list[str]:
    low, high = fit.form.box
    near = 1e-9 * np.abs(fit.inner)
    held = (fit.inner - low <= near) | (high - fit.inner <= near)
    return [p.name for p, there in zip(fit.form.parameters, held, strict=True) if there]


def _loose(fit: CurveFit) -> list[str]:
    """Coefficients whose interval reaches from one bound to the other."""
    found = fit.coefficients
    return [
        p.name for p in fit.form.parameters if found[p.name].low <= p.low * 1.001 and found[p.name].high >= p.high / 1.001
    ]  # fmt: skip


def _ratio(a: float, b: float) -> float:
    if a * b <= 0:
        return np.inf if a != b else 1.0
    return max(a / b, b / a)
