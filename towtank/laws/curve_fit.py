"""A fitted law of loss curves: predictions under any schedule, and which of two schedules ends lower.

Capitals in names of arrays: B draws, R rows, P coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from towtank.estimate import Interval, Verdict
from towtank.laws import curve_diagnose
from towtank.laws.curve_data import Curve, Rates, check_steps
from towtank.laws.curve_groups import Groups, split
from towtank.laws.curve_guard import Envelope, judge_schedule
from towtank.laws.fit import Identifiability
from towtank.laws.profile import Profile
from towtank.laws.schedules import Schedule, as_schedule
from towtank.laws.table import Floats, Ints

if TYPE_CHECKING:
    from towtank.laws.curve_law import CurveLaw


@dataclass(frozen=True, kw_only=True, eq=False)
class Points:
    """The rows of all curves, one curve after the other, with what a law needs of their schedules: each, and joined."""

    curves: tuple[Curve, ...]
    features: tuple[Any, ...]
    joined: Any
    log_loss: Floats

    @property
    def curve(self) -> Ints:
        """Number of the curve of each row, shape (R,)."""
        return np.repeat(np.arange(len(self.curves)), [c.steps.size for c in self.curves])


@dataclass(frozen=True, kw_only=True, eq=False)
class PredictedCurve:
    """A loss curve that a law predicts.

    Args:
        steps: the steps asked for, shape (R,).
        loss: predicted losses, nats, shape (R,).
        low: lower ends of the intervals, each for its own step.
        high: upper ends.
        level: coverage of the intervals.
        verdict: how far to trust the curve.
    """

    steps: Ints
    loss: Floats
    low: Floats
    high: Floats
    level: float
    verdict: Verdict

    def __getitem__(self, i: int) -> Interval:
        """The prediction at one of the steps, by its place."""
        return Interval(float(self.loss[i]), float(self.low[i]), float(self.high[i]), self.level)

    @property
    def final(self) -> Interval:
        """The prediction at the last of the steps."""
        return self[int(np.argmax(self.steps))]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Which of two schedules ends with the lower loss.

    Args:
        first: final loss under the first schedule, with the scatter of one run.
        second: final loss under the second.
        difference: first minus second.
        better: "first" or "second", None where the interval of the difference holds zero or a schedule is refused.
        verdict: how far to trust it.
    """

    first: Interval | None
    second: Interval | None
    difference: Interval | None
    better: str | None
    verdict: Verdict

    def __str__(self) -> str:
        if self.difference is None:
            return f"cannot rank these: {self.verdict.reason}"
        d = self.difference
        said = f"difference of the final losses {d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}] nats"
        return f"the {self.better} ends lower: {said}" if self.better else f"cannot rank these: {said}"


