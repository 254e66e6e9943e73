"""The runs of one size, in canonical form: what finished, what diverged, and where the lowest loss is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from towtank.laws.levels import Levels, Noise, fit_levels
from towtank.laws.parabola import WIDE, window
from towtank.laws.table import Floats, Ints, positive


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Finished runs between the nearest fully diverged rates, sorted; N runs at K rates.

    Args:
        x_K: log2 of the rates, ascending.
        rate_N: index into x_K of each run.
        seed_N: seed of each run.
        loss_N: loss of each run, nats.
        weight_N: number of equal runs each row stands for.
        wall: log2 of the nearest rates below and above at which every run diverged; -inf and inf if there are none.
        diverged: number of runs without a loss.
        partial: log2 of the rates at which some runs diverged.
        tried: log2 of the lowest and the highest rate tried.
    """

    x_K: Floats
    rate_N: Ints
    seed_N: Ints
    loss_N: Floats
    weight_N: Floats
    wall: tuple[float, float] = (-np.inf, np.inf)
    diverged: int = 0
    partial: frozenset[float] = frozenset()
    tried: tuple[float, float] = (np.nan, np.nan)

    @property
    def weight_K(self) -> Floats:
        """Number of runs at each rate."""
        return np.bincount(self.rate_N, self.weight_N, self.x_K.size).astype(np.float64)

    def levels(self) -> Levels:
        """Level of each rate; see `fit_levels`."""
        return fit_levels(self.rate_N, self.seed_N, self.loss_N, self.weight_N)

    def part(self, keep_K: Ints) -> Sweep:
        """The runs at the rates with these indices (ascending)."""
        inside = np.isin(self.rate_N, keep_K)
        return Sweep(
            x_K=self.x_K[keep_K],
            rate_N=np.searchsorted(keep_K, self.rate_N[inside]),
            seed_N=self.seed_N[inside],
            loss_N=self.loss_N[inside],
            weight_N=self.weight_N[inside],
        )


def sweep(
    lr: Sequence[float] | Floats,
    loss: Sequence[float | None] | Floats,
    seed: Sequence[int] | Ints | None = None,
    weights: Sequence[float] | Floats | None = None,
) -> Sweep:
    """Sort the runs of one size; losses that are None, NaN or infinite mean diverged.

    Rows of one seed at one rate are one run and are averaged; without seeds they are replicates.

    Raises:
        ValueError: if a rate or weight is not positive, or the lengths differ.

    Example:
        >>> sweep([0.25, 0.5, 1.0, 2.0], [3.0, 2.0, 2.5, None]).wall
        (-inf, 1.0)
    """
    rate = positive(np.asarray(lr, dtype=np.float64), "lr")
    y = np.array([np.nan if v is None else v for v in loss], dtype=np.float64)
    s = np.zeros(rate.size, dtype=np.int64) if seed is None else np.asarray(seed, dtype=np.int64)
    w = np.ones(rate.size) if weights is None else positive(np.asarray(weights, dtype=np.float64), "weights")
    if not rate.size == y.size == s.size == w.size:
        raise ValueError(f"expected columns of equal length, got {rate.size}, {y.size}, {s.size} and {w.size}")
    done = np.isfinite(y)
    x = np.log2(rate)
    tried = (float(x.min()), float(x.max())) if x.size else (np.nan, np.nan)
    partial = frozenset(map(float, np.intersect1d(x[done], x[~done])))
    dead = np.setdiff1d(x, x[done])
    whole = _sorted(x[done], s[done], y[done], w[done], merge=seed is not None)
    best = whole.x_K[int(np.argmin(whole.levels().value))] if whole.x_K.size else np.nan
    low = max((float(v) for v in dead if v < best), default=-np.inf)
    high = min((float(v) for v in dead if v > best), default=np.inf)
    kept = whole.part(np.flatnonzero((whole.x_K > low) & (whole.x_K < high)))
    return Sweep(
        x_K=kept.x_K,
        rate_N=kept.rate_N,
        seed_N=kept.seed_N,
        loss_N=kept.loss_N,
        weight_N=kept.weight_N,
        wall=(low, high),
        diverged=int((~done).sum()),
        partial=partial,
        tried=tried,
    )


def _sorted(x: Floats, seed: Ints, loss: Floats, weight: Floats, *, merge: bool) -> Sweep:
    order = np.lexsort((weight, loss, seed, x))
    x, seed, loss, weight = x[order], seed[order], loss[order], weight[order]
    if merge and x.size:
        new = np.append(True, (np.diff(x) != 0) | (np.diff(seed) != 0))
        run = np.cumsum(new) - 1
        loss = np.bincount(run, loss * weight) / np.bincount(run, weight)
        weight = np.bincount(run, weight) / np.bincount(run)
        x, seed = x[new], seed[new]
    x_K, rate_N = np.unique(x, return_inverse=True)
    return Sweep(x_K=x_K, rate_N=rate_N, seed_N=seed, loss_N=loss, weight_N=weight)


def residual_noise(sweep: Sweep, level_K: Floats, center: int) -> Noise:
    """Noise taken from the misfit of the wide parabola, for want of replicates; dof 0 with three points or fewer."""
    wide = window(sweep.x_K, center, *WIDE)
    if wide.size < 4:
        return Noise(0.0, 0)
    root = np.sqrt(sweep.weight_K[wide])
    powers = (sweep.x_K[wide] - sweep.x_K[center])[:, None] ** np.arange(3) * root[:, None]
    left = root * level_K[wide] - powers @ np.linalg.lstsq(powers, root * level_K[wide], rcond=None)[0]
    return Noise(float(left @ left) / (wide.size - 3), wide.size - 3)
