"""Conformance suite of parametric laws: the coefficients that generated a table lie in the intervals that come out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.stats import binom

from towtank.laws.formula_fit import FormulaFit
from towtank.laws.parametric import ParametricLaw
from towtank.laws.rows import Rows, read_rows


@dataclass(frozen=True, kw_only=True)
class LawCase:
    """A law, what generates its tables, and a point to forecast.

    Args:
        law: the law under test.
        truth: its coefficients.
        x: the variables of every row.
        at: the point of the forecast, beyond the rows.
        sd: noise of log y (or of y over its range, where the link is "identity").
        group: the run of each row, for grouped noise: half of the variance is then common to the rows of a run.
    """

    law: ParametricLaw
    truth: Mapping[str, float]
    x: Mapping[str, np.ndarray]
    at: Mapping[str, float]
    sd: float
    group: np.ndarray = field(repr=False)

    def table(self, rng: np.random.Generator, *, grouped: bool) -> dict[str, np.ndarray]:
        """A table that the law generated."""
        rows = self.group.size
        noise = rng.standard_normal(rows)
        if grouped:
            noise = np.sqrt(0.5) * (noise + rng.standard_normal(self.group.max() + 1)[self.group])
        exact = self.law.value(self.truth, self.x)
        y = exact * np.exp(self.sd * noise) if self.law.link == "log" else exact + self.sd * np.ptp(exact) * noise
        return {**self.x, "y": y, "run": self.group}

    def rows(self, draw: int, *, grouped: bool) -> Rows:
        """The checked rows of one generated table."""
        names = {n: n for n in self.law.variables}
        table = self.table(np.random.default_rng([draw, grouped]), grouped=grouped)
        return read_rows(
            table, names, "y", groups="run" if grouped else None, positive_y=self.law.link == "log",
            zero_allowed=self.law.zero_allowed,
        )  # fmt: skip

    def fit(self, draw: int, *, grouped: bool) -> FormulaFit:
        """The fit of one generated table, without its verdict."""
        return self.law.fit_rows(self.rows(draw, grouped=grouped), seed=draw, judge=False)

    def quick(self, draws: int) -> LawCase:
        """The same with fewer bootstrap refits."""
        return replace(self, law=replace(self.law, draws=draws))

    def exact(self) -> LawCase:
        """The same without noise."""
        return replace(self.quick(2), sd=0.0)

    def targets(self) -> dict[str, float]:
        """The true coefficients, what is derived from them, and the true value at the point of the forecast."""
        found = dict(self.truth) | {n: float(f(self.truth)) for n, f in self.law.derived.items()}
        at = {n: np.array([v]) for n, v in self.at.items()}
        return found | {"forecast": float(np.squeeze(self.law.value(self.truth, at)))}


def hits(case: LawCase, draws: range, *, grouped: bool) -> dict[str, int]:
    """How many intervals of generated tables contain the truth, by coefficient, and "forecast"."""
    targets = case.targets()
    count = dict.fromkeys(targets, 0)
    for draw in draws:
        fit = case.fit(draw, grouped=grouped)
        told = fit.coefficients | {"forecast": fit.forecast({n: np.array([v]) for n, v in case.at.items()})[0]}
        for name, truth in targets.items():
            count[name] += truth in told[name]
    return count


def bounds(replicates: int, low: float = 0.92, high: float = 0.98, doubt: float = 1e-4) -> tuple[int, int]:
    """Numbers of hits that a coverage of `low` to `high` leaves, but for one case in 1 / doubt at either end."""
    return int(binom.ppf(doubt, replicates, low)), int(binom.ppf(1 - doubt, replicates, high))


def judged_by_differences(case: LawCase) -> None:
    """Assert that the derivatives of the residuals are those of central differences, at the truth and beside it.

    A central difference of step h errs by h^2 |f'''| / 6 + eps |f| / h: with h = 1e-5 and derivatives of order one about 1e-10.
    """
    model = case.law.model(case.rows(0, grouped=False))
    rng = np.random.default_rng(0)
    for theta in case.law.inner(case.truth) * (1 + 0.05 * rng.standard_normal((3, len(case.truth)))):
        _, exact = model(theta[None])
        for j in range(theta.size):
            step = 1e-5 * np.eye(theta.size)[j] * max(abs(theta[j]), 1e-3)
            numeric = (model((theta + step)[None])[0] - model((theta - step)[None])[0]) / (2 * step[j])
            scale = np.abs(exact[0, :, j]).max()
            np.testing.assert_allclose(exact[0, :, j], numeric[0], rtol=1e-6, atol=1e-6 * scale + 1e-9)
