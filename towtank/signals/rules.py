"""What raises an alarm: limits on readings, crossed or forecast to be crossed, each with its source and its remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from towtank.laws.stability import EPSILON_MARGIN, LOGIT_LIMIT
from towtank.signals.alarm import Alarm, Severity
from towtank.signals.checks import broken_examples
from towtank.signals.forecast import crossing
from towtank.signals.history import History
from towtank.signals.step import Step
from towtank.signals.trend import early_peak

Rule = Callable[[History, Step], Iterable[Alarm] | None]  # runs when a step's readings are in the history


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A reading that must stay on one side of a limit.

    It is an alarm when the last `persist` readings are all beyond the limit, and a forecast of one (severity "warning", with a lead)
    when the trend of the readings reaches it soon, see `crossing`.

    Args:
        name: of the alarm.
        key: of the reading; every key below it where it ends in a slash, the rest being the subject.
        limit: in the unit of the reading.
        message: with {value}, {limit} and {subject} to fill in.
        suggestion: the remedy.
        source: of the rule.
        falling: whether readings below the limit are the bad ones.
        forecast: whether trends count; the readings must be positive.
        persist: readings beyond the limit in a row.
        severity: once it is crossed.
        unit: what is forecast, in words: "attention logits".

    Raises:
        ValueError: if the message names anything else.

    Example:
        >>> rule = Limit(name="hot", key="t", limit=10.0, message="at {value}, above {limit}", suggestion="cool", source="us")
        >>> history = History(); history.add(3, {"t": 12.0})
        >>> [str(alarm) for alarm in rule(history, Step(number=3, loss=torch.zeros(()), model=torch.nn.Identity()))]
        ['step 3: hot: at 12, above 10; cool']
    """

    name: str
    key: str
    limit: float
    message: str
    suggestion: str
    source: str
    falling: bool = False
    forecast: bool = False
    persist: int = 1
    severity: Severity = "critical"
    unit: str = ""

    def __post_init__(self) -> None:
        try:
            self.message.format(value="", limit="", subject="")
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"expected a message with {{value}}, {{limit}} and {{subject}} to fill in, got {self.message!r}"
            ) from error

    def __call__(self, history: History, step: Step) -> Iterator[Alarm]:
        """The alarms of a step."""
        for key in list(history.updated(step.number, self.key)):
            subject = key.removeprefix(self.key) if self.key.endswith("/") else ""
            recent = history.tail(key, self.persist)
            if len(recent) == self.persist and all(self._beyond(x) for x in recent):
                yield self._alarm(step, key, recent[-1], subject)
            elif self.forecast:
                yield from self._forecast(history, step, key, subject)

    def doubtful(self, history: History) -> bool:
        """Whether the newest reading is beyond the limit, but not yet `persist` of them."""
        recent = history.tail(self.key, self.persist)
        beyond = [self._beyond(x) for x in recent]
        return bool(beyond) and beyond[-1] and not (len(beyond) == self.persist and all(beyond))

    def _beyond(self, x: float) -> bool:
        return x < self.limit if self.falling else x > self.limit

    def _alarm(self, step: Step, key: str, value: float, subject: str) -> Alarm:
        said = self.message.format(value=f"{value:.3g}", limit=f"{self.limit:g}", subject=subject)
        return Alarm(
            name=self.name, step=step.number, message=said, source=self.source, suggestion=self.suggestion,
            severity=self.severity, key=key, value=value, limit=self.limit, subject=subject,
        )  # fmt: skip

    def _forecast(self, history: History, step: Step, key: str, subject: str) -> Iterator[Alarm]:
        steps, values = history[key]
        lead = crossing(steps, values, self.limit, falling=self.falling)
        if lead is None:
            return
        of = f" of {subject}" if subject else ""
        yield Alarm(
            name=self.name, step=step.number, source=self.source, suggestion=self.suggestion, key=key, value=float(values[-1]),
            limit=self.limit, subject=subject, lead=lead,
            message=f"{self.unit or key}{of} cross {self.limit:g} at about step {lead.value:,.0f} "
            f"({lead.low:,.0f} to {lead.high:,.0f}); now {values[-1]:.3g}",
        )  # fmt: skip


