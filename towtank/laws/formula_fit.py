"""A fitted formula: what it says, how sure, and what in the data that rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from towtank.estimate import Interval, Verdict
from towtank.laws import diagnose
from towtank.laws.diagnose import percentiles
from towtank.laws.fit import Backtest
from towtank.laws.profile import Profile, profile
from towtank.laws.rows import Rows
from towtank.laws.table import Floats

if TYPE_CHECKING:
    from towtank.laws.parametric import ParametricLaw

WEAK, REFUSE = 10.0, 1000.0  # factor beyond the data at which a forecast is weak, and refused
WIDE = 2.0  # high / low of a forecast above which it is weak


@dataclass(frozen=True, kw_only=True)
class FormulaFit:
    """A formula fitted to rows.

    Args:
        form: the law.
        rows: the rows it was fitted to.
        inner: inner coefficients (logarithms where the law says so), shape (P,).
        objective: sum of weighted Huber terms at the minimum.
        draws: inner coefficients of the bootstrap, shape (B, P).
        verdict: how far to trust it inside the range of its rows; `judge` adds the extrapolation.
        seed: seed of the bootstrap.
    """

    form: ParametricLaw
    rows: Rows
    inner: Floats = field(repr=False)
    objective: float
    draws: Floats = field(repr=False)
    verdict: Verdict
    seed: int = 0

    @property
    def law(self) -> str:
        """Name of the law."""
        return self.form.name

    @property
    def variables(self) -> dict[str, str]:
        """Column behind each variable."""
        return {name: self.rows.columns[name] for name in self.form.variables}

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd about the rows."""
        return self.rows.warnings

    @property
    def level(self) -> float:
        """Coverage of the intervals."""
        return self.form.level

    @property
    def values(self) -> dict[str, float]:
        """Coefficients without their intervals."""
        return {name: float(v) for name, v in self.form.coefficients(self.inner).items()}

    @property
    def coefficients(self) -> dict[str, Interval]:
        """Coefficients and what is derived from them, with bootstrap intervals; empty if the fit is refused for its rows."""
        if not self.draws.size:
            return {}
        drawn = self.form.coefficients(self.draws)
        found = {name: percentiles(v, drawn[name], self.level) for name, v in self.values.items()}
        for name, formula in self.form.derived.items():
            found[name] = percentiles(float(formula(self.values)), formula(drawn), self.level)
        return found

    @property
    def residuals(self) -> Floats:
        """Residual of each row: log y - log law (over the range of y where the link is "identity")."""
        return self.form.model(self.rows)(self.inner[None])[0][0]

    def predict(
        self, x: float | Mapping[str, float] | None = None, *, scatter: bool = False, **variables: float
    ) -> Interval:
        """What the law says at a point.

        Args:
            x: the value of the only variable, or the values of all by name.
            scatter: whether the interval is for one new run there, with its noise, instead of the law itself.
            **variables: the values of the variables by name, instead of `x`.

        Raises:
            ValueError: if the fit is refused, or a variable is missing or not positive.
        """
        at = self._point(x, variables)
        verdict = self.judge(at)
        if verdict.status == "refuse":
            raise ValueError(f"no prediction of the law {self.law!r}: {verdict.reason}")
        return self.forecast({name: np.array([v]) for name, v in at.items()}, scatter=scatter)[0]

    def forecast(self, x: Mapping[str, Floats], *, scatter: bool = False) -> list[Interval]:
        """Predictions at many points, however far beyond the data; see `predict`."""
        value = self.law_at(self.inner[None], x)[0]
        draws = self.law_at(self.draws, x)
        if scatter:
            noise = self._noise(draws.shape)
            draws = draws * np.exp(noise) if self.form.link == "log" else draws + noise * np.ptp(self.rows.y)
        return [percentiles(float(v), d, self.level) for v, d in zip(value, draws.T, strict=True)]

    def judge(self, x: float | Mapping[str, float] | None = None, **variables: float) -> Verdict:
        """How far to trust a prediction: weak beyond 10 times the data, refused beyond 1000 times.

        Raises:
            ValueError: if a variable is missing or not positive.
        """
        at = self._point(x, variables)
        if not self.draws.size:
            return self.verdict
        verdict = self.verdict
        for name, v in at.items():
            data = self.rows.x[name]
            if not data.min() > 0 or not v > 0:  # a variable that may be 0 has no ratio to its least value
                ratio = v / data.max()
            else:
                ratio = max(v / data.max(), data.min() / v)
            if ratio > WEAK:
                said = f"{name} = {v:g} is {ratio:.3g} times beyond the data ({data.min():g} to {data.max():g})"
                verdict = verdict.worse(Verdict("refuse" if ratio > REFUSE else "weak", said))
        there = self.forecast({name: np.array([v]) for name, v in at.items()})[0]
        if self.form.link == "log" and there.high > WIDE * there.low:
            span = there.high / there.low if there.low > 0 else np.inf
            verdict = verdict.worse(Verdict("weak", f"the interval spans a factor {span:.2g}"))
        return verdict

    def backtest(self, hold_out: str | int | float = "largest") -> Backtest | None:
        """Hide the largest rows, fit the others, predict them; None if the others do not determine the law.

        Args:
            hold_out: "largest" (all rows, or the whole group, of the largest product of the variables), a number of rows,
                or a fraction of the rows.

        Raises:
            ValueError: if `hold_out` is something else.
        """
        return diagnose.backtest(self, hold_out)

    def identifiability(self) -> diagnose.Identifiability:
        """Which coefficients the data cannot separate, and the combination that is determined."""
        return diagnose.identifiability(self)

    def influence(self, most: int = 5) -> dict[str, diagnose.Moved]:
        """How far each coefficient moves without the rows (or groups) that most pull it to one side.

        They are ranked by their pull to first order, then left out together and the law is refitted.

        Broderick, Giordano and Meager 2020, "An automatic finite-sample robustness metric".
        """
        return diagnose.influence(self, most)

    def selection(self) -> tuple[diagnose.Selection, ...]:
        """The coefficients refitted without the rows at either end of each column."""
        return diagnose.selection(self)

    def profile(self, name: str, points: int = 41) -> Profile:
        """Profile of the objective over one coefficient, and the likelihood interval it gives."""
        return profile(self, name, points)

    def law_at(self, inner: Floats, x: Mapping[str, Floats]) -> Floats:
        """The formula with these inner coefficients (M, P) at these points, shape (M, number of points)."""
        c = {name: v[:, None] for name, v in self.form.coefficients(inner).items()}
        with np.errstate(all="ignore"):
            return np.broadcast_to(self.form.value(c, x), (len(inner), next(iter(x.values())).size))

    def _noise(self, shape: tuple[int, ...]) -> Floats:
        known = self.residuals[~self.rows.censored]
        free = max(known.size - self.form.free, 1)
        rng = np.random.default_rng([self.seed, 7])
        return np.asarray(rng.choice(known * np.sqrt(known.size / free), size=shape), dtype=np.float64)

    def _point(self, x: float | Mapping[str, float] | None, variables: Mapping[str, float]) -> dict[str, float]:
        names = list(self.form.variables)
        given = dict(x) if isinstance(x, Mapping) else dict(variables) if x is None else {names[0]: x, **variables}
        if set(given) != set(names):
            raise ValueError(f"expected values for {names}, got {sorted(given)}")
        zero = self.form.zero_allowed
        wrong = [f"{n} = {v}" for n, v in given.items() if not (np.isfinite(v) and (v > 0 or (v == 0 and n in zero)))]
        if wrong:
            raise ValueError(f"expected positive numbers, got {', '.join(wrong)}")
        return {n: float(given[n]) for n in names}


def refused(form: ParametricLaw, rows: Rows, reason: str) -> FormulaFit:
    """A fit that says why there is none."""
    p = len(form.parameters)
    return FormulaFit(
        form=form, rows=rows, inner=np.full(p, np.nan), objective=np.nan, draws=np.empty((0, p)),
        verdict=Verdict("refuse", reason),
    )  # fmt: skip


def judged(fit: FormulaFit) -> FormulaFit:
    """The fit with its verdict."""
    said = diagnose.doubts(fit)
    return replace(fit, verdict=Verdict("weak", "; ".join(said))) if said else fit
