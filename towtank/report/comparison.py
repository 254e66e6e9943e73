"""Which arms differ by more than noise: their losses paired by seed, corrected for the number of pairs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from scipy import stats

from towtank.estimate import Interval, finite
from towtank.report.analysis import Analysis
from towtank.report.answer import Comparison, Rival
from towtank.report.grouping import loss_of, rate_of, seed_of, size_of
from towtank.study.record import Record

LEVEL = 0.95
STATE = "state_bytes"  # the signal that holds the optimizer's state per parameter


def compare(analyses: Sequence[Analysis]) -> Comparison | None:
    """Arms against one another at the largest size they all have; None with fewer than two arms or without pairs of seeds.

    Each arm is taken at its best trained learning rate and, where the rates on both sides were trained with the same seeds,
    each seed at the vertex of the parabola through the means of the three: arms are then not judged by where their optimum
    lies between two rates of the grid. Every pair of arms is tested by a paired t-test over their common seeds (two-sided);
    the p-values are corrected over all pairs (Holm), for the best arm was chosen by looking.

    Args:
        analyses: the arms; runs of the stage `verify` do not count.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    shared = set.intersection(*({*a.optima} for a in analyses)) if analyses else set()
    if len(analyses) < 2 or not shared:
        return None
    size = max(shared)
    runs = {a.group.name: [r for r in a.group.records if r.stage != "verify" and size_of(r, a.axis) == size] for a in analyses}
    found = {name: best for name, records in runs.items() if (best := _best(records))}
    order = sorted(found, key=lambda name: _average(found[name].losses))
    pairs = list(itertools.combinations(order, 2))
    tests = {(a, b): t for a, b in pairs if (t := _paired(found[a].losses, found[b].losses))}
    if not tests:
        return None
    corrected = dict(zip(tests, holm([p for _, p in tests.values()]), strict=True))
    told = tuple(pair for pair, p in corrected.items() if p < 1 - LEVEL)

    def rival(name: str) -> Rival:
        best, pair = found[name], (order[0], name)
        difference = tests[pair][0] if pair in tests else None
        return Rival(
            arm=name, lr=best.lr, loss=_average(best.losses), interval=_interval([*best.losses.values()]),
            seeds=len(best.losses), edge=best.edge, difference=difference, p=corrected.get(pair),
            told=pair in told, step_s=_step_s(runs[name]), state_bytes=_state_bytes(runs[name]),
        )  # fmt: skip

    lost = tuple(a.group.name for a in analyses if a.group.name not in found)
    return Comparison(size=size, rivals=tuple(map(rival, order)), told=told, pairs=len(tests), without=lost)


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected for their number: the smallest times n, the next times n - 1, ..., none below one before it.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = np.argsort(p, kind="stable")
    raised = np.maximum.accumulate(np.asarray(p)[order] * np.arange(len(p), 0, -1))
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(raised, 1.0)
    return [float(x) for x in corrected]


@dataclass(frozen=True)
class _Best:
    """A learning rate, the loss of each seed there, and whether it lies at an edge of the rates that were trained."""

    lr: float
    losses: dict[int, float]
    edge: bool


def _best(records: Sequence[Record]) -> _Best | None:
    """The best learning rate and each seed's loss there, of the rates with most seeds and none lost."""
    rates: dict[float, dict[int, float | None]] = {}
    for r in records:
        rates.setdefault(rate_of(r), {})[seed_of(r)] = loss_of(r)
    done = {lr: {k: v for k, v in found.items() if v is not None} for lr, found in rates.items()}
    whole = {lr: found for lr, found in done.items() if len(found) == len(rates[lr])}
    if not whole:
        return None
    most = max(map(len, whole.values()))
    means = {lr: _average(found) for lr, found in whole.items() if len(found) == most}
    best = min(means, key=lambda lr: means[lr])
    every = sorted(rates)
    near = every[max(0, every.index(best) - 1) : every.index(best) + 2]
    if len(near) < 3 or any(whole.get(lr, {}).keys() != whole[best].keys() for lr in near):
        return _Best(best, whole[best], edge=len(near) < 3)
    lr, weights = _vertex(np.log2(near), [means[x] for x in near])
    losses = {seed: float(np.dot(weights, [whole[x][seed] for x in near])) for seed in whole[best]}
    return _Best(lr, losses, edge=False)


def _vertex(x: Sequence[float] | np.ndarray, y: Sequence[float]) -> tuple[float, np.ndarray]:
    """Learning rate at the vertex of the parabola through three points, the middle one lowest, and the points' weights there."""
    a, b, c = x
    curvature, slope = np.polyfit(np.asarray(x) - b, y, 2)[:2]
    v = b - slope / (2 * curvature) if curvature > 0 else b
    weights = [(v - q) * (v - r) / ((p - q) * (p - r)) for p, q, r in ((a, b, c), (b, a, c), (c, a, b))]
    return float(2.0**v), np.array(weights)


def _paired(first: dict[int, float], second: dict[int, float]) -> tuple[Interval, float] | None:
    """Mean of second minus first over common seeds with its t interval, and the p-value of no difference."""
    seeds = first.keys() & second.keys()
    if len(seeds) < 2:
        return None
    d = [second[s] - first[s] for s in sorted(seeds)]
    interval = _interval(d)
    assert interval is not None
    return interval, float(stats.ttest_1samp(d, 0.0).pvalue) if np.ptp(d) else float(not any(d))


def _interval(values: Sequence[float]) -> Interval | None:
    """The mean of two values or more with its t interval."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half, LEVEL)


def _average(losses: Mapping[int, float]) -> float:
    return float(np.mean([*losses.values()]))


def _step_s(records: Sequence[Record]) -> float | None:
    """Median seconds of a step; runs that only share another's training took none."""
    taken = [r.time_s / r.steps for r in records if r.steps and r.time_s > 0]
    return median(taken) if taken else None


def _state_bytes(records: Sequence[Record]) -> float | None:
    seen = [v for r in records for _, v in r.signals.get(STATE, [])[:1] if v is not None and finite(v)]
    return median(seen) if seen else None
