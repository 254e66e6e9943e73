"""One arm: the optimum of each size, the laws of size, and what they predict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from towtank.estimate import Interval, Verdict, finite
from towtank.laws.law import PowerLaw, loss_point, rate_point, spread_alike
from towtank.laws.levels import Noise, pool
from towtank.laws.optimum import Optimum, find_optimum
from towtank.laws.sensitivity import lr_sensitivity
from towtank.laws.size_fit import SizeFit, fit_points
from towtank.record.record import Record
from towtank.report.answer import LawResult, Prediction, RatePoint, SizeResult
from towtank.report.grouping import FITTED_STATUS, Group, logit_of, loss_of, rate_of, seed_of, size_of

ATTENTION_LIMIT = 1e4  # above it training was seen to fail: Wortsman et al. 2023, section 3.3
LINE_POINTS = 13
SAME_RATE = 0.01  # octaves


@dataclass(frozen=True)
class Analysis:
    """An arm with its fits: what the laws say, before it is laid out for display."""

    group: Group
    axis: str
    optima: dict[float, Optimum]
    lr_fit: SizeFit
    loss_fit: SizeFit
    attention: dict[float, SizeFit]

    @property
    def noise(self) -> Noise | None:
        """Run-to-run variance near the optimum, over all sizes."""
        return pool(o.noise for o in self.optima.values())


def analyse(group: Group, axis: str) -> Analysis:
    """SizeFit everything that is fitted to an arm; runs of the stage `verify` are not."""
    records = [r for r in group.records if r.stage != "verify" and r.status in FITTED_STATUS]
    by_size = {s: [r for r in records if size_of(r, axis) == s] for s in sorted({size_of(r, axis) for r in records})}
    optima = spread_alike({s: optimum_of(rows, random_seed=i) for i, (s, rows) in enumerate(by_size.items())})
    lr_fit = fit_points([rate_point(s, o) for s, o in optima.items()], law="learning rate")
    loss_fit = fit_points([loss_point(s, o) for s, o in optima.items()], law="best loss", degrees=(1, 2))
    return Analysis(group, axis, optima, lr_fit, loss_fit, _attention_fits(records, axis))


def optimum_of(records: Sequence[Record], *, noise: Noise | None = None, random_seed: int = 0) -> Optimum:
    """The optimum of runs of one arm and size."""
    return find_optimum(
        [rate_of(r) for r in records],
        [loss_of(r) for r in records],
        [seed_of(r) for r in records],
        noise=noise,
        random_seed=random_seed,
    )


def size_results(analysis: Analysis) -> tuple[SizeResult, ...]:
    """Each size of the arm, laid out."""
    return tuple(_size_result(analysis, size, optimum) for size, optimum in analysis.optima.items())


def rate_points(records: Sequence[Record]) -> tuple[RatePoint, ...]:
    """Runs by learning rate; those that failed are left out."""
    done = [r for r in records if r.status in FITTED_STATUS]
    return tuple(_rate_point(lr, [r for r in done if rate_of(r) == lr]) for lr in sorted({rate_of(r) for r in done}))


def predict_at(analysis: Analysis, size: float) -> Prediction:
    """What an arm says about a size."""
    verdict = analysis.lr_fit.judge(size)
    if verdict.status == "refuse":
        return Prediction(
            arm=analysis.group.name,
            size=size,
            lr=None,
            loss=None,
            attention_logit_max=None,
            stable=None,
            verdict=verdict,
        )
    lr = analysis.lr_fit.predict(size)
    logit = _logit_at(analysis, size, lr.value)
    stable = None if logit is None else logit.high < ATTENTION_LIMIT
    if stable is False:
        verdict = verdict.worse(Verdict("weak", f"the largest attention logit may pass {ATTENTION_LIMIT:.0e} there"))
    loss = None if analysis.loss_fit.refuses(size) else analysis.loss_fit.predict(size)
    return Prediction(
        arm=analysis.group.name, size=size, lr=lr, loss=loss, attention_logit_max=logit, stable=stable, verdict=verdict
    )


def law_results(analysis: Analysis, target: float | None) -> tuple[LawResult, LawResult, tuple[LawResult, ...]]:
    """The laws of an arm laid out: learning rate, best loss, attention logit at each learning rate."""
    attention = tuple(_law_result(fit, target, note=_crossing(analysis.axis)) for fit in analysis.attention.values())
    return _law_result(analysis.lr_fit, target), _law_result(analysis.loss_fit, target), attention


def _law_result(fit: SizeFit, target: float | None, note: Callable[[SizeFit], str] = lambda fit: "") -> LawResult:
    points, line, backtest = (), (), None
    if fit.coefficients:
        points = tuple((p.size, p.interval(fit.level)) for p in fit.used)
        sizes = np.geomspace(min(points[0][0], target or np.inf), max(points[-1][0], target or 0), LINE_POINTS)
        drawn = {float(f"{s:.4g}") for s in sizes} | {s for s, _ in points} | ({float(target)} if target else set())
        line = fit.predict_many(sorted(drawn))
        backtest = fit.backtest()
    said = note(fit)
    verdict = Verdict(fit.verdict.status, "; ".join(t for t in (fit.verdict.reason, said) if t))
    return LawResult(
        name=fit.law, coefficients=dict(fit.coefficients), points=points, line=line, verdict=verdict, backtest=backtest
    )


def _crossing(axis: str) -> Callable[[SizeFit], str]:
    def note(fit: SizeFit) -> str:
        at = fit.crossing(ATTENTION_LIMIT)
        if at is None:
            return ""
        high = f"{at.high:.0f}" if np.isfinite(at.high) else "never"
        return f"reaches {ATTENTION_LIMIT:.0e} near {axis} {at.value:.0f} [{at.low:.0f}, {high}]"

    return note


def _size_result(analysis: Analysis, size: float, optimum: Optimum) -> SizeResult:
    records = [r for r in analysis.group.records if r.stage != "verify" and size_of(r, analysis.axis) == size]
    parameters = {r.parameters for r in records if r.parameters is not None}
    return SizeResult(
        size=size,
        parameters=parameters.pop() if len(parameters) == 1 else None,
        rates=rate_points(records),
        optimum=optimum.lr,
        best_loss=optimum.loss,
        verdict=optimum.verdict,
        sensitivity=_sensitivity(records),
        fitted=_drawn(optimum),
    )


def _rate_point(lr: float, records: Sequence[Record]) -> RatePoint:
    losses = [loss for r in records if (loss := loss_of(r)) is not None]
    logits = [logit for r in records if (logit := logit_of(r)) is not None]
    stderr = float(np.std(losses, ddof=1) / np.sqrt(len(losses))) if len(losses) > 1 else None
    return RatePoint(
        lr=lr,
        loss=float(np.mean(losses)) if losses else None,
        stderr=stderr,
        runs=len(records),
        diverged=len(records) - len(losses),
        attention_logit_max=max(logits, default=None),
    )


def _sensitivity(records: Sequence[Record]) -> float | None:
    """Mean of the published number over the seeds that ran the whole grid."""
    grid = [r for r in records if r.stage == "grid" and r.status in FITTED_STATUS]
    rates = sorted({rate_of(r) for r in grid})
    initial = [r.loss.initial for r in grid if r.loss.initial is not None and finite(r.loss.initial)]
    if len(rates) < 2 or not initial or all(loss_of(r) is None for r in grid):
        return None
    seeds = sorted({seed_of(r) for r in grid})
    curves = [{rate_of(r): loss_of(r) for r in grid if seed_of(r) == seed} for seed in seeds]
    whole = [lr_sensitivity([c[lr] for lr in rates], float(np.mean(initial))) for c in curves if len(c) == len(rates)]
    return float(np.mean(whole)) if whole else None


def _drawn(optimum: Optimum) -> tuple[tuple[float, float], ...]:
    if optimum.lr is None or optimum.loss is None or optimum.curvature is None or optimum.span is None:
        return ()
    best = np.log2(optimum.lr.value)
    x = np.linspace(max(np.log2(optimum.span[0]), best - 1.5), min(np.log2(optimum.span[1]), best + 1.5), 31)
    return tuple((float(2.0**v), float(optimum.loss.value + optimum.curvature * (v - best) ** 2)) for v in x)


def _attention_fits(records: Sequence[Record], axis: str) -> dict[float, SizeFit]:
    fits = {}
    for lr in sorted({rate_of(r) for r in records}):
        rows = [r for r in records if rate_of(r) == lr and logit_of(r) is not None]
        logit = [logit_of(r) if r.status == "done" and (logit_of(r) or 0) > 0 else None for r in rows]
        table = {axis: [size_of(r, axis) for r in rows], "logit": logit}
        fit = PowerLaw(name=f"attention logit at lr {lr:.3g}", degrees=(1, 2)).fit(table, x=axis, y="logit")
        if fit.verdict.status != "refuse":
            fits[lr] = fit
    return fits


def _logit_at(analysis: Analysis, size: float, lr: float) -> Interval | None:
    """Attention logit at a size and rate, between the laws of the two nearest rates (log-log); None outside of them."""
    fits = {r: f for r, f in analysis.attention.items() if not f.refuses(size)}
    low = max((r for r in fits if r <= lr * 2**SAME_RATE), default=None)
    high = min((r for r in fits if r >= lr / 2**SAME_RATE), default=None)
    if low is None or high is None:
        return None
    a, b = fits[low].predict(size), fits[high].predict(size)
    share = 0.0 if low == high else float(np.clip(np.log(lr / low) / np.log(high / low), 0, 1))
    ends = (a.value, b.value), (a.low, b.low), (a.high, b.high)
    value, bottom, top = (x ** (1 - share) * y**share for x, y in ends)
    return Interval(value, min(bottom, value), max(top, value), a.level)
