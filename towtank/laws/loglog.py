"""The engine of the laws of size: polynomials in log2 of the size, and the scatter of points about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from towtank.estimate import Interval, Verdict
from towtank.laws.levels import DRAWS
from towtank.laws.table import Floats

SCATTER_DOF = 1  # half-Cauchy prior of the scatter
SCATTER_SCALE = 0.5  # its scale, in units of the noise
TINY = 1e-9  # octaves; below this a difference is rounding


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured at one size.

    Args:
        size: width, depth, parameters, ...
        value: the quantity there; positive.
        log2_draws: draws of log2 of it, shape (B,); empty where its noise is not known.
        verdict: how far to trust it; a refused one has NaN for a value and is left out of the fit.
    """

    size: float
    value: float
    log2_draws: Floats = field(default_factory=lambda: np.empty(0), compare=False, repr=False)
    verdict: Verdict = Verdict("ok")

    @property
    def stderr(self) -> float:
        """Half the central 68 % of the draws, octaves; 0 where the noise is not known."""
        if not self.log2_draws.size:
            return 0.0
        low, high = np.quantile(self.log2_draws, [0.16, 0.84])
        return float(high - low) / 2

    def interval(self, level: float = 0.95) -> Interval:
        """The value with the interval of its draws."""
        draws = self.log2_draws if self.log2_draws.size else np.log2([self.value])
        return intervals(np.log2([self.value]), draws[:, None], level)[0]


def intervals(value_S: Floats, log2_draws_BS: Floats, level: float) -> list[Interval]:
    """Intervals of 2^value from draws of the exponents."""
    low, high = np.quantile(log2_draws_BS, [(1 - level) / 2, (1 + level) / 2], axis=0)
    ends = zip(value_S, np.minimum(low, value_S), np.maximum(high, value_S), strict=True)
    return [Interval(*(float(2.0**v) for v in end), level=level) for end in ends]


@dataclass(frozen=True, kw_only=True)
class Polynomial:
    """log2 y = sum over p of coefficient_p (log2 size - origin)^p, with draws of the coefficients.

    Args:
        origin: mean log2 size of the fitted points.
        value: coefficients, shape (P,).
        draws: draws of them, shape (B, P).
        new: draws of how far a new point lies from the law for reasons other than noise, octaves, (B,).
        ratio: Birge ratio: root of chi^2 per degree of freedom; NaN without degrees of freedom or known noise.
    """

    origin: float
    value: Floats
    draws: Floats
    new: Floats
    ratio: float

    def at(self, size: float | Floats) -> tuple[Floats, Floats]:
        """log2 of the law, and draws of it with the scatter of a new point, at sizes of shape (S,): (S,) and (B, S)."""
        x = np.log2(np.atleast_1d(np.asarray(size, dtype=np.float64))) - self.origin
        powers = x ** np.arange(self.value.size)[:, None]
        return self.value @ powers, self.draws @ powers + self.new[:, None]


def fit_polynomial(points: Sequence[Measured], degree: int, *, seed: int = 0) -> Polynomial:
    """Fit one polynomial to points with noise and with a scatter of unknown size.

    y_i ~ N(f(x_i), s_i^2 + w^2). The scatter w is drawn from its restricted likelihood (Patterson and Thompson 1971)
    times a half-Cauchy prior whose scale is half the median noise: where the points agree with the law within their
    noise it is small, and where they do not it grows as the Birge ratio would (Birge 1932). Each draw of the points,
    moved by the scatter, is refitted. Points without noise are taken to scatter as they do about a line.

    Args:
        points: at least degree + 1 sizes, all different.
        degree: 1 for a line, 2 for a quadratic.
        seed: seed of the draws.

    Example:
        >>> points = [Measured(size=w, value=3.0 / w) for w in (32, 64, 128)]
        >>> fit_polynomial(points, 1).value.round(6)
        array([-4.415037, -1.      ])
    """
    rng = np.random.default_rng([seed, degree])
    x = np.log2([p.size for p in points])
    y = np.log2([p.value for p in points])
    s = np.array([p.stderr for p in points])
    powers = (x - x.mean())[:, None] ** np.arange(degree + 1)
    scale = float(np.median(s)) if s.any() else _residual_scale(x, y) / SCATTER_SCALE
    scatter = _draw_scatter(rng, powers, y, s, max(scale, TINY))
    weight = 1 / np.sqrt(s**2 + max(scale, TINY) ** 2 + np.median(scatter) ** 2)  # no lucky small noise rules alone
    solve = np.linalg.pinv(powers * weight[:, None]) * weight
    value = solve @ y
    draws_BK = np.stack([p.log2_draws if p.log2_draws.size else np.full(DRAWS, np.log2(p.value)) for p in points], 1)
    draws_BK = draws_BK + scatter[:, None] * rng.standard_normal(draws_BK.shape)
    dof = x.size - degree - 1
    known = dof > 0 and bool((s > 0).all())
    ratio = float(np.sqrt(np.sum(((y - powers @ value) / s) ** 2) / dof)) if known else np.nan
    return Polynomial(
        origin=float(x.mean()),
        value=value,
        draws=draws_BK @ solve.T,
        new=scatter * rng.standard_normal(DRAWS),
        ratio=ratio,
    )


def _residual_scale(x: Floats, y: Floats) -> float:
    """Root mean square deviation from a line with K - 2 degrees of freedom: the noise, for want of replicates."""
    if x.size < 3:
        return 0.0
    left = y - np.polyval(np.polyfit(x - x.mean(), y, 1), x - x.mean())
    return float(np.sqrt(left @ left / (x.size - 2)))


def _draw_scatter(rng: np.random.Generator, powers: Floats, y: Floats, s: Floats, scale: float) -> Floats:
    left = y - powers @ np.linalg.lstsq(powers, y, rcond=None)[0]
    top = max(30 * scale, 10 * float(np.sqrt(np.mean(left**2))))
    grid_G = np.geomspace(scale / 100, top, 100)
    precision_GK = 1 / (s**2 + grid_G[:, None] ** 2)
    gram_GPP = np.einsum("kp,gk,kq->gpq", powers, precision_GK, powers)
    right_GP = np.einsum("kp,gk,k->gp", powers, precision_GK, left)
    theta_GP = np.linalg.solve(gram_GPP, right_GP[..., None])[..., 0]
    chi2_G = np.sum(precision_GK * (left - theta_GP @ powers.T) ** 2, axis=1)
    log_G = (np.log(precision_GK).sum(axis=1) - np.linalg.slogdet(gram_GPP)[1] - chi2_G) / 2
    log_G -= (SCATTER_DOF + 1) / 2 * np.log1p((grid_G / scale / SCATTER_SCALE) ** 2 / SCATTER_DOF)
    mass_G = np.exp(log_G - log_G.max()) * grid_G  # the grid is geometric
    cumulative = np.cumsum(mass_G) / mass_G.sum()
    return np.interp(rng.random(DRAWS), cumulative, grid_G)