def raises(*names: str) -> Callable[[Rule], Rule]:
    """Say which alarms a rule raises, for `on_alarm`."""

    def named(rule: Rule) -> Rule:
        rule.names = names  # pyright: ignore[reportFunctionMemberAccess]
        return rule

    return named


@raises("divergence", "bad batch")
def not_finite(history: History, step: Step) -> Iterator[Alarm]:
    """The loss is NaN or infinite: a number in the batch is, or the run has diverged."""
    loss = history.last("train/loss")
    if loss is None or math.isfinite(loss):
        return
    broken = broken_examples(step.batch)
    if broken:
        places = ", ".join(map(str, broken[:5]))
        yield Alarm(
            name="bad batch", step=step.number, key="train/loss", value=loss, limit=math.inf, source="definition",
            message=f"the loss is {loss}: the batch holds numbers that are not finite, in example {places}",
            suggestion="mend or drop these examples; go back to a checkpoint if the step was taken", severity="critical",
        )  # fmt: skip
    else:
        yield Alarm(
            name="divergence", step=step.number, message=f"the loss is {loss}", key="train/loss", value=loss, limit=math.inf,
            source="definition", severity="critical",
            suggestion="go back to a checkpoint before the step and lower the learning rate",
        )  # fmt: skip


@raises("overflow")
def overflow(history: History, step: Step) -> Iterator[Alarm]:
    """Gradients are not finite though the loss is: numbers left the range of their type.

    A gradient scaler finds its scale by such steps, which it skips; three in a row are more than that.
    """
    loss, norm = history.last("train/loss"), history.last("grad/norm")
    if loss is None or norm is None or not math.isfinite(loss) or math.isfinite(norm):
        return
    skipped = history.tail("grad/norm", 3)
    if step.stepped or (len(skipped) == 3 and not any(math.isfinite(x) for x in skipped)):
        half = any(p.dtype == torch.float16 for p in step.model.parameters()) or not step.stepped
        cure = "train in bfloat16, or scale the loss (torch.amp.GradScaler); clip gradients"
        yield Alarm(
            name="overflow", step=step.number, message=f"the gradient norm is {norm} and the loss {loss:.4g}",
            key="grad/norm", value=norm, limit=math.inf, source="range of the floating-point type", severity="critical",
            suggestion=cure if half else "lower the learning rate or clip gradients; under float16 autocast, scale the loss",
        )  # fmt: skip


@raises("divergence")
def loss_grows(history: History, step: Step) -> Iterator[Alarm]:
    """The median loss of the last 10 steps is 1.5 times that of the first 10: training makes it worse."""
    begin, end = history.head("train/loss", 20), history.tail("train/loss", 10)
    if len(begin) < 20 or not any(history.updated(step.number, "train/loss")):
        return
    first, now = sorted(begin[:10])[5], sorted(end)[5]
    if first > 0 and now > 1.5 * first:
        yield Alarm(
            name="divergence", step=step.number, key="train/loss", value=float(now), limit=1.5 * float(first),
            message=f"the loss has grown to {now:.4g}, from {first:.4g} in the first steps", source="our own",
            suggestion="lower the learning rate, or warm up for longer", severity="critical",
        )  # fmt: skip


@raises("dead layer")
def no_gradient(history: History, step: Step) -> Iterator[Alarm]:
    """A tensor has had a gradient of exactly zero three readings in a row."""
    for key in history.updated(step.number, "grad/rms/"):
        if history.tail(key, 3) == [0.0, 0.0, 0.0]:
            name = key.removeprefix("grad/rms/")
            yield Alarm(
                name="dead layer", step=step.number, message=f"no gradient reaches {name}", key=key, value=0.0, limit=0.0,
                source="definition", subject=name,
                suggestion="look for dead units before it, a detach, or a scale that underflows; initialize it again",
            )  # fmt: skip


@raises("output logits")
def output_logits(history: History, step: Step) -> Iterator[Alarm]:
    """Output logits drift until the working precision rounds them by 0.1 nats: |mean log Z| > 0.1 / eps, at most 100.

    Two readings in a row: a single bad batch is no drift.
    """
    if not any(history.updated(step.number, "output/log_z_mean")):
        return
    recent = history.tail("output/log_z_mean", 2)
    dtype = getattr(getattr(step.recorded.get("seen"), "output", None), "dtype", torch.float32)
    limit = min(0.1 / torch.finfo(dtype).eps, 100.0)
    if len(recent) == 2 and all(abs(x) > limit for x in recent):
        yield Alarm(
            name="output logits", step=step.number, key="output/log_z_mean", value=recent[-1], limit=limit,
            message=f"log Z is {recent[-1]:.3g} on average, beyond {limit:.3g} in {dtype}",
            source="Wortsman et al. 2023, section 3.1.2; limit our own",
            suggestion="add a z-loss of 1e-4 (log Z)^2, or weight decay", severity="warning",
        )  # fmt: skip


