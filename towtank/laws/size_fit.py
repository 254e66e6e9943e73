"""The law of one size fitted to points: polynomials in log2-log2, how sure, and how it would have done on the largest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from towtank.estimate import Interval, Verdict
from towtank.laws.diagnose import confounded, ratio
from towtank.laws.fit import Backtest, HeldOut, Identifiability, Moved, allowed_misses, hidden_count
from towtank.laws.loglog import Measured, Polynomial, fit_polynomial, intervals
from towtank.laws.table import Floats

EXTRAPOLATE_WEAK, EXTRAPOLATE_REFUSE = 4.0, 16.0  # ratio to the nearest fitted size
BIRGE_WEAK = 2.0
WIDE_INTERVAL = 4.0  # high / low
NAMES = ("intercept", "slope", "curvature")


@dataclass(frozen=True, kw_only=True)
class SizeFit:
    """A law of size fitted to points, in log2-log2 coordinates.

    Args:
        law: what the law is of.
        measured: the points, refused ones included.
        verdict: how far to trust it inside the range of its points; `judge` adds the extrapolation.
        coefficients: `slope` in octaves per doubling of the size (of the line), `intercept` = log2 at size 1, and with
            a quadratic its `curvature`.
        residuals: log2 of measured over law at each fitted point, octaves.
        level: coverage of the intervals.

    Example:
        >>> points = [Measured(size=w, value=3.0 / w) for w in (32, 64, 128, 256)]
        >>> fit = fit_points(points, law="learning rate")
        >>> round(fit.predict(512).value * 512, 6), fit.backtest().hit
        (3.0, True)
    """

    law: str
    measured: tuple[Measured, ...]
    verdict: Verdict
    coefficients: dict[str, Interval] = field(default_factory=dict)
    residuals: tuple[float, ...] = ()
    level: float = 0.95
    polynomials: tuple[Polynomial, ...] = field(default=(), repr=False, compare=False)

    @property
    def used(self) -> tuple[Measured, ...]:
        """The points that were fitted, by size."""
        return tuple(p for p in self.measured if p.verdict.status != "refuse")

    def predict(self, size: float) -> Interval:
        """The quantity at a size: pooled over the polynomials, with the scatter of a new point.

        Raises:
            ValueError: if the law is refused, or refuses this size (see `judge`).
        """
        reason = self.refuses(size)
        if reason:
            raise ValueError(f"no prediction of the {self.law}: {reason}")
        return self._at([size])[0]

    def predict_many(self, sizes: Sequence[float]) -> tuple[tuple[float, Interval], ...]:
        """(size, prediction) at each size, those that the law refuses left out."""
        told = [s for s in sizes if not self.refuses(s)]
        return tuple(zip(told, self._at(told), strict=True)) if told else ()

    def refuses(self, size: float) -> str:
        """Why there is no prediction at a size; empty if there is one.

        Raises:
            ValueError: if the size is not positive.
        """
        if not (np.isfinite(size) and size > 0):
            raise ValueError(f"expected a positive size, got {size}")
        if self.verdict.status == "refuse":
            return self.verdict.reason
        ratio = self._beyond(size)
        if ratio <= EXTRAPOLATE_REFUSE:
            return ""
        low, high = self.used[0].size, self.used[-1].size
        return (
            f"{size:g} is {ratio:.3g} times beyond the fitted sizes {low:g} to {high:g}; "
            f"measure a size within a factor {EXTRAPOLATE_REFUSE:g} of it"
        )

    def judge(self, size: float) -> Verdict:
        """How far to trust a prediction at a size: weak beyond 4 times, refused beyond 16 times the fitted sizes."""
        reason = self.refuses(size)
        if reason:
            return Verdict("refuse", reason)
        verdict, ratio, there = self.verdict, self._beyond(size), self._at([size])[0]
        if ratio > EXTRAPOLATE_WEAK:
            verdict = verdict.worse(Verdict("weak", f"{size:g} is {ratio:.3g} times beyond the fitted sizes"))
        if there.high > WIDE_INTERVAL * there.low:
            verdict = verdict.worse(Verdict("weak", f"the interval spans a factor {there.high / there.low:.2g}"))
        return verdict

    def backtest(self, hold_out: str | int | float = "largest") -> Backtest | None:
        """Hide the largest sizes, fit the others, predict them; None if what is left is no law (one size, or no noise).

        Args:
            hold_out: "largest" (one size), a number of sizes, or a fraction of them.

        Raises:
            ValueError: if `hold_out` is something else.
        """
        used = self.used
        count = 1 if hold_out == "largest" else hidden_count(hold_out, len(used), "sizes")
        rest, hidden = used[:-count], used[-count:][::-1]
        if len(rest) < 2 or (len(rest) == 2 and not all(p.log2_draws.size for p in rest)):
            return None
        degrees = tuple(p.value.size - 1 for p in self.polynomials if p.value.size <= len(rest))
        kept = _fit(rest, degrees, self.law, self.level, seed=0)
        return _backtest(kept._at([p.size for p in hidden]), hidden, len(used), self.level)

    def identifiability(self) -> Identifiability:
        """Which coefficients the sizes cannot separate, and the combination that is determined."""
        if not self.coefficients:
            return Identifiability((), ())
        named = _named(self.polynomials)
        values, draws = (np.stack([pair[i] for pair in named.values()], axis=-1) for i in (0, 1))
        return Identifiability(confounded(list(named), list(named), values, draws, self.level), ())

    def influence(self) -> dict[str, Moved]:
        """How far each coefficient moves without the size that moves it most; empty where too few sizes would be left.

        The rows named are places in `used`.
        """
        used, degrees = self.used, tuple(p.value.size - 1 for p in self.polynomials)
        if not self.coefficients or len(used) - 1 <= max(degrees):
            return {}
        rest = [_fit(used[:i] + used[i + 1 :], degrees, self.law, self.level, seed=0) for i in range(len(used))]
        without = [{name: v.value for name, v in fit.coefficients.items()} for fit in rest]
        moved = {}
        for name, v in self.coefficients.items():
            at = max(range(len(used)), key=lambda i: abs(without[i][name] - v.value))
            moved[name] = Moved((at,), v.value, without[at], ratio(without[at][name], v.value))
        return moved

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd about the points; what was left out is in the verdict."""
        return ()

    def crossing(self, threshold: float, *, falling: bool = False) -> Interval | None:
        """The size at which a growing law reaches a threshold; None if it does not within a factor 1024 of its points.

        The upper end is infinite where some draws never reach it.

        Args:
            threshold: value to be reached.
            falling: whether the law is asked where it first lies at or below the threshold instead.
        """
        sign = -1.0 if falling else 1.0
        sizes = np.geomspace(self.used[0].size, self.used[-1].size * 1024, 200)
        target = sign * np.log2(threshold)
        value = sign * np.mean([p.at(sizes)[0] for p in self.polynomials], axis=0)
        if not (value >= target).any():
            return None
        at = float(sizes[np.argmax(value >= target)])
        reached = sign * self._log2(sizes)[1] >= target
        first = np.where(reached.any(axis=1), sizes[np.argmax(reached, axis=1)], np.inf)
        tail = (1 - self.level) / 2
        low, high = np.quantile(first, [tail, 1 - tail], method="inverted_cdf")
        return Interval(at, float(min(low, at)), float(max(high, at)), self.level)

    def _beyond(self, size: float) -> float:
        return max(self.used[0].size / size, size / self.used[-1].size, 1.0)

    def _log2(self, sizes: Floats) -> tuple[Floats, Floats]:
        parts = [p.at(sizes) for p in self.polynomials]
        return np.mean([v for v, _ in parts], axis=0), np.concatenate([d for _, d in parts])

    def _at(self, sizes: Sequence[float]) -> list[Interval]:
        value, draws = self._log2(np.asarray(sizes, dtype=np.float64))
        return intervals(value, draws, self.level)


