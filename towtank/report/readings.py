"""The sentences beside each figure: what a reader should see in it. Pure functions from an `Answer` to plain text."""

from __future__ import annotations

from collections.abc import Iterator

from towtank.estimate import Interval
from towtank.report import text
from towtank.report.answer import Answer, Arm, LawResult, Verification
from towtank.report.figures import backtest_rows
from towtank.report.traces import ATTENTION_LIMIT, curves, optima

FLAT = 0.25  # octaves per doubling; below, a learning rate carries over one doubling to within a fifth
MARKS = "Bars are one standard error over seeds, stars the optimum with its interval, crosses diverged runs."
LIMITS = (
    "Small models trained briefly show a mechanism. They are no certificate for a large run: a model of another size, "
    "data, length or precision may behave differently.",
    "The intervals tell how well these runs determine the law; they do not tell whether the law goes on beyond the sizes "
    "that were trained.",
    "A law through few sizes has hardly any freedom left to fail. The verification is the real test, and only at its size.",
)


def evidence(answer: Answer) -> str:
    """The scale of the evidence in one sentence.

    Args:
        answer: what was found out.
    """
    sizes = sorted({r.size for r in answer.runs})
    if not sizes:
        return "No run was recorded."
    span = text.size(sizes[0]) if len(sizes) == 1 else f"{text.size(sizes[0])} to {text.size(sizes[-1])}"
    steps = max(r.steps for r in answer.runs)
    shared = [f"{key} {answer.fixed[key]}" for key in ("depth", "batch", "context") if key in answer.fixed]
    parts = [f"{answer.size_axis} {span}", *shared, f"{steps:,} steps at most", *_tokens(answer, steps)]
    return f"Tested here: {', '.join(parts)}; {len(answer.runs)} runs, {text.duration(answer.time_s)} of training."


def _tokens(answer: Answer, steps: int) -> list[str]:
    batch, context = answer.fixed.get("batch"), answer.fixed.get("context")
    if isinstance(batch, int) and isinstance(context, int):
        return [f"{steps * batch * context / 1e6:.2g}M tokens a run"]
    return []


def loss_against_rate(answer: Answer) -> list[str]:
    """How the optimum moves from the smallest to the largest size."""
    parts = []
    for arm in answer.arms:
        found = optima(arm)
        if len(found) > 1:
            (small, first), (large, last) = found[0], found[-1]
            factor = max(first.value / last.value, last.value / first.value)
            way = "falls" if last.value < first.value else "rises"
            parts.append(
                f"In {arm.name} the best learning rate {way} {factor:.2g}-fold, from {text.number(first.value)} at "
                f"{answer.size_axis} {text.size(small)} to {text.number(last.value)} at {text.size(large)}."
            )
        else:
            parts.append(f"In {arm.name} the best learning rate can be told at {len(found)} of {len(arm.sizes)} sizes.")
    return [*parts, MARKS]


def optimum_against_size(answer: Answer) -> list[str]:
    """The slopes of the laws."""
    parts = []
    for arm in answer.arms:
        slope = arm.lr_law.coefficients.get("slope") if arm.lr_law else None
        if slope:
            parts.append(
                f"{arm.name}: {text.interval(slope)} octaves per doubling of {answer.size_axis}; {drift(slope)}."
            )
    marks = "Shaded: interval of the law. Open marks were predicted before the runs at that size; stars were measured there."
    return [*parts, marks]


def drift(slope: Interval) -> str:
    """What a slope in octaves per doubling says.

    Example:
        >>> drift(Interval(-1.0, -1.2, -0.8)), drift(Interval(-0.1, -0.2, 0.0))
        ('times 0.5 a doubling', 'no drift seen')
    """
    if 0 in slope:
        return "no drift seen"
    return f"{'hardly moves, ' if max(abs(slope.low), abs(slope.high)) <= FLAT else ''}times {2**slope.value:.2g} a doubling"


def sensitivity_by_size(answer: Answer) -> list[str]:
    """What learning-rate sensitivity means, and which arm has less of it."""
    meaning = "The loss a wrong learning rate costs on average over the grid: lower is easier to tune."
    last = [(arm.name, s.size, s.sensitivity) for arm in answer.arms for s in arm.sizes if s.sensitivity is not None]
    largest = max((size for _, size, _ in last), default=0.0)
    at = [f"{text.number(v)} in {name}" for name, size, v in last if size == largest]
    return [meaning, f"At {answer.size_axis} {text.size(largest)}: {', '.join(at)} nats."] if at else [meaning]


def attention_logits(answer: Answer) -> list[str]:
    """The largest logit of each arm and on which side of the limit it lies."""
    parts = []
    for arm in answer.arms:
        found = [
            (p.attention_logit_max, size, p.lr)
            for size, rates in curves(arm)
            for p in rates
            if p.attention_logit_max is not None
        ]
        if found:
            most, size, lr = max(found)
            side = "above" if most > ATTENTION_LIMIT else "below"
            where = f"{answer.size_axis} {text.size(size)}, learning rate {text.number(lr)}"
            parts.append(f"{arm.name}: at most {text.number(most)} ({where}), {side} {ATTENTION_LIMIT:,.0f}.")
    return parts


def best_loss_against_size(answer: Answer) -> list[str]:
    """The best loss of the largest size in each arm."""
    parts = []
    for arm in answer.arms:
        found = [(s.size, s.best_loss) for s in arm.sizes if s.best_loss]
        if found:
            size, loss = found[-1]
            parts.append(f"{arm.name}: {text.interval(loss, 4)} nats at {answer.size_axis} {text.size(size)}.")
    return parts


def backtests(answer: Answer) -> list[str]:
    """How many intervals held the value they were meant to hold."""
    rows = [b for _, _, b in backtest_rows(answer)]
    if not rows:
        return []
    hits, worst = sum(b.hit for b in rows), max(b.factor for b in rows)
    return [
        "Each value was hidden or not yet measured, predicted from the other sizes, and compared.",
        f"{hits} of {len(rows)} intervals contain what was measured; the worst prediction is off by a factor of {worst:.2f}.",
    ]


def comparison(answer: Answer) -> str:
    """How the arms were compared."""
    if answer.comparison is None:
        return ""
    return (
        f"The arms at {answer.size_axis} {text.size(answer.comparison.size)}, each at its best learning rate: paired by {len(answer.comparison.seeds)} "
        f"seeds, p corrected for all {answer.comparison.pairs} pairs (Holm). Steps are timed as a share of an ensemble."
    )


def held(verified: Verification) -> str:
    """`held`, `did not hold` or `not told`."""
    return {True: "held", False: "did not hold", None: "not told"}[verified.held]


def laws(answer: Answer) -> Iterator[tuple[Arm, LawResult]]:
    """Every law of every arm."""
    for arm in answer.arms:
        for law in (arm.lr_law, arm.loss_law, *arm.attention_laws):
            if law:
                yield arm, law
