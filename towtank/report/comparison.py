"""Which arms differ by more than noise: their losses paired by seed, corrected for the number of pairs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from scipy import stats

from towtank.estimate import Interval, finite
from towtank.record.record import Record
from towtank.report.analysis import Analysis
from towtank.report.answer import Comparison, Rival
from towtank.report.grouping import loss_of, rate_of, seed_of, size_of

LEVEL = 0.95
STATE = "state_bytes"  # the signal that holds the optimizer's state per parameter


def compare(analyses: Sequence[Analysis]) -> Comparison | None:
    """Arms against one another at the largest size they all have; None without two arms that share two seeds.

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
    runs = {
        a.group.name: [r for r in a.group.records if r.stage != "verify" and size_of(r, a.axis) == size]
        for a in analyses
    }
    best = {name: b for name, records in runs.items() if (b := _best(records))}
    seeds = _common_seeds(best)
    losses = {name: np.array([b.losses[s] for s in seeds]) for name, b in best.items() if {*seeds} <= {*b.losses}}
    if len(losses) < 2 or len(seeds) < 2:
        return None
    order = sorted(losses, key=lambda name: float(losses[name].mean()))
    pairs = list(itertools.combinations(order, 2))
    p = dict(zip(pairs, holm([_p_value(losses[b] - losses[a]) for a, b in pairs]), strict=True))
    told = tuple(pair for pair in pairs if p[pair] < 1 - LEVEL)

    def rival(name: str) -> Rival:
        pair = order[0], name
        difference = _interval(losses[name] - losses[order[0]]) if pair in p else None
        return Rival(
            arm=name, lr=best[name].lr, loss=_interval(losses[name]), edge=best[name].edge, difference=difference,
            p=p.get(pair), told=pair in told, step_s=_step_s(runs[name]), state_bytes=_state_bytes(runs[name]),
        )  # fmt: skip

    fewer = tuple(name for name in best if name not in losses)
    lost = tuple(name for name in runs if name not in best)
    return Comparison(
        size=size,
        seeds=tuple(seeds),
        rivals=tuple(map(rival, order)),
        told=told,
        pairs=len(pairs),
        fewer=fewer,
        lost=lost,
    )


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


def _common_seeds(best: Mapping[str, _Best]) -> list[int]:
    """The set of seeds, of those that arms were trained with, that most arms hold; means over other seeds say nothing."""
    sets = {frozenset(b.losses) for b in best.values() if len(b.losses) > 1}
    held = {s: sum(s <= {*b.losses} for b in best.values()) for s in sets}
    return sorted(max(held, key=lambda s: (held[s], len(s), sorted(s)))) if held else []


def _p_value(differences: np.ndarray) -> float:
    """Of no difference; differences without scatter are either nothing or certain."""
    if not np.ptp(differences):
        return float(not differences.any())
    return float(np.asarray(stats.ttest_1samp(differences, 0.0))[1])


def _interval(values: np.ndarray) -> Interval:
    """The mean of two values or more with its t interval."""
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