@raises("Fisher explosion")
def fisher_explosion(history: History, step: Step) -> Iterator[Alarm]:
    """The trace of the Fisher matrix has exploded early and come down again, as at learning rates that are too small."""
    key = "curvature/fisher_trace"
    if not any(history.updated(step.number, key)):
        return
    steps, values = history[key]
    errors_at, errors = history[f"{key}_error"]
    found = early_peak(steps, values, errors if len(errors_at) == len(steps) else None)
    if found.kind == "early peak":
        yield Alarm(
            name="Fisher explosion", step=step.number, key=key, value=found.value, limit=found.value / found.rise,
            message=f"the Fisher trace peaked at {found.value:.3g} at step {found.step:.0f}, {found.rise:.2g} times its start",
            source="Jastrzebski et al. 2021", suggestion="raise the learning rate early, or penalize the Fisher trace",
        )  # fmt: skip


RULES: tuple[Rule, ...] = (
    not_finite,
    fisher_explosion,
    overflow,
    loss_grows,
    no_gradient,
    output_logits,
    Limit(
        name="attention logits",
        key="attention/max_logit",
        limit=LOGIT_LIMIT,
        message="the largest attention logit is {value}, above {limit}",
        unit="attention logits",
        suggestion="normalize queries and keys (qk-norm), warm up for longer, or lower the learning rate",
        source="Wortsman et al. 2023, section 3.3",
        forecast=True,
    ),
    Limit(
        name="learning rate",
        key="stability/preconditioned_ratio",
        limit=1.5,
        persist=2,
        message="the learning rate is {value}x the stability limit of the current preconditioned sharpness",
        suggestion="lower the learning rate, warm up for longer, or clip gradients",
        source="Cohen et al. 2022, equation 4; margin our own",
    ),
    Limit(
        name="learning rate",
        key="stability/sharpness_ratio",
        limit=1.5,
        persist=2,
        message="the learning rate is {value}x the stability limit of the current sharpness",
        suggestion="lower the learning rate, warm up for longer, or clip gradients",
        source="Cohen et al. 2021, section 3; margin our own",
    ),
    Limit(
        name="learning rate",
        key="update/ratio_median",
        limit=0.3,
        persist=2,
        message="half of the matrices change by {value} of their size in a step",
        suggestion="lower the learning rate, or warm up for longer",
        source="our own",
    ),
    Limit(
        name="learning rate",
        key="update/ratio_median",
        limit=1.0,
        message="half of the matrices change by {value} of their size in a step",
        suggestion="lower the learning rate, or warm up for longer",
        source="our own",
    ),
    Limit(
        name="epsilon",
        key="stability/epsilon_ratio/",
        limit=EPSILON_MARGIN,
        falling=True,
        forecast=True,
        persist=2,
        severity="warning",
        message="the gradient of {subject} is at {value} times Adam's epsilon, which shrinks its steps",
        unit="gradients over Adam's epsilon",
        suggestion="lower eps (1e-15 is safe in float32)",
        source="Wortsman et al. 2023, section 3.4",
    ),
    Limit(
        name="dead layer",
        key="activation/dead/",
        limit=0.98,
        persist=2,
        severity="warning",
        message="{value} of the units of {subject} are zero for every example",
        suggestion="lower the learning rate, initialize the layer again, or use an activation without a dead half",
        source="definition",
    ),
    Limit(
        name="softmax collapse",
        key="output/collapse",
        limit=0.25,
        persist=3,
        severity="warning",
        message="for {value} of the rows the softmax is exactly one-hot in the working precision: where it is right they have no gradient",
        suggestion="compute the loss in float32 or float64, use StableMax, or stop the growth of logits by weight decay",
        source="Prieto et al. 2025, section 3; threshold our own",
    ),
)
