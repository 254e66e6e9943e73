"""Levels of a sweep whose seeds are shared between its rates: loss = level of the rate + offset of the seed + noise."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from towtank.laws.table import Floats, Ints

DRAWS = 2000  # draws behind every interval


@dataclass(frozen=True)
class Noise:
    """A variance and the degrees of freedom it was estimated with.

    Example:
        >>> Noise(1.0, 2).pool(Noise(4.0, 1))
        Noise(variance=2.0, dof=3)
    """

    variance: float
    dof: int

    def pool(self, other: Noise | None) -> Noise:
        """The variance of both samples together."""
        if other is None or other.dof == 0:
            return self
        dof = self.dof + other.dof
        return Noise((self.variance * self.dof + other.variance * other.dof) / dof, dof)

    def draw_sd(self, rng: np.random.Generator, n: int) -> Floats:
        """Standard deviations that could have given this variance: s sqrt(dof / chi2_dof), so that z * sd is t-like."""
        return np.sqrt(self.variance * self.dof / rng.chisquare(self.dof, n))


def pool(noises: Iterable[Noise | None]) -> Noise | None:
    """The variance of all samples together; None if there are none."""
    total: Noise | None = None
    for noise in noises:
        if noise is not None and noise.dof:
            total = noise.pool(total)
    return total


@dataclass(frozen=True)
class Levels:
    """Least-squares levels and what is left over.

    Args:
        value: level of each rate, averaged over seeds, shape (K,).
        factor: F with covariance of the levels = variance * F F^T, shape (K, K).
        rss: weighted sum of squares left over.
        dof: number of rows minus number of fitted levels and offsets.
        between: variance of the seed offsets, None with one seed.
        seeds: number of seeds.
        flat_rss: sum of squares left over when all levels are equal.
    """

    value: Floats
    factor: Floats
    rss: float
    dof: int
    between: Noise | None
    seeds: int
    flat_rss: float

    @property
    def noise(self) -> Noise:
        """Variance of one run about its level and its seed's offset."""
        return Noise(self.rss / self.dof if self.dof else 0.0, self.dof)


def fit_levels(rate: Ints, seed: Ints, loss: Floats, weight: Floats) -> Levels:
    """Levels of rates measured with unequal sets of seeds.

    Runs of one seed share initialization and data, so their losses move together: y = mu_rate + a_seed + noise with
    sum of a over seeds = 0 (two-way layout without interaction; Scheffe 1959, The Analysis of Variance, chapter 4).
    Where no seed links two groups of rates the offsets cannot be told from the levels and are counted as noise.

    Args:
        rate: index of the rate of each row, 0..K-1, each present, shape (N,).
        seed: label of the seed of each row, shape (N,).
        loss: finite losses, shape (N,).
        weight: number of equal runs each row stands for, shape (N,).

    Example:
        >>> r, s = np.array([0, 1, 0, 1, 1]), np.array([0, 0, 1, 1, 2])
        >>> y = np.array([1.0, 2.0, 1.5, 2.5, 3.0])  # seed offsets -0.5, 0, 0.5 about levels 1.5, 2.5
        >>> fit_levels(r, s, y, np.ones(5)).value.round(6)
        array([1.5, 2.5])
    """
    labels, s = np.unique(seed, return_inverse=True)
    k = int(rate.max()) + 1
    level_NK = (rate[:, None] == np.arange(k)).astype(np.float64)
    offset_NS = (s[:, None] == np.arange(labels.size - 1)).astype(np.float64) - (s == labels.size - 1)[:, None]
    design = np.hstack([level_NK, offset_NS])
    linked = np.linalg.matrix_rank(design) == design.shape[1]
    if not linked:
        design, offset_NS = level_NK, offset_NS[:, :0]
    root = np.sqrt(weight)
    gram = (design * weight[:, None]).T @ design
    center = float(np.average(loss, weights=weight))  # keeps digits when a constant is added to all losses
    theta: Floats = np.asarray(np.linalg.solve(gram, design.T @ (weight * (loss - center))), dtype=np.float64)
    rss = float(np.sum((root * (loss - center - design @ theta)) ** 2))
    flat = np.hstack([np.ones((loss.size, 1)), offset_NS]) * root[:, None]
    coefficients = np.linalg.lstsq(flat, root * (loss - center), rcond=None)[0]
    flat_rss = float(np.sum((root * (loss - center) - flat @ coefficients) ** 2))
    factor: Floats = np.asarray(np.linalg.cholesky(np.linalg.inv(gram)[:k, :k]), dtype=np.float64)
    offsets = np.append(theta[k:], -theta[k:].sum())
    between = Noise(float(offsets.var(ddof=1)), labels.size - 1) if linked and labels.size > 1 else None
    return Levels(theta[:k] + center, factor, rss, loss.size - design.shape[1], between, labels.size, flat_rss)
