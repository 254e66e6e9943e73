"""What a law of schedules must not be asked: schedules unlike any that was fitted.

Known abuses of such laws: steps at rate zero keep lowering the predicted loss, so does scaling the schedule up, and a
schedule optimized under the law is absurd. Each leaves the range of the fitted schedules, and is told by that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from towtank.estimate import Verdict
from towtank.laws.schedules import Schedule
from towtank.laws.size_fit import EXTRAPOLATE_REFUSE, EXTRAPOLATE_WEAK

HIGHER = 1.01  # peak over the fitted peaks above which a schedule is refused
LOWER = 2.0  # fitted peaks over the peak above which it is weak
FEEBLE = 0.01  # share of the peak below which a step hardly trains
IDLE = 0.1  # share of the steps that may be feeble beyond the fitted runs
ANNEALED_WEAK, ANNEALED_REFUSE = 1.25, 2.0  # loss taken off by the falling rate, over the fitted runs
RISE = 1.001  # rise of the rate after the peak that counts as one


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """The range of the fitted schedules.

    Args:
        peaks: lowest and highest peak.
        lowest: lowest rate after a warm-up.
        idle: longest stretch of steps at rate zero after the first positive rate.
        feeble: largest share of steps below a hundredth of the peak, warm-up left out.
        travelled: largest sum of the rates.
        annealed: most loss that the falling rate has taken off, nats.
        rises: whether a rate rises again after its peak.
    """

    peaks: tuple[float, float]
    lowest: float
    idle: int
    feeble: float
    travelled: float
    annealed: float
    rises: bool

    @classmethod
    def of(cls, runs: Sequence[Schedule], annealed: float) -> Envelope:
        """The range of some schedules."""
        peaks = [run.peak for run in runs]
        return cls(
            peaks=(min(peaks), max(peaks)), lowest=min(float(_body(run).min()) for run in runs),
            idle=max(_idle(run) for run in runs), feeble=max(_feeble(run) for run in runs),
            travelled=max(float(run.rates.sum()) for run in runs), annealed=annealed, rises=any(_rises(run) for run in runs),
        )  # fmt: skip


def judge_schedule(seen: Envelope, run: Schedule, annealed: float, size: float, sizes: Sequence[float]) -> Verdict:
    """How far a schedule leaves those that were fitted.

    Args:
        seen: the fitted schedules.
        run: the schedule asked for.
        annealed: loss that the law says its falling rate takes off by its end, nats.
        size: parameters of the model.
        sizes: parameters of the fitted models; none: the law knows no size.

    Example:
        >>> from towtank.laws.schedules import constant, linear
        >>> seen = Envelope.of([linear(peak=1.0, steps=100)], annealed=0.1)
        >>> judge_schedule(seen, constant(peak=2.0, steps=100), 0.0, 1.0, []).reason
        'its peak rate 2 is above the fitted 1; larger rates may diverge, which the law does not know'
        >>> judge_schedule(seen, linear(peak=1.0, steps=200), 0.1, 1.0, []).status
        'ok'
    """
    verdict = Verdict("ok")
    for found in (_peak(seen, run), _still(seen, run), _weak_rates(seen, run), _annealing(seen, annealed)):
        verdict = verdict.worse(found)
    verdict = verdict.worse(_beyond("sum of the rates", float(run.rates.sum()), seen.travelled))
    if sizes:
        verdict = verdict.worse(_beyond("size", max(size, min(sizes) ** 2 / size), max(max(sizes), min(sizes))))
    if _rises(run) and not seen.rises:
        verdict = verdict.worse(Verdict("weak", "its rate rises again after the peak, which no fitted one does"))
    return verdict


def _peak(seen: Envelope, run: Schedule) -> Verdict:
    low, high = seen.peaks
    if run.peak > HIGHER * high:
        reason = f"its peak rate {run.peak:g} is above the fitted {high:g}; larger rates may diverge, which the law does not know"
        return Verdict("refuse", reason)
    if run.peak * LOWER < low:
        return Verdict("weak", f"its peak rate {run.peak:g} is far below the fitted {low:g}")
    return Verdict("ok")


def _still(seen: Envelope, run: Schedule) -> Verdict:
    idle = _idle(run)
    if idle <= max(seen.idle, 1):
        return Verdict("ok")
    return Verdict(
        "refuse", f"{idle} steps in a row at rate zero train nothing, yet the law lowers the loss; cut them off"
    )


def _weak_rates(seen: Envelope, run: Schedule) -> Verdict:
    share = _feeble(run)
    if share > seen.feeble + IDLE:
        said = f"{share:.0%} of its steps run below {FEEBLE:.0%} of the peak (fitted runs: at most {seen.feeble:.0%})"
        return Verdict("refuse", f"{said}; the law credits them with a fall of the loss that no run has shown")
    lowest = float(_body(run).min())
    if lowest * LOWER < seen.lowest:
        return Verdict("weak", f"its rate falls to {lowest:g}, the fitted ones to {seen.lowest:g}")
    return Verdict("ok")


def _annealing(seen: Envelope, annealed: float) -> Verdict:
    if annealed <= ANNEALED_WEAK * max(seen.annealed, 0.0) + 1e-12:
        return Verdict("ok")
    status = "refuse" if annealed > ANNEALED_REFUSE * max(seen.annealed, 0.0) else "weak"
    said = (
        f"its falling rate would take off {annealed:.3g} nats, in the fitted runs at most {max(seen.annealed, 0.0):.3g}"
    )
    return Verdict(status, said)


def _beyond(what: str, value: float, fitted: float) -> Verdict:
    ratio = value / fitted
    if ratio <= EXTRAPOLATE_WEAK:
        return Verdict("ok")
    status = "refuse" if ratio > EXTRAPOLATE_REFUSE else "weak"
    return Verdict(status, f"its {what} {value:.3g} is {ratio:.3g} times beyond the fitted {fitted:.3g}")


def _body(run: Schedule) -> np.ndarray:
    return run.rates[run.warmup :]


def _idle(run: Schedule) -> int:
    still = run.rates[int(np.argmax(run.rates > 0)) :] == 0
    edges = np.flatnonzero(np.diff(np.concatenate([[0], still.astype(np.int8), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def _feeble(run: Schedule) -> float:
    return float(np.mean(_body(run) < FEEBLE * run.peak))


def _rises(run: Schedule) -> bool:
    body = _body(run)
    return bool((body[1:] > RISE * np.minimum.accumulate(body)[:-1]).any())