@dataclass(frozen=True, kw_only=True, eq=False)
class CurveFit:
    """A law fitted to loss curves.

    Args:
        form: the law.
        points: the rows it was fitted to.
        inner: inner coefficients (logarithms where the law says so), shape (P,).
        objective: sum of Huber terms of the log residuals at the minimum.
        drawn: inner coefficients of the bootstrap, shape (B, P).
        group: group of each row that the bootstrap reweighted as one, shape (R,).
        verdict: how far to trust it for schedules like the fitted ones; `judge` adds what a schedule adds.
    """

    form: CurveLaw
    points: Points
    inner: Floats = field(repr=False)
    objective: float = np.nan
    drawn: Floats = field(default_factory=lambda: np.empty((0, 0)), repr=False)
    group: Ints = field(default_factory=lambda: np.empty(0, np.int64), repr=False)
    verdict: Verdict = Verdict("ok")

    @property
    def law(self) -> str:
        """Name of the law."""
        return self.form.name

    @property
    def variables(self) -> dict[str, str]:
        """What the law is a function of."""
        return dict(self.form.variables)

    @property
    def level(self) -> float:
        """Coverage of the intervals."""
        return self.form.level

    @property
    def resampled(self) -> str:
        """What the bootstrap reweighted as one: "curves" or "blocks within curves"."""
        return "curves" if int(self.group.max(initial=-1)) + 1 == len(self.points.curves) else "blocks within curves"

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd about the curves."""
        rebuilt = [c.name for c in self.points.curves if c.rebuilt]
        return (
            (f"schedules interpolated between the rows, first rate held before them: {', '.join(rebuilt)}; give schedules=",)
            if rebuilt else ()
        )  # fmt: skip

    @property
    def values(self) -> dict[str, float]:
        """Coefficients without their intervals."""
        return {name: float(v) for name, v in self.form.coefficients(self.inner).items()}

    @property
    def coefficients(self) -> dict[str, Interval]:
        """Coefficients with their intervals; those that the curves do not determine have all that is allowed."""
        if not self.drawn.size:
            return {}
        low, high = self._spread(self.inner, self.drawn, np.eye(self.inner.size))
        floor, ceiling = self.form.box
        lost = self.undetermined
        ends = [
            self.form.coefficients(np.where(lost, bound, np.clip(end, floor, ceiling)))
            for bound, end in ((floor, low), (ceiling, high))
        ]
        return {n: Interval(v, float(ends[0][n]), float(ends[1][n]), self.level) for n, v in self.values.items()}

    @property
    def residuals(self) -> Floats:
        """Logarithm of measured over law at each row, shape (R,)."""
        return self.form.model(self.points)(self.inner[None])[0][0]

    @cached_property
    def undetermined(self) -> Any:
        """Which coefficients no row depends on, shape (P,)."""
        return ~self.form.model(self.points)(self.inner[None])[1][0].any(axis=0)

    @cached_property
    def envelope(self) -> Envelope:
        """The kinds of schedule that were fitted."""
        taken = [self.form.annealed(self.values, f).max() for f in self.points.features]
        return Envelope.of(
            [Schedule(c.schedule.rates[: c.steps[-1] + 1]) for c in self.points.curves], float(max(taken))
        )

    def predict_curve(
        self, steps: Sequence[int] | Ints, lr_of_every_step: Rates, *, size: float = np.nan, scatter: bool = False
    ) -> PredictedCurve:
        """The loss at some steps of a run under any schedule.

        Args:
            steps: steps asked for, counted from 0.
            lr_of_every_step: rate of every step from step 0 on, or a `Schedule`.
            size: parameters of the model, for a law that asks for them.
            scatter: whether the intervals are for one new run, with its misfit, instead of the law itself.

        Raises:
            ValueError: if the fit or the schedule is refused (see `judge`), or a step is outside the schedule.
        """
        schedule = as_schedule(lr_of_every_step)
        verdict = self.judge(schedule, size=size)
        if verdict.status == "refuse":
            raise ValueError(f"no prediction of the law {self.law!r}: {verdict.reason}")
        at = np.atleast_1d(np.asarray(steps))
        if at.ndim != 1 or not at.size or at.dtype.kind not in "iu":
            raise ValueError(f"expected a row of whole steps, got {at.dtype} of shape {at.shape}")
        loss, low, high = self.forecast([schedule], at, size, scatter)
        return PredictedCurve(steps=at, loss=loss, low=low, high=high, level=self.level, verdict=verdict)

    def predict(self, lr_of_every_step: Rates, *, size: float = np.nan, scatter: bool = False) -> Interval:
        """The last loss of a run under any schedule; see `predict_curve`.

        Args:
            lr_of_every_step: rate of every step from step 0 on, or a `Schedule`.
            size: parameters of the model, for a law that asks for them.
            scatter: whether the interval is for one new run.
        """
        schedule = as_schedule(lr_of_every_step)
        return self.predict_curve([len(schedule) - 1], schedule, size=size, scatter=scatter).final

    def compare(self, first: Rates, second: Rates, *, size: float = np.nan) -> Ranking:
        """Which of two schedules ends with the lower loss, if that can be told.

        The interval of the difference holds the error of the coefficients, which both share, and the misfit of the law to
        each of the two runs, taken as independent.

        Args:
            first: rate of every step of one run.
            second: rate of every step of the other.
            size: parameters of the model, for a law that asks for them.
        """
        runs = [as_schedule(first), as_schedule(second)]
        verdict = self.judge(runs[0], size=size).worse(self.judge(runs[1], size=size))
        if verdict.status == "refuse":
            return Ranking(first=None, second=None, difference=None, better=None, verdict=verdict)
        if len(runs[0]) != len(runs[1]):
            verdict = verdict.worse(
                Verdict("weak", f"runs of {len(runs[0])} and {len(runs[1])} steps do not cost the same")
            )
        ends = [self.forecast([run], np.array([len(run) - 1]), size, True) for run in runs]
        ends.append(self.forecast(runs, np.array([len(run) - 1 for run in runs]), size, True))
        one, other, difference = (Interval(float(v[0]), float(a[0]), float(b[0]), self.level) for v, a, b in ends)
        better = None if 0 in difference else "first" if difference.value < 0 else "second"
        return Ranking(first=one, second=other, difference=difference, better=better, verdict=verdict)

    def judge(self, lr_of_every_step: Rates, *, size: float = np.nan) -> Verdict:
        """How far to trust a prediction under a schedule: weak or refused where no fitted run was like it.

        Args:
            lr_of_every_step: rate of every step.
            size: parameters of the model, for a law that asks for them.

        Raises:
            ValueError: if the law asks for a size and there is none.
        """
        if self.verdict.status == "refuse" or not self.drawn.size:
            return self.verdict.worse(Verdict("refuse", "" if self.verdict.reason else "the intervals were not drawn"))
        if self.form.needs_size and not size > 0:
            raise ValueError(f"expected the size of the model, got {size}; give size=")
        schedule = as_schedule(lr_of_every_step)
        last = np.array([len(schedule) - 1])
        taken = self.form.annealed(self.values, self.form.features(schedule, last, size))
        known = [c.size for c in self.points.curves] if self.form.needs_size else []
        return judge_schedule(self.envelope, schedule, float(taken[0]), size, known).worse(self.verdict)

    def backtest(self, hold_out: str = "largest") -> curve_diagnose.CurveBacktest | None:
        """Hide a curve, fit the others, predict it; None if the others do not determine the law.

        Args:
            hold_out: "largest" (the longest run) or the name of a curve.

        Raises:
            ValueError: if there is no such curve.
        """
        return curve_diagnose.backtest(self, hold_out)

    def identifiability(self) -> Identifiability:
        """Which coefficients the curves cannot separate, and the combination that is determined."""
        return curve_diagnose.identifiability(self)

    def influence(self) -> tuple[curve_diagnose.WithoutCurve, ...]:
        """The coefficients without each of the curves, the most influential curve first."""
        return curve_diagnose.influence(self)

    def profile(self, name: str, points: int = 21) -> Profile:
        """The least objective at each value of one coefficient, and the interval it gives.

        Raises:
            ValueError: if the law has no such coefficient.
        """
        return curve_diagnose.profile(self, name, points)

    def judged(self) -> CurveFit:
        """The fit with its verdict."""
        said = curve_diagnose.doubts(self)
        return replace(self, verdict=Verdict("weak", "; ".join(said))) if said else self

    @cached_property
    def linearized(self) -> Groups:
        """The fit to first order, by groups."""
        residual, jacobian = (v[0] for v in self.form.model(self.points)(self.inner[None]))
        low, high = self.form.box
        jacobian = np.where((self.inner <= low) | (self.inner >= high), 0.0, jacobian)
        pull = np.clip(residual, -self.form.delta, self.form.delta)
        return split(jacobian, residual, pull, self.group)

    def interval(self, direction: Floats) -> Interval:
        """Interval of a linear combination of the inner coefficients, shape (P,)."""
        value = np.array([self.inner @ direction])
        low, high = self._spread(value, self.drawn @ direction[:, None], direction[None])
        return Interval(float(value[0]), float(low[0]), float(high[0]), self.level)

    def forecast(self, runs: list[Schedule], at: Ints, size: float, scatter: bool) -> tuple[Floats, Floats, Floats]:
        """Losses at steps of one run, or the difference of one step of each of two, with their intervals; unjudged."""
        features = []
        for run, steps in zip(runs, [at] if len(runs) == 1 else np.split(at, 2), strict=True):
            check_steps("prediction", steps, run)
            features.append(self.form.features(run, steps, size))
        parts = [self.form.evaluate(self.inner, f) for f in features]
        value, slope = parts[0] if len(parts) == 1 else (parts[0][0] - parts[1][0], parts[0][1] - parts[1][1])
        drawn = np.array([self._difference(inner, features) for inner in self.drawn])
        low, high = self._spread(value, drawn, slope)
        if scatter:
            same = len(runs) == 2 and np.array_equal(runs[0].rates, runs[1].rates)
            noise = 0.0 if same else self.linearized.scatter(self.level) * np.sqrt(sum(loss**2 for loss, _ in parts))
            low, high = value - np.hypot(value - low, noise), value + np.hypot(high - value, noise)
        return value, low, high

    def _difference(self, inner: Floats, features: list[Any]) -> Floats:
        with np.errstate(all="ignore"):
            losses = [self.form.evaluate(inner, f)[0] for f in features]
        return losses[0] if len(losses) == 1 else losses[0] - losses[1]

    def _spread(self, value: Floats, drawn: Floats, slope: Floats) -> tuple[Floats, Floats]:
        """Ends of the intervals: the bootstrap's, moved away from the value by the factor for few groups."""
        groups = int(self.group.max()) + 1
        factor = self.linearized.factor(slope, self.level) * np.sqrt((groups + 1) / groups)
        tail = (1 - self.level) / 2
        low, high = np.nanquantile(drawn, [tail, 1 - tail], axis=0)
        return value - factor * np.maximum(value - low, 0.0), value + factor * np.maximum(high - value, 0.0)