def fit_points(
    points: Sequence[Measured], *, law: str, degrees: tuple[int, ...] = (1,), level: float = 0.95, seed: int = 0
) -> SizeFit:
    """Fit a law to measured points; the verdict says what is missing.

    Args:
        points: one per size; refused ones are left out of the fit and named in the verdict.
        law: what the law is of, for messages.
        degrees: polynomials to pool; a degree needs one point more than its number.
        level: coverage of the intervals.
        seed: seed of the draws.
    """
    points = tuple(sorted(points, key=lambda p: p.size))
    used = [p for p in points if p.verdict.status != "refuse"]
    lost = [f"{p.size:g}: {p.verdict.reason}" for p in points if p.verdict.status == "refuse"]
    if len(used) < 2:
        reason = f"{len(used)} usable size{'' if len(used) == 1 else 's'}, and a law needs 2"
        return SizeFit(law=law, measured=points, verdict=Verdict("refuse", "; ".join([reason, *lost])), level=level)
    if len(used) == 2 and not all(p.log2_draws.size for p in used):
        return SizeFit(
            law=law,
            measured=points,
            level=level,
            verdict=Verdict("refuse", "two sizes without replicates: nothing is known of the noise"),
        )
    fit = _fit(used, tuple(d for d in degrees if d < len(used)), law, level, seed)
    said = _doubts(fit, max(degrees)) + [f"left out {text}" for text in lost]
    return replace(fit, measured=points, verdict=Verdict("weak", "; ".join(said)) if said else Verdict("ok"))


