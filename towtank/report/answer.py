"""From a folder of records to the answer: which learning rate, how sure, and did it hold."""

from __future__ import annotations

from dataclasses import dataclass, field

from towtank.estimate import Interval, Verdict


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
class Backtest:
    """The largest size was hidden and predicted from the others."""

    size: float
    predicted: Interval
    measured: Interval
    factor: float  # max(predicted/measured, measured/predicted)
    hit: bool  # the interval of the prediction contains the measured value


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
