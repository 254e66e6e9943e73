"""The best learning rate of one size, from the losses of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.special import fdtrc

from towtank.estimate import Interval, Verdict
from towtank.laws.levels import Levels, Noise
from towtank.laws.redraw import ESCAPED, Redraws, Region, redraw, region
from towtank.laws.sweep import Sweep, sweep
from towtank.laws.table import Floats, Ints

EDGE_WEAK, EDGE_REFUSE = 0.025, 0.25  # share of redraws whose lowest loss is at the edge of the grid
FLAT_P = 0.05  # the losses of the rates must differ at this level
WIDE_INTERVAL = 4.0  # high / low beyond which an interval is called wide


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The optimum of one loss curve.

    Args:
        lr: best learning rate; None when it cannot be told.
        loss: loss there, nats, for the population of seeds; None when it cannot be told.
        verdict: how far to trust `lr`; when refused: why, and the next grid to try.
        curvature: c of loss = best + c (log2 lr - log2 best)^2, nats per octave squared; None without a parabola.
        span: learning rates between which the curve was fitted.
        noise: variance of one run about the curve of its seed, nats^2.
        between: variance of the seed offsets, nats^2; None with one seed.
        seeds: number of seeds near the optimum.
        log2_draws: draws of log2 lr behind the interval, shape (B,).
        loss_draws: draws of the best loss, shape (B,).
        curve_draws: the same for the mean of these seeds, shape (B,).
    """

    lr: Interval | None
    loss: Interval | None
    verdict: Verdict
    curvature: float | None = None
    span: tuple[float, float] | None = None
    noise: Noise | None = None
    between: Noise | None = None
    seeds: int = 0
    log2_draws: Floats = field(default_factory=lambda: np.empty(0), compare=False, repr=False)
    loss_draws: Floats = field(default_factory=lambda: np.empty(0), compare=False, repr=False)
    curve_draws: Floats = field(default_factory=lambda: np.empty(0), compare=False, repr=False)

    def spread(self, between: Noise | None, random_seed: int = 0) -> Optimum:
        """The same with the loss of the population of seeds, whose offsets have this variance."""
        if self.loss is None:
            return self
        offset = np.zeros(self.curve_draws.size)
        if between is not None and between.dof:
            rng = np.random.default_rng([random_seed, 1])
            offset = between.draw_sd(rng, offset.size) * rng.standard_normal(offset.size) / np.sqrt(self.seeds)
        loss_B = self.curve_draws + offset
        return replace(self, loss=_interval(self.loss.value, loss_B, self.loss.level), loss_draws=loss_B)


def find_optimum(
    lr: Sequence[float] | Floats,
    loss: Sequence[float | None] | Floats,
    seed: Sequence[int] | Ints | None = None,
    *,
    weights: Sequence[float] | Floats | None = None,
    noise: Noise | None = None,
    level: float = 0.95,
    random_seed: int = 0,
) -> Optimum:
    """Best learning rate of one size, or the reason why it cannot be told.

    Local polynomials in log2 lr about the lowest level: a parabola through the points within one octave; parabola, cubic
    and quartic through those within two, averaged by Akaike weights. Levels are least-squares means with an offset per
    seed. The interval comes from redraws of the levels (t-like: the noise variance is redrawn too); each redraw selects
    its own window and its own polynomial. Runs without a loss are censored: they are never averaged, and a rate at which all
    runs diverged brackets the optimum without a parabola.

    Args:
        lr: learning rates, shape (N,).
        loss: final losses in nats, None or NaN where the run diverged, shape (N,).
        seed: equal labels at different rates mean equal initialization and data, shape (N,). None: no labels.
        weights: number of equal runs each row stands for, shape (N,). None: 1.
        noise: run-to-run variance known from elsewhere (other sizes), pooled with that of these rows.
        level: coverage of the intervals.
        random_seed: seed of the redraws.

    Raises:
        ValueError: if a learning rate is not positive or the lengths differ.

    Example:
        >>> lr = [2.0**k for k in (-9, -8, -7, -6, -5)]
        >>> loss = [2.5 + 0.04 * (k + 6.8) ** 2 for k in (-9, -8, -7, -6, -5)]
        >>> found = find_optimum(lr * 2, loss + [y + 0.01 for y in loss], [0] * 5 + [1] * 5)
        >>> found.verdict.status, round(float(np.log2(found.lr.value)), 6)
        ('ok', -6.8)
        >>> print(find_optimum(lr[:2], loss[:2]).verdict)
        refuse: not bracketed: the lowest loss is at the highest rate tried, 3.9e-3; next grid: 2.0e-3 to 3.1e-2
    """
    runs = sweep(lr, loss, seed, weights)
    if runs.x_K.size == 0:
        return _refused(_no_loss(runs))
    levels = runs.levels()
    center = int(np.argmin(levels.value))
    reason = _unbracketed(runs, levels, center)
    if reason:
        return _refused(reason)
    near, draws = _settle(runs, center, noise, random_seed)
    p = _flat_p(runs, levels, near.noise)
    if p > FLAT_P:
        return _refused(
            f"the noise is larger than the effect: losses of different rates do not differ (p = {p:.2g}); "
            "add seeds, train longer or widen the grid"
        )
    return _summary(runs, near, draws, level).spread(near.levels.between, random_seed)


