"""Redraws of a loss curve: where the minimum would be if the noise had fallen otherwise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from towtank.laws.levels import DRAWS, Levels, Noise
from towtank.laws.parabola import WIDE, LocalFit, akaike_weights, local_fits, window
from towtank.laws.sweep import Sweep, residual_noise
from towtank.laws.table import Floats

ESCAPED = 0.01  # share of redraws with their minimum at an end of the region beyond which there are more rates


@dataclass(frozen=True, kw_only=True)
class Region:
    """The rates about the lowest level.

    Args:
        runs: the runs at these rates.
        levels: their levels, fitted to these runs alone.
        noise: run-to-run variance; dof 0 if nothing is known of it.
        replicated: whether the noise is from replicates, not from the misfit of a parabola.
        beyond: log2 of the next rate outside, below and above; -inf and inf where the grid ends.
        more: whether runs finished at the next rate outside, below and above.
    """

    runs: Sweep
    levels: Levels
    noise: Noise
    replicated: bool
    beyond: tuple[float, float]
    more: tuple[bool, bool]

    @property
    def center(self) -> int:
        """Index of the lowest level."""
        return int(np.argmin(self.levels.value))

    def bracket(self, j: int) -> tuple[float, float]:
        """log2 of the rates next to the one at `j`."""
        x = self.runs.x_K
        return (float(x[j - 1]) if j > 0 else self.beyond[0], float(x[j + 1]) if j < x.size - 1 else self.beyond[1])


@dataclass(frozen=True, kw_only=True)
class Redraws:
    """Minima of the redrawn curves, and of the curve as measured.

    Args:
        x_B: log2 of the best rate.
        loss_B: loss there.
        x: the same for the levels as measured; NaN curvature where there is no parabola.
        loss: loss there.
        curvature: half the second derivative there.
        edge: share of redraws with the minimum at an end of the grid.
        escaped: share with the minimum at an end of the region that is not an end of the grid.
    """

    x_B: Floats
    loss_B: Floats
    x: float
    loss: float
    curvature: float
    edge: float
    escaped: float


def region(runs: Sweep, center: int, reach: int, noise: Noise | None = None) -> Region:
    """The rates within `reach` octaves, or `reach` points, of the one at `center`."""
    keep, last = window(runs.x_K, center, reach * WIDE[0] / 2, reach), runs.x_K.size - 1
    part = runs.part(keep)
    levels = part.levels()
    own = levels.noise.pool(noise)
    more = (bool(keep[0] > 0), bool(keep[-1] < last))
    beyond = (
        float(runs.x_K[keep[0] - 1]) if more[0] else runs.wall[0],
        float(runs.x_K[keep[-1] + 1]) if more[1] else runs.wall[1],
    )
    guess = own if own.dof else residual_noise(part, levels.value, int(np.argmin(levels.value)))
    return Region(runs=part, levels=levels, noise=guess, replicated=own.dof > 0, beyond=beyond, more=more)


def redraw(region: Region, random_seed: int, draws: int = DRAWS) -> Redraws:
    """Redraw the levels, find each curve's lowest level, and the minimum of a local polynomial there.

    Where all runs at the next rate diverged, or nothing is known of the noise, the minimum may be anywhere between the
    neighbours and is drawn from there.
    """
    rng = np.random.default_rng(random_seed)
    k, levels = region.runs.x_K.size, region.levels
    sd_B = region.noise.draw_sd(rng, draws) if region.noise.dof else np.zeros(draws)
    level_BK = levels.value + sd_B[:, None] * (rng.standard_normal((draws, k)) @ levels.factor.T)
    lowest_B = np.argmin(level_BK, axis=1)
    pick_B, spread_B = rng.random(draws), rng.random(draws)
    x_B, loss_B = np.empty(draws), np.empty(draws)
    for j in np.unique(lowest_B):
        rows = lowest_B == j
        low, high = region.bracket(j)
        found = _minimum(region, j, level_BK[rows], sd_B[rows] ** 2, pick_B[rows])
        guessed = np.isfinite(high - low) and (region.noise.dof == 0 or j in (0, k - 1))
        x_B[rows] = low + (high - low) * spread_B[rows] if guessed else found[0]
        loss_B[rows] = found[1]
    ends = [float(np.mean(lowest_B == j)) for j in (0, k - 1)]
    x, loss, curvature = _measured(region, sd_B**2)
    return Redraws(
        x_B=x_B,
        loss_B=loss_B,
        x=x,
        loss=loss,
        curvature=curvature,
        edge=sum(s for s, b in zip(ends, region.beyond, strict=True) if not np.isfinite(b)),
        escaped=sum(s for s, more in zip(ends, region.more, strict=True) if more),
    )


def _fits(region: Region, j: int, variance_B: Floats) -> tuple[tuple[LocalFit, ...], Floats]:
    """The polynomials about an inner rate, and their weights (M, B) by how they fit the measured levels."""
    fits = local_fits(region.runs.x_K, region.runs.weight_K, j)
    floor = 1e-24 * max(1.0, float(np.ptp(region.levels.value)) ** 2)
    return fits, akaike_weights(fits, region.levels.value, np.maximum(variance_B, floor))


def _vertex(fit: LocalFit, narrow: LocalFit, j: int, level_BK: Floats) -> Floats:
    """Position, value and curvature (3, B): of the fit; where it has no minimum, of the narrow one, else of the level."""
    found = np.stack(fit.vertex(level_BK))
    lost = np.isnan(found[0])
    if lost.any():
        level_BK = level_BK[lost]
        other = np.stack(narrow.vertex(level_BK))
        bare = np.stack([np.zeros(len(level_BK)), level_BK[:, j], np.full(len(level_BK), np.nan)])
        found[:, lost] = np.where(np.isnan(other[0]), bare, other)
    return found


def _minimum(region: Region, j: int, level_BK: Floats, variance_B: Floats, pick_B: Floats) -> tuple[Floats, Floats]:
    x_K = region.runs.x_K
    if j in (0, x_K.size - 1):
        return np.full(len(level_BK), x_K[j]), level_BK[:, j]
    fits, weight_MB = _fits(region, j, variance_B)
    model_B = np.minimum((np.cumsum(weight_MB, axis=0) < pick_B).sum(axis=0), len(fits) - 1)
    v, loss = np.empty(len(level_BK)), np.empty(len(level_BK))
    for m, fit in enumerate(fits):
        rows = model_B == m
        v[rows], loss[rows], _ = _vertex(fit, fits[0], j, level_BK[rows])
    return x_K[j] + v, loss


def _measured(region: Region, variance_B: Floats) -> tuple[float, float, float]:
    j, x_K, level = region.center, region.runs.x_K, region.levels.value
    if j in (0, x_K.size - 1):
        return float(x_K[j]), float(level[j]), np.nan
    fits, weight_MB = _fits(region, j, variance_B)
    vertex_M3 = np.stack([_vertex(fit, fits[0], j, level[None])[:, 0] for fit in fits])
    v, loss, curvature = weight_MB.mean(axis=1) @ vertex_M3
    return float(x_K[j] + v), float(loss), float(curvature)
