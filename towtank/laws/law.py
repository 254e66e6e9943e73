"""Laws of size: from a table of runs to a fit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from towtank.estimate import Verdict
from towtank.laws.fit import Fit
from towtank.laws.levels import DRAWS, Noise, pool
from towtank.laws.loglog import Measured
from towtank.laws.optimum import Optimum, find_optimum
from towtank.laws.size_fit import SizeFit, fit_points
from towtank.laws.table import Floats, Table, column, positive


class Law(ABC):
    """Anything that turns a table of runs into a fit.

    Args:
        name: what the command line calls it.
        formula: the law, in plain text.
        variables: each variable and its unit.
        source: authors, year, equation.
        needs: the data it needs.
    """

    name: str
    formula: str
    variables: Mapping[str, str]
    source: str
    needs: str

    @abstractmethod
    def fit(self, table: Table, *, x: Any, y: str, weights: str | None = None, seed: int = 0) -> Fit:
        """Fit the law to a table of runs; `x` is a column, or a column for each variable."""


class SizeLaw(Law):
    """A law of one size. A leaf says what is measured at each size, and which polynomials in log2-log2 are pooled."""

    degrees: tuple[int, ...]
    formula = "log2 y = a + b log2 x (+ c log2^2 x)"
    variables = {"size": "width, parameters or any size"}
    source = "least squares on the points of the sizes"
    needs = "two sizes, better four, with replicates"

    @abstractmethod
    def measure(self, table: Table, x: str, y: str, weights: str | None, seed: int) -> list[Measured]:
        """One point per size from the rows of the table."""

    def fit(self, table: Table, *, x: str, y: str, weights: str | None = None, seed: int = 0) -> SizeFit:
        """Fit the law to a table of runs.

        Args:
            table: columns by name, one row per run; None and NaN in `y` mean the run diverged.
            x: column of the size.
            y: column of the measured quantity.
            weights: column of the number of equal runs each row stands for; None: 1.
            seed: seed of the draws.

        Raises:
            ValueError: if a column is missing, or a size or a quantity is not positive.
        """
        return fit_points(self.measure(table, x, y, weights, seed), law=self.name, degrees=self.degrees, seed=seed)


@dataclass(frozen=True, kw_only=True)
class PowerLaw(SizeLaw):
    """A quantity against size: mean of log2 over the replicates of a size, pooled replicate noise.

    With degrees (1, 2) a line and a quadratic are pooled, so that their spread is part of the interval: the maximum
    attention logit of Wortsman et al. 2023, "Small-scale proxies for large-scale Transformer training instabilities",
    section 3.3, is fitted this way.

    Example:
        >>> rows = {"width": [32, 64, 128], "logit": [10.6, 21.6, 70.6]}
        >>> 299 in PowerLaw(degrees=(1, 2)).fit(rows, x="width", y="logit").predict(256)
        True
    """

    name: str = "power law"
    degrees: tuple[int, ...] = (1,)

    def measure(self, table: Table, x: str, y: str, weights: str | None, seed: int) -> list[Measured]:
        """Mean of log2 y per size."""
        size, value = positive(column(table, x), x), column(table, y)
        weight = np.ones(size.size) if weights is None else positive(column(table, weights), weights)
        done = np.isfinite(value)
        log2 = np.full(size.size, np.nan)
        log2[done] = np.log2(positive(value[done], y))
        groups = {float(s): (log2[done & (size == s)], weight[done & (size == s)]) for s in np.unique(size)}
        noise = _pooled(list(groups.values()))
        rng = np.random.default_rng([seed, 2])
        return [_replicates(s, *groups[s], int(((size == s) & ~done).sum()), noise, rng) for s in groups]


@dataclass(frozen=True, kw_only=True)
class LearningRateLaw(SizeLaw):
    """Best learning rate against size: log2 lr* = intercept + slope log2 size.

    Example:
        >>> rows = [(w, 2.0**k, s) for w in (32, 64, 128) for k in range(-10, -4) for s in (0, 1)]
        >>> table = {"width": [r[0] for r in rows], "lr": [r[1] for r in rows], "seed": [r[2] for r in rows],
        ...          "loss": [2 + 0.04 * (np.log2(lr * w) + 1.2) ** 2 + 0.01 * s for w, lr, s in rows]}
        >>> fit = LearningRateLaw().fit(table, x="width", y="loss")
        >>> round(fit.coefficients["slope"].value, 3), round(float(np.log2(fit.predict(256).value)), 3)
        (-1.0, -9.2)
    """

    lr: str = "lr"
    replicate: str = "seed"
    name: str = "learning rate"
    degrees: tuple[int, ...] = (1,)

    def measure(self, table: Table, x: str, y: str, weights: str | None, seed: int) -> list[Measured]:
        """The optimum of each size; see `find_optimum`."""
        return [rate_point(s, o) for s, o in _optima(table, x, y, self.lr, self.replicate, weights, seed).items()]


@dataclass(frozen=True, kw_only=True)
class LossLaw(SizeLaw):
    """Best loss over the learning rate against size: line and quadratic in log2-log2."""

    lr: str = "lr"
    replicate: str = "seed"
    name: str = "best loss"
    degrees: tuple[int, ...] = (1, 2)

    def measure(self, table: Table, x: str, y: str, weights: str | None, seed: int) -> list[Measured]:
        """The loss at the optimum of each size; see `find_optimum`."""
        return [loss_point(s, o) for s, o in _optima(table, x, y, self.lr, self.replicate, weights, seed).items()]


def rate_point(size: float, optimum: Optimum) -> Measured:
    """An optimum as a point of the law of learning rates."""
    value = optimum.lr.value if optimum.lr else np.nan
    return Measured(size=size, value=value, log2_draws=optimum.log2_draws, verdict=optimum.verdict)


def loss_point(size: float, optimum: Optimum) -> Measured:
    """An optimum as a point of the law of losses."""
    if optimum.loss is None:
        return Measured(size=size, value=np.nan, verdict=optimum.verdict)
    draws = optimum.loss_draws
    if optimum.loss.value <= 0:
        return Measured(size=size, value=np.nan, verdict=Verdict("refuse", "a best loss of 0 or less has no power law"))
    return Measured(
        size=size,
        value=optimum.loss.value,
        log2_draws=np.log2(np.maximum(draws, draws[draws > 0].min())),
        verdict=optimum.verdict,
    )


def spread_alike(optima: Mapping[float, Optimum]) -> dict[float, Optimum]:
    """The optima with one variance of the seed offsets for all sizes: two seeds at one size tell next to nothing."""
    between = pool(o.between for o in optima.values())
    return {size: o.spread(between, i) for i, (size, o) in enumerate(optima.items())}


def _optima(
    table: Table, x: str, y: str, lr: str, replicate: str, weights: str | None, seed: int
) -> dict[float, Optimum]:
    size, loss, rate = positive(column(table, x), x), column(table, y), positive(column(table, lr), lr)
    label = column(table, replicate).astype(np.int64) if replicate in table else None
    weight = column(table, weights) if weights is not None else None

    def one(s: float, draw: int) -> Optimum:
        rows = size == s
        return find_optimum(
            rate[rows],
            loss[rows],
            None if label is None else label[rows],
            weights=None if weight is None else weight[rows],
            random_seed=draw,
        )

    return spread_alike({float(s): one(s, seed + i) for i, s in enumerate(np.unique(size))})


def _pooled(groups: list[tuple[Floats, Floats]]) -> Noise:
    dof = sum(max(v.size - 1, 0) for v, _ in groups)
    rss = sum(float(np.sum(w * (v - np.average(v, weights=w)) ** 2)) for v, w in groups if v.size)
    return Noise(rss / dof if dof else 0.0, dof)


def _replicates(
    size: float, log2: Floats, weight: Floats, lost: int, noise: Noise, rng: np.random.Generator
) -> Measured:
    if not log2.size:
        return Measured(size=size, value=np.nan, verdict=Verdict("refuse", f"all {lost} runs diverged"))
    value = float(np.average(log2, weights=weight))
    draws = np.empty(0)
    if noise.dof:
        draws = value + noise.draw_sd(rng, DRAWS) * rng.standard_normal(DRAWS) / np.sqrt(weight.sum())
    if not lost:
        return Measured(size=size, value=2.0**value, log2_draws=draws)
    doubt = Verdict("weak", f"{lost} of {lost + log2.size} runs diverged and are not in the mean")
    return Measured(size=size, value=2.0**value, log2_draws=draws, verdict=doubt)