def format_rate(lr: float) -> str:
    """A learning rate as people write it.

    Example:
        >>> format_rate(0.00361), format_rate(2.0**-10), format_rate(0.25)
        ('3.6e-3', '9.8e-4', '2.5e-1')
    """
    mantissa, exponent = f"{lr:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _refused(reason: str) -> Optimum:
    return Optimum(lr=None, loss=None, verdict=Verdict("refuse", reason))


def _next_grid(low: float, high: float) -> str:
    return f"next grid: {format_rate(2.0**low)} to {format_rate(2.0**high)}"


def _no_loss(runs: Sweep) -> str:
    if not runs.diverged:
        return "no runs"
    return (
        f"all {runs.diverged} runs diverged, down to {format_rate(2.0 ** runs.tried[0])}; "
        f"{_next_grid(runs.tried[0] - 5, runs.tried[0] - 1)}"
    )


def _unbracketed(runs: Sweep, levels: Levels, center: int) -> str:
    x, last = runs.x_K, runs.x_K.size - 1
    if last == 0:
        return (
            f"only one rate finished, {format_rate(2.0 ** x[0])}: no curve; "
            f"{_next_grid(x[0] - 3, x[0] + (1 if np.isfinite(runs.wall[1]) else 3))}"
        )
    if levels.flat_rss <= 1e-18 * float(np.sum(runs.loss_N**2)):
        return "all losses are equal: the learning rate has no effect here; check that training happened"
    if center == 0:
        return (
            f"not bracketed: the lowest loss is at the lowest rate that tells, {format_rate(2.0 ** x[0])}; "
            f"{_next_grid(x[0] - 3, x[0] + 1)}"
        )
    if center == last and not np.isfinite(runs.wall[1]):
        return (
            f"not bracketed: the lowest loss is at the highest rate tried, {format_rate(2.0 ** x[last])}; "
            f"{_next_grid(x[last] - 1, x[last] + 3)}"
        )
    return ""


def _flat_p(runs: Sweep, levels: Levels, noise: Noise) -> float:
    """Probability of losses as different as these if the rates were all alike (F test); 0 where it cannot be tested."""
    k = runs.x_K.size - 1
    if noise.dof == 0 or noise.variance == 0:
        return 0.0
    return float(fdtrc(k, noise.dof, max(levels.flat_rss - levels.rss, 0.0) / k / noise.variance))


def _settle(runs: Sweep, center: int, noise: Noise | None, random_seed: int) -> tuple[Region, Redraws]:
    """The smallest region that the redrawn minima stay in, and those minima."""
    for reach in range(2, runs.x_K.size + 2):
        near = region(runs, center, reach, noise)
        draws = redraw(near, random_seed)
        if draws.escaped <= ESCAPED:
            break
    return near, draws


def _summary(runs: Sweep, near: Region, draws: Redraws, level: float) -> Optimum:
    verdict = _verdict(runs, near, draws)
    if verdict.status == "refuse":
        return Optimum(lr=None, loss=None, verdict=verdict)
    lr = _interval(draws.x, draws.x_B, level)
    if np.isnan(draws.curvature):  # bracketed by divergence
        low, high = near.bracket(near.center)
        lr = Interval(lr.value, min(lr.low, low), max(lr.high, high), level)
    if lr.high - lr.low > np.log2(WIDE_INTERVAL):
        verdict = verdict.worse(Verdict("weak", f"the interval spans a factor {2 ** (lr.high - lr.low):.2g}"))
    x_K = near.runs.x_K
    return Optimum(
        lr=Interval(2.0**lr.value, 2.0**lr.low, 2.0**lr.high, level),
        loss=_interval(draws.loss, draws.loss_B, level),
        verdict=verdict,
        curvature=None if np.isnan(draws.curvature) else draws.curvature,
        span=(2.0 ** x_K[0], 2.0 ** x_K[-1]),
        noise=near.noise if near.replicated else None,
        between=near.levels.between,
        seeds=near.levels.seeds,
        log2_draws=draws.x_B,
        curve_draws=draws.loss_B,
    )


def _verdict(runs: Sweep, near: Region, draws: Redraws) -> Verdict:
    rates = near.runs.x_K
    if draws.edge > EDGE_REFUSE:
        return Verdict(
            "refuse",
            f"the noise is larger than the effect: in {draws.edge:.0%} of redraws the lowest loss is "
            f"at the edge of the grid; add seeds, or {_next_grid(rates[0] - 2, rates[-1] + 2)}",
        )
    said = []
    if np.isnan(draws.curvature):
        top = format_rate(2.0 ** rates[-1])
        said.append(f"bracketed by divergence above {top}, so no parabola: the interval is the bracket")
    if near.noise.dof == 0:
        said.append("one seed and three rates: noise unknown, the interval is the bracket")
    elif not near.replicated:
        said.append("one seed: noise unknown, the interval is from the misfit of a parabola")
    if draws.edge > EDGE_WEAK:
        said.append(f"in {draws.edge:.0%} of redraws the lowest loss is at the edge of the grid")
    if set(map(float, rates)) & runs.partial:
        said.append("some runs near the optimum diverged")
    return Verdict("weak", "; ".join(said)) if said else Verdict("ok")


def _interval(value: float, draws: Floats, level: float) -> Interval:
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(min(low, value)), float(max(high, value)), level)
