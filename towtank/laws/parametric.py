"""Laws given by a formula: a leaf is the formula, the bounds of its coefficients and where to start."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from towtank.estimate import Verdict
from towtank.laws.bootstrap import draw_coefficients
from towtank.laws.formula_fit import FormulaFit, judged, refused
from towtank.laws.law import Law
from towtank.laws.rows import Rows, read_rows
from towtank.laws.solve import Model, Solution, solve
from towtank.laws.table import Floats, Table

Values = Mapping[str, Any]  # arrays (real, or complex while differentiating) by name
TINY = 1e-30  # complex step: the derivative is exact to rounding, since nothing is subtracted
STAGES = ((8, 8), (30, 2))  # steps from every start, and how many of the starts then go on
THINNED = 4000  # rows that decide which start is worth finishing where there are more


@dataclass(frozen=True)
class Parameter:
    """A coefficient of a law.

    Args:
        name: its symbol in the formula.
        low: least value.
        high: largest value.
        log: whether it is fitted as its logarithm, which suits positive coefficients of unknown size.
    """

    name: str
    low: float
    high: float
    log: bool = True


def grid(**lists: Sequence[float]) -> dict[str, Floats]:
    """All combinations of the values listed, one flat array per name.

    Example:
        >>> grid(a=[1, 2], b=[5])
        {'a': array([1., 2.]), 'b': array([5., 5.])}
    """
    rows = np.array(list(itertools.product(*lists.values())), dtype=np.float64)
    return {name: rows[:, i] for i, name in enumerate(lists)}


@dataclass(frozen=True, kw_only=True)
class ParametricLaw(Law):
    """A formula y = f(x; coefficients), fitted by minimising sum_r weight_r huber_delta(residual_r).

    The residual is log y - log f, or (y - f) / (max y - min y) where `link` is "identity" (quantities that may be 0 or
    negative). A leaf gives `value`, `starts`, `parameters` and the texts. `value` must be written in operations that take
    complex numbers (+ - * / ** exp log), for its derivatives are taken by complex steps; a leaf for which speed matters
    gives them as `slopes`.

    Squire and Trapp 1998, "Using complex variables to estimate derivatives of real functions".

    Args:
        delta: corner of the Huber function in units of the residual; `numpy.inf` is least squares.
        link: scale of the residual.
        draws: bootstrap refits behind the intervals.
        level: coverage of the intervals.
        fixed: coefficients that are known, by name.
    """

    delta: float = 1e-3
    link: Literal["log", "identity"] = "log"
    draws: int = 400
    level: float = 0.95
    fixed: Mapping[str, float] = field(default_factory=dict)

    parameters: ClassVar[tuple[Parameter, ...]]
    derived: ClassVar[Mapping[str, Callable[[Values], Any]]] = {}
    meaning: ClassVar[Mapping[str, str]] = {}  # of what is derived, in words
    slopes: ClassVar[Any] = None  # a method (c, x) -> (value, derivatives by name) where a leaf gives one
    zero_allowed: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def value(self, c: Values, x: Values) -> Any:
        """The formula: coefficients (broadcast to (M, 1)) and variables (R,) to values (M, R)."""

    @abstractmethod
    def starts(self, x: Mapping[str, Floats], y: Floats) -> dict[str, Floats]:
        """Where to start, by name of the coefficient, one flat array each; deterministic."""

    def fit(
        self,
        table: Table,
        *,
        x: str | Mapping[str, str],
        y: str,
        weights: str | None = None,
        seed: int = 0,
        groups: str | None = None,
        censored: str | Sequence[int] | None = None,
        drop: bool = False,
    ) -> FormulaFit:
        """Fit the law to a table.

        Args:
            table: columns by name.
            x: column of the variable, or of each variable of the law.
            y: column of the measured quantity.
            weights: column of the weight of each row (an inverse variance, or a number of equal runs); None: 1.
            seed: seed of the bootstrap.
            groups: column of labels; rows of one label are one run and are resampled together.
            censored: column that is true, or numbers of the rows, where y is known to be at least the value given: a run
                that diverged.
            drop: leave out rows with missing or infinite numbers instead of refusing them.

        Raises:
            ValueError: if a column is missing, or rows are not finite (unless dropped) or not positive.
        """
        rows = read_rows(
            table, self._columns(x), y, weights=weights, groups=groups, censored=censored, drop=drop,
            positive_y=self.link == "log", zero_allowed=self.zero_allowed,
        )  # fmt: skip
        return self.fit_rows(rows, seed=seed)

    def fit_rows(self, rows: Rows, *, seed: int = 0, judge: bool = True) -> FormulaFit:
        """Fit the law to checked rows; refused, with the reason, where they cannot determine it."""
        reason = self._impossible(rows)
        if reason:
            return refused(self, rows, reason)
        best = self.minimum(rows)
        model, box = self.model(rows), self.box
        drawn = draw_coefficients(
            model, rows, best.theta[0], delta=self.delta, box=box, draws=self.draws, seed=seed, level=self.level
        )
        fit = FormulaFit(
            form=self, rows=rows, inner=best.theta[0], objective=float(best.objective[0]), draws=drawn,
            verdict=Verdict("ok"), seed=seed,
        )  # fmt: skip
        return judged(fit) if judge else fit

    def minimum(self, rows: Rows) -> Solution:
        """The lowest minimum found from the grid of starts."""
        starts = self.inner(self.starts(rows.x, rows.y))
        low, high = self.box
        few = (
            rows if len(rows) <= THINNED else rows.take(_thinned(rows))
        )  # a few of many rows say which minimum is lowest
        box = {"lower": low, "upper": high, "delta": self.delta}
        for steps, kept in STAGES:
            found = solve(self.model(few), starts, weights=few.weight, tol=1e-6, max_iter=steps, **box)
            starts = found.theta[np.argsort(found.objective, kind="stable")[:kept]]
        starts = starts if few is rows else starts[:1]
        last = solve(self.model(rows), starts, weights=rows.weight, **box)
        at = int(np.argmin(last.objective))
        return Solution(
            theta=last.theta[at : at + 1], objective=last.objective[at : at + 1],
            converged=last.converged[at : at + 1], iterations=last.iterations[at : at + 1],
        )  # fmt: skip

    def model(self, rows: Rows) -> Model:
        """Residuals and their derivatives with respect to the inner (partly logarithmic) coefficients."""
        y = np.log(rows.y) if self.link == "log" else rows.y
        scale = 1.0 if self.link == "log" else _spread(rows.y)
        names = [p.name for p in self.parameters]
        censored = rows.censored if rows.censored.any() else None

        def evaluate(inner_MP: Floats) -> tuple[Floats, Floats]:
            with np.errstate(all="ignore"):  # a start may overflow: its objective is then infinite
                value, slopes = self._differentiate(inner_MP, rows.x, names)
                factor = -1 / scale
                residual = (y - value) / scale
                if self.link == "log":
                    residual, factor = y - np.log(value), -1 / value
                jacobian = _columns_last([s * factor for s in slopes])
            if censored is not None:  # y is at least this much: a law that says more is not contradicted
                silent = censored & (residual < 0)
                residual, jacobian = np.where(silent, 0.0, residual), np.where(silent[..., None], 0.0, jacobian)
            return residual, jacobian

        return evaluate

    def coefficients(self, inner: Floats) -> dict[str, Floats]:
        """Coefficients by name from inner ones (..., P)."""
        return {p.name: np.exp(inner[..., i]) if p.log else inner[..., i] for i, p in enumerate(self.parameters)}

    def inner(self, coefficients: Mapping[str, Any]) -> Floats:
        """Inner coefficients (..., P): logarithms where the parameter says so.

        Raises:
            ValueError: if a coefficient is missing.
        """
        missing = [p.name for p in self.parameters if p.name not in coefficients]
        if missing:
            raise ValueError(f"expected coefficients {[p.name for p in self.parameters]}, got none for {missing}")
        values = [np.asarray(coefficients[p.name], dtype=np.float64) for p in self.parameters]
        return np.stack([np.log(v) if p.log else v for v, p in zip(values, self.parameters)], axis=-1)

    @property
    def free(self) -> int:
        """Number of coefficients that are fitted."""
        return len(self.parameters) - len(self.fixed)

    @property
    def box(self) -> tuple[Floats, Floats]:
        """Bounds of the inner coefficients; equal where a coefficient is fixed.

        Raises:
            ValueError: if a coefficient that the law does not have is fixed.
        """
        unknown = set(self.fixed) - {p.name for p in self.parameters}
        if unknown:
            raise ValueError(f"expected to fix some of {[p.name for p in self.parameters]}, got {sorted(unknown)}")
        low, high = (
            {p.name: self.fixed.get(p.name, v) for p, v in zip(self.parameters, ends, strict=True)}
            for ends in ([p.low for p in self.parameters], [p.high for p in self.parameters])
        )
        return self.inner(low), self.inner(high)

    def _differentiate(
        self, inner_MP: Floats, x: Mapping[str, Floats], names: list[str]
    ) -> tuple[Floats, list[Floats]]:
        c = {name: values[:, None] for name, values in self.coefficients(inner_MP).items()}
        chain = [c[p.name] if p.log else 1.0 for p in self.parameters]
        if self.slopes is not None:
            value, analytic = self.slopes(c, x)
            return value, [np.broadcast_to(analytic[n] * d, value.shape) for n, d in zip(names, chain)]
        stepped = [self.value({**c, n: c[n] + 1j * TINY * (d if np.ndim(d) else 1.0)}, x) for n, d in zip(names, chain)]
        return stepped[0].real, [v.imag / TINY for v in stepped]

    def _columns(self, x: str | Mapping[str, str]) -> dict[str, str]:
        names = list(self.variables)
        if isinstance(x, str):
            if len(names) != 1:
                raise ValueError(f"expected a column for each of {names}, got {x!r}; give x={{{names[0]!r}: ..., ...}}")
            return {names[0]: x}
        if set(x) != set(names):
            raise ValueError(f"expected columns for the variables {names}, got {sorted(x)}")
        return {name: x[name] for name in names}

    def _impossible(self, rows: Rows) -> str:
        known = int((~rows.censored).sum())
        if known <= self.free:
            return f"{known} rows for {self.free} coefficients: nothing is left to tell the error by"
        for name, values in rows.x.items():
            if not np.ptp(values):
                return f"one distinct {rows.columns[name]!r}: the law cannot be told from a constant"
        if self.link == "identity" and not np.ptp(rows.y):
            return f"{rows.columns['']!r} is the same in every row"
        return ""


def _columns_last(columns: Sequence[Floats]) -> Floats:
    """Stacked along a last axis whose memory comes first: each column is written and multiplied in one stretch."""
    return np.stack(columns, axis=-2).swapaxes(-1, -2)


def _spread(y: Floats) -> float:
    return float(np.ptp(y)) or 1.0


def _thinned(rows: Rows) -> Any:
    return np.sort(np.random.default_rng(0).choice(len(rows), THINNED, replace=False))
