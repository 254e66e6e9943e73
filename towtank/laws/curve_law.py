"""Laws of a whole loss curve under any learning-rate schedule.

Capitals in names of arrays: M problems, R rows, P coefficients, B draws.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from towtank.estimate import Verdict
from towtank.laws.curve_data import Curve, Rates, Rows, read_curves
from towtank.laws.curve_fit import CurveFit, Points
from towtank.laws.law import Law
from towtank.laws.parametric import Parameter
from towtank.laws.schedules import Schedule
from towtank.laws.solve import Model, Solution, solve
from towtank.laws.table import Floats, Ints, Table, column, near

FEW = 5  # curves below which a bootstrap over curves says nothing
BLOCKS = 24  # blocks of neighbouring rows in all, where curves are too few
THINNED = 40  # rows of each curve that decide which starts are worth finishing
DRAWN = 1e-6  # relative gain left at the end of a bootstrap refit: far below its spread
SCREEN, KEPT = 40, 3  # steps from every start; starts then solved to the end


@dataclass(frozen=True, kw_only=True)
class CurveLaw(Law):
    """A law of the loss at every step, fitted by minimising sum huber_delta(log measured - log law) over all rows.

    A leaf gives `features` (what the law needs of a schedule, once), `value` (the law and its derivatives for one set of
    coefficients), `starts`, `annealed`, `parameters` and the texts.

    Args:
        delta: corner of the Huber function, in log loss.
        draws: bootstrap refits behind the intervals.
        level: coverage of the intervals.
    """

    delta: float = 1e-3
    draws: int = 200
    level: float = 0.95

    @property
    @abstractmethod
    def parameters(self) -> tuple[Parameter, ...]:
        """The coefficients, with their bounds."""

    @property
    def needs_size(self) -> bool:
        """Whether the size of each model must be given."""
        return False

    @abstractmethod
    def features(self, schedule: Schedule, steps: Ints, size: float) -> Any:
        """What the law needs of a schedule to know the loss at some steps."""

    @abstractmethod
    def join(self, features: Sequence[Any]) -> Any:
        """The features of the rows of several schedules, one after the other, as those of one."""

    @abstractmethod
    def value(self, c: Mapping[str, float], features: Any) -> tuple[Floats, dict[str, Floats]]:
        """The loss at the steps (R,), and its derivative by each coefficient (R,)."""

    @abstractmethod
    def starts(self, points: Points) -> dict[str, Floats]:
        """Where to start, by name of the coefficient, one flat array each; deterministic."""

    @abstractmethod
    def annealed(self, c: Mapping[str, float], features: Any) -> Floats:
        """The part of the loss, in nats, that the law says the falling rate has taken off (R,)."""

    def rivals(self) -> tuple[CurveLaw, ...]:
        """This law with other settings that a fit cannot well tell from it."""
        return ()

    def combined(self, c: Mapping[str, float]) -> tuple[str, str, str, float] | None:
        """A setting, a coefficient that trades against it, and the combination that rivals agree on, as text and value."""
        return None

    def fit(
        self, table: Table, *, x: Mapping[str, str] | None = None, y: str = "loss", weights: str | None = None,
        seed: int = 0, groups: str = "curve",
    ) -> CurveFit:  # fmt: skip
        """Fit the law to a table with one row per measured loss.

        Args:
            table: columns by name.
            x: columns of `step` and `lr`; None: those names.
            y: column of the losses.
            weights: not known to this law; rows count alike.
            seed: seed of the bootstrap.
            groups: column of the names of the runs.

        Raises:
            ValueError: if a column is missing, weights are given, or a row cannot be used (see `fit_curves`).
        """
        if weights is not None:
            raise ValueError(f"expected no weights, got {weights!r}; the rows of a curve count alike")
        names = {"step": "step", "lr": "lr", **(x or {})}
        if groups not in table:
            raise ValueError(f"expected a column {groups!r}, got {sorted(table)}{near(groups, table)}")
        step, rate, loss = (column(table, name) for name in (names["step"], names["lr"], y))
        curves: dict[str, list[tuple[float, float, float]]] = {}
        for name, *row in zip(table[groups], step, rate, loss, strict=True):
            curves.setdefault(str(name), []).append((row[0], row[1], row[2]))
        return self.fit_curves(curves, seed=seed)

    def fit_curves(
        self, curves: Mapping[str, Rows], *, schedules: Mapping[str, Rates] | None = None,
        sizes: Mapping[str, float] | None = None, seed: int = 0,
    ) -> CurveFit:  # fmt: skip
        """Fit the law to loss curves.

        Intervals come from a Bayesian bootstrap over whole curves, widened for their small number; with fewer than five
        curves over blocks of neighbouring rows of each curve, which leaves the difference from run to run out, and the
        verdict says so.

        Rubin 1981, "The Bayesian bootstrap".

        Args:
            curves: rows (step, rate, loss) of each run, by name.
            schedules: rate of every step of each run. A run not named is interpolated between its rows, which loses the
                warm-up and the sharpness of a drop between two rows.
            sizes: parameters of the model of each run, for a law that asks for them.
            seed: seed of the bootstrap.

        Raises:
            ValueError: if rows, schedules or sizes do not fit together (see `read_curves`), or a size is missing.
        """
        return self.fit_points(self.prepare(read_curves(curves, schedules=schedules, sizes=sizes)), seed=seed)

    def prepare(self, curves: Sequence[Curve]) -> Points:
        """The rows of all curves with what the law needs of their schedules.

        Raises:
            ValueError: if the law asks for sizes and one is missing.
        """
        for curve in curves:
            if self.needs_size and not curve.size > 0:
                raise ValueError(f"curve {curve.name!r}: expected the size of its model, got {curve.size}; give sizes=")
        return self._points(curves, [self.features(c.schedule, c.steps, c.size) for c in curves])

    def without(self, points: Points, hidden: int) -> Points:
        """The points of all curves but one."""
        keep = [i for i in range(len(points.curves)) if i != hidden]
        return self._points([points.curves[i] for i in keep], [points.features[i] for i in keep])

    def _points(self, curves: Sequence[Curve], features: Sequence[Any]) -> Points:
        log_loss = np.log(np.concatenate([c.loss for c in curves]))
        return Points(curves=tuple(curves), features=tuple(features), joined=self.join(features), log_loss=log_loss)

    def fit_points(
        self, points: Points, *, seed: int = 0, start: Floats | None = None, draw: bool = True, judge: bool = True
    ) -> CurveFit:
        """Fit the law to prepared curves.

        Args:
            points: the rows.
            seed: seed of the bootstrap.
            start: inner coefficients to start from; None: a search from the grid of the law.
            draw: whether to draw a bootstrap.
            judge: whether to work out the verdict.
        """
        p = len(self.parameters)
        if points.log_loss.size <= p:
            reason = f"{points.log_loss.size} rows for {p} coefficients: nothing is left to tell the error by"
            return CurveFit(form=self, points=points, inner=np.full(p, np.nan), verdict=Verdict("refuse", reason))
        best = self._solve(points, (self.minimum(points) if start is None else start)[None])
        fit = CurveFit(form=self, points=points, inner=best.theta[0], objective=float(best.objective[0]))
        if not draw:
            return fit
        group = points.curve if len(points.curves) >= FEW else _blocks(points)
        rng = np.random.default_rng([seed, 7])
        weights = rng.dirichlet(np.ones(int(group.max()) + 1), self.draws)[:, group] * (group.max() + 1)
        found = self._solve(points, np.repeat(best.theta, self.draws, axis=0), weights=weights, tol=DRAWN)
        fit = replace(fit, drawn=found.theta, group=group)
        return fit.judged() if judge else fit

    def minimum(self, points: Points) -> Floats:
        """Inner coefficients of the lowest minimum from the grid of starts: all on thinned rows, the best to the end."""
        few = self.prepare([_thin(c) for c in points.curves])
        starts = self.inner(self.starts(few))
        first = self._solve(few, starts, tol=1e-6, max_iter=SCREEN)
        last = self._solve(points, first.theta[np.argsort(first.objective, kind="stable")[:KEPT]])
        return last.theta[int(np.argmin(last.objective))]

    def model(self, points: Points) -> Model:
        """Residuals log measured - log law and their derivatives by the inner (partly logarithmic) coefficients."""

        def evaluate(inner_MP: Floats) -> tuple[Floats, Floats]:
            with np.errstate(
                all="ignore"
            ):  # a step may leave the region where the loss is positive: it is then refused
                losses, slopes = zip(*(self.evaluate(inner, points.joined) for inner in inner_MP), strict=True)
                loss = np.array(losses)
                return points.log_loss - np.log(loss), -np.array(slopes) / loss[..., None]

        return evaluate

    def evaluate(self, inner: Floats, features: Any) -> tuple[Floats, Floats]:
        """The loss (R,) and its derivatives by the inner coefficients (R, P)."""
        c = self.coefficients(inner)
        loss, slopes = self.value(c, features)
        return loss, np.stack([slopes[p.name] * (c[p.name] if p.log else 1.0) for p in self.parameters], axis=1)

    def coefficients(self, inner: Floats) -> dict[str, Any]:
        """Coefficients by name from inner ones (..., P)."""
        return {p.name: np.exp(inner[..., i]) if p.log else inner[..., i] for i, p in enumerate(self.parameters)}

    def inner(self, coefficients: Mapping[str, Any]) -> Floats:
        """Inner coefficients (..., P) from those of the formula, moved into their bounds."""
        values = [np.clip(np.asarray(coefficients[p.name], float), p.low, p.high) for p in self.parameters]
        return np.stack([np.log(v) if p.log else v for v, p in zip(values, self.parameters, strict=True)], axis=-1)

    @property
    def box(self) -> tuple[Floats, Floats]:
        """Bounds of the inner coefficients."""
        return (
            self.inner({p.name: p.low for p in self.parameters}),
            self.inner({p.name: p.high for p in self.parameters}),
        )

    def _solve(self, points: Points, starts: Floats, **settings: Any) -> Solution:
        low, high = self.box
        settings = {"lower": low, "upper": high, "delta": self.delta, **settings}
        return solve(self.model(points), starts, **settings)


def _blocks(points: Points) -> Ints:
    """Neighbouring rows of each curve as groups, about `BLOCKS` in all, at least two rows each."""
    each = -(-BLOCKS // len(points.curves))
    group, first = [], 0
    for curve in points.curves:
        count = max(1, min(each, curve.steps.size // 2))
        group.append(first + np.arange(curve.steps.size) * count // curve.steps.size)
        first += count
    return np.concatenate(group)


def _thin(curve: Curve) -> Curve:
    take = np.unique(np.linspace(0, curve.steps.size - 1, min(THINNED, curve.steps.size)).astype(np.int64))
    return replace(curve, steps=curve.steps[take], loss=curve.loss[take])