def _fit(used: Sequence[Measured], degrees: tuple[int, ...], law: str, level: float, seed: int) -> SizeFit:
    polynomials = tuple(fit_polynomial(used, d, seed=seed) for d in degrees)
    coefficients = {}
    for name, (value, draw) in _named(polynomials).items():
        low, high = np.quantile(draw, [(1 - level) / 2, (1 + level) / 2])
        coefficients[name] = Interval(float(value), float(min(low, value)), float(max(high, value)), level)
    fit = SizeFit(
        law=law,
        measured=tuple(used),
        verdict=Verdict("ok"),
        coefficients=coefficients,
        level=level,
        polynomials=polynomials,
    )
    at, _ = fit._log2(np.array([p.size for p in used], dtype=np.float64))
    return replace(fit, residuals=tuple(float(r) for r in np.log2([p.value for p in used]) - at))


def _named(polynomials: Sequence[Polynomial]) -> dict[str, tuple[Floats, Floats]]:
    """Each coefficient with its draws: the line from size 1 on, and the curvature of a quadratic."""
    line = polynomials[0]
    power = np.array([[1.0, -line.origin], [0.0, 1.0]])  # from (at the mean size, slope) to (at size 1, slope)
    values, draws = [*(power @ line.value)], [*(power @ line.draws.T)]
    if len(polynomials) > 1:
        values, draws = [*values, polynomials[1].value[2]], [*draws, polynomials[1].draws[:, 2]]
    return {name: (value, draw) for name, value, draw in zip(NAMES, values, draws, strict=False)}


def _doubts(fit: SizeFit, degree: int) -> list[str]:
    weak: dict[str, list[str]] = {}
    for p in fit.used:
        if p.verdict.status == "weak":
            weak.setdefault(p.verdict.reason, []).append(f"{p.size:g}")
    said = [f"{', '.join(sizes)}: {reason}" for reason, sizes in weak.items()]
    sizes = len(fit.used)
    if sizes < degree + 2:
        said.append(f"{sizes} sizes leave a {'quadratic' if degree == 2 and sizes > 2 else 'line'} no check")
    if fit.polynomials[-1].ratio > BIRGE_WEAK:
        said.append(f"the points scatter {fit.polynomials[-1].ratio:.2g} times more than their noise")
    test = fit.backtest()
    if test is not None and not test.hit:
        said.append(f"hiding size {test.size:g} and predicting it missed by a factor {test.factor:.2f}")
    return said


def _backtest(predicted: Sequence[Interval], hidden: Sequence[Measured], used: int, level: float) -> Backtest:
    points = tuple(
        HeldOut(x={"size": float(m.size)}, predicted=p, measured=m.value, row=used - 1 - i)
        for i, (p, m) in enumerate(zip(predicted, hidden, strict=True))
    )
    return Backtest(
        size=hidden[0].size,
        predicted=predicted[0],
        measured=hidden[0].interval(level),
        factor=max(p.factor for p in points),
        hit=sum(not p.hit for p in points) <= allowed_misses(len(points), level),
        points=points,
    )
