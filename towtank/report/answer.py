"""From a folder of records to the answer: which learning rate, how sure, and did it hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from towtank.estimate import Interval, Verdict
from towtank.laws.fit import Backtest as Backtest

if TYPE_CHECKING:
    from towtank.record.record import Record
    from towtank.report.analysis import Analysis


@dataclass(frozen=True, kw_only=True)
class RatePoint:
    """All runs of one arm, size and learning rate. Diverged runs have no loss and are counted."""

    lr: float
    loss: float | None  # mean held-out loss at the end over the seeds that finished, nats
    stderr: float | None  # standard error of that mean; None with one seed
    runs: int
    diverged: int
    attention_logit_max: float | None  # largest over training, blocks and seeds


@dataclass(frozen=True, kw_only=True)
class SizeResult:
    """One size of one arm."""

    size: float
    parameters: int | None
    rates: tuple[RatePoint, ...]  # ascending learning rate
    optimum: Interval | None  # learning rate; None when it cannot be told
    best_loss: Interval | None
    verdict: Verdict  # of the optimum; when refused: why, and the next grid to try
    sensitivity: float | None  # learning-rate sensitivity, nats
    fitted: tuple[tuple[float, float], ...] = ()  # (lr, loss) along the fitted parabola, for drawing


@dataclass(frozen=True, kw_only=True)
class LawResult:
    """A law of size: its coefficients, a line to draw, how well it would have predicted the largest size we have."""

    name: str  # "learning rate", "best loss", "attention logit at lr 0.0078"
    coefficients: dict[str, Interval]  # e.g. slope (log2 per doubling), intercept
    points: tuple[tuple[float, Interval], ...]  # (size, measured)
    line: tuple[tuple[float, Interval], ...]  # (size, law), to draw, over the fitted sizes and up to the target
    verdict: Verdict
    backtest: Backtest | None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What an arm says about a size: the rate to use, the loss and stability to expect, and how far to trust it."""

    arm: str
    size: float
    lr: Interval | None
    loss: Interval | None
    attention_logit_max: Interval | None  # at the predicted learning rate
    stable: bool | None  # the 1e4 rule; None when no attention logits were recorded
    verdict: Verdict


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The target size was trained at the predicted learning rate and around it."""

    size: float
    predicted: Interval  # learning rate
    measured: Interval | None  # optimum of the verification runs; None if not bracketed
    rates: tuple[RatePoint, ...]
    factor: float | None
    excess_loss: float | None  # loss at the predicted rate minus the best loss of the fit, nats
    held: bool | None  # None: not told (for example not all runs finished)
    reason: str


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Runs that differ only in learning rate, seed and size."""

    name: str  # "sp", or "qk_norm=False" where the value alone says little
    settings: dict[str, object]  # the keys that tell this arm from the others
    sizes: tuple[SizeResult, ...]
    lr_law: LawResult | None
    loss_law: LawResult | None
    attention_laws: tuple[LawResult, ...]  # one per learning rate with enough sizes
    prediction: Prediction | None  # at the target, if there is one
    verification: Verification | None


@dataclass(frozen=True, kw_only=True)
class Rival:
    """One arm of a comparison, at its best learning rate."""

    arm: str
    lr: float
    loss: Interval  # mean over the seeds, nats
    edge: bool  # the best rate was the lowest or the highest that was trained
    difference: Interval | None  # its loss minus that of the best arm, paired by seed; None for the best
    p: float | None  # of no difference, corrected over all pairs of arms; None for the best
    told: bool  # whether the difference is larger than noise
    step_s: float | None  # median seconds of a training step: its share of an ensemble
    state_bytes: float | None  # of the optimizer, per parameter


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms against one another at one size, the best first."""

    size: float
    seeds: tuple[int, ...]  # those all rivals were trained with
    rivals: tuple[Rival, ...]
    told: tuple[tuple[str, str], ...]  # pairs (better, worse) that differ by more than noise
    pairs: int  # that were tested
    fewer: tuple[str, ...] = ()  # arms that were not trained with these seeds at their best learning rate
    lost: tuple[str, ...] = ()  # arms of which no learning rate survived


@dataclass(frozen=True, kw_only=True)
class RunRow:
    """One run in the table of every run."""

    id: str
    arm: str
    stage: str
    size: float
    lr: float
    seed: int
    status: str
    steps: int
    loss: float | None
    attention_logit_max: float | None
    time_s: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Everything the terminal, the JSON and the page show."""

    study: str
    question: str
    sentence: str  # the answer in one sentence, with interval and verdict
    verdict: Verdict
    size_axis: str
    target: float | None
    arms: tuple[Arm, ...]
    runs: tuple[RunRow, ...]
    counts: dict[str, int]  # by status
    fixed: dict[str, object] = field(default_factory=dict)  # what all runs share
    environment: dict[str, object] = field(default_factory=dict)
    corpus: str = ""
    time_s: float = 0.0  # sum over runs
    reproduce: tuple[str, ...] = ()  # commands
    warnings: tuple[str, ...] = ()  # damaged records and the like
    comparison: Comparison | None = None  # which arms differ by more than noise; None with one arm or one seed


def answer(
    records: Sequence[Record],
    *,
    study: str = "",
    question: str = "",
    size_axis: str | None = None,
    target: float | None = None,
    warnings: Sequence[str] = (),
) -> Answer:
    """Everything that can be told from the records of a study.

    Runs are split into arms by every key that varies and is neither learning rate, seed nor size. Laws are fitted to
    the stages `grid` and `refine`; the stage `verify` only judges them. Failed runs are listed and counted, not fitted.

    Args:
        records: the runs, in any order.
        study: its name; empty: that of the records.
        question: what was asked.
        size_axis: the key along which runs grow; None: `width` or `depth` if it varies, else the only integer key that
            does.
        target: the size to predict; None: that of the verification runs, if there are any.
        warnings: what to tell besides, for example damaged records.

    Raises:
        ValueError: if the target is not positive, or no record has the size axis.
    """
    from towtank.report import comparison, grouping, sentence  # here, because they import the structures above

    axis = _axis(records, size_axis)
    groups = grouping.split(records, axis)
    if target is None:
        verified = [r for g in groups for r in g.records if r.stage == "verify"]
        target = max((grouping.size_of(r, axis) for r in verified), default=None)
    analyses = _analyses(records, axis)
    arms = tuple(_arm(analysis, target) for analysis in analyses)
    compared = comparison.compare(analyses)
    runs = tuple(_row(r, g.name, axis) for g in groups for r in g.records)
    names = sorted({r.study for r in records if r.study})
    return Answer(
        study=study or ", ".join(names),
        question=question,
        sentence=sentence.write(arms, axis, target, compared),
        verdict=sentence.main_verdict(arms, target),
        size_axis=axis,
        target=target,
        arms=arms,
        runs=runs,
        counts=dict(sorted(Counter(r.status for r in records).items())),
        fixed=grouping.shared(records),
        environment=grouping.joined(r.environment for r in records),
        corpus=", ".join(sorted({r.corpus for r in records if r.corpus})),
        time_s=sum(r.time_s for r in records),
        warnings=(*warnings, *_own_warnings(records, len(runs))),
        comparison=compared,
    )


def predict(records: Sequence[Record], size: float, *, size_axis: str | None = None) -> tuple[Prediction, ...]:
    """What each arm says about a size, from the stages `grid` and `refine`.

    Args:
        records: the runs, in any order.
        size: the size to predict.
        size_axis: as in `answer`.

    Raises:
        ValueError: if the size is not positive, or no record has the size axis.
    """
    from towtank.report.analysis import predict_at

    return tuple(predict_at(analysis, size) for analysis in _analyses(records, _axis(records, size_axis)))


def bracketed(records: Sequence[Record], *, size_axis: str | None = None) -> bool:
    """Whether the verification runs of every arm tell where the optimum of their size is.

    Args:
        records: the runs, in any order.
        size_axis: as in `answer`.
    """
    checks = [arm.verification for arm in answer(records, size_axis=size_axis).arms]
    return bool(checks) and all(check is not None and check.measured is not None for check in checks)


def _axis(records: Sequence[Record], asked: str | None) -> str:
    from towtank.report import grouping

    if asked is None:
        return grouping.size_axis(records)
    if records and not any(asked in r.config for r in records):
        keys = sorted({key for r in records for key in r.config} - {"lr", "seed"})
        raise ValueError(f"size_axis = {asked!r}: expected a key of the runs, one of {', '.join(keys)}")
    return asked


def _analyses(records: Sequence[Record], axis: str) -> list[Analysis]:
    from towtank.report import analysis, grouping

    return [analysis.analyse(group, axis) for group in grouping.split(records, axis)]


def _arm(analysed: Analysis, target: float | None) -> Arm:
    from towtank.report import analysis, verification

    prediction = None if target is None else analysis.predict_at(analysed, target)
    lr_law, loss_law, attention_laws = analysis.law_results(analysed, target)
    return Arm(
        name=analysed.group.name,
        settings=analysed.group.settings,
        sizes=analysis.size_results(analysed),
        lr_law=lr_law,
        loss_law=loss_law,
        attention_laws=attention_laws,
        prediction=prediction,
        verification=None if prediction is None else verification.verify(analysed, prediction),
    )


def _row(record: Record, arm: str, axis: str) -> RunRow:
    from towtank.report import grouping

    return RunRow(
        id=record.id,
        arm=arm,
        stage=record.stage,
        size=grouping.size_of(record, axis),
        lr=grouping.rate_of(record),
        seed=grouping.seed_of(record),
        status=record.status,
        steps=record.steps,
        loss=grouping.loss_of(record),
        attention_logit_max=grouping.logit_of(record),
        time_s=record.time_s,
        reason=record.reason,
    )


def _own_warnings(records: Sequence[Record], listed: int) -> list[str]:
    failed = sum(r.status in ("failed", "oom") for r in records)
    said = [f"{failed} runs failed or ran out of memory: they are counted, not fitted"] if failed else []
    lost = len(records) - listed
    return said + ([f"{lost} records have no positive learning rate or size and are left out"] if lost else [])
