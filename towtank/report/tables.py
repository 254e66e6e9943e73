"""The tables and cards of the page as plain data, so that the template only lays them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from towtank.estimate import Verdict
from towtank.report import readings, text
from towtank.report.answer import Answer, Arm, Rival

NAME = 80  # longest name in a cell, characters


@dataclass(frozen=True)
class Cell:
    """A cell: what is shown, what it sorts by, and whether it is a number."""

    shown: str
    key: float | str | None = None
    tone: str = ""  # ok, weak or refuse: coloured

    @property
    def numeric(self) -> bool:
        """Whether the cell sorts as a number."""
        return isinstance(self.key, int | float)


@dataclass(frozen=True)
class Table:
    """A table with its heading row; cells of a column with numbers stand right."""

    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def numeric(self, column: int) -> bool:
        """Whether a column holds numbers."""
        return any(row[column].numeric for row in self.rows)

    def first(self, count: int) -> Table:
        """The same table with its first rows only."""
        return Table(self.head, self.rows[:count])


@dataclass(frozen=True, kw_only=True)
class Card:
    """A key number at the top of the page."""

    label: str
    value: str
    detail: str = ""
    foot: str = ""
    tone: str = ""
    more: tuple[str, ...] = field(default=())


def words(x: object, limit: int = NAME) -> Cell:
    """A cell with text of the user, made fit for display."""
    shown = text.clean(x, limit)
    return Cell(shown, shown.casefold())


def value(x: float | None, digits: int = 3) -> Cell:
    """A cell with a number, or a dash."""
    return Cell(text.number(x, digits), x)


def verdict(v: Verdict) -> Cell:
    """A cell with a verdict and its reason."""
    return Cell(text.clean(v, 300), v.status, v.status)


def cards(answer: Answer) -> list[Card]:
    """The prediction of every arm, or the best three where arms are only compared; then what it took.

    Args:
        answer: what was found out.
    """
    compared = answer.comparison if answer.target is None else None
    if compared:
        found = [_rival_card(rival, len(compared.seeds)) for rival in compared.rivals[:3]]
    else:
        found = [_prediction_card(answer, arm) for arm in answer.arms[:6]]
    slopes = [_slope_card(answer, arm) for arm in answer.arms[:6] if arm.lr_law and "slope" in arm.lr_law.coefficients]
    counts = ", ".join(f"{n} {text.clean(k, 20)}" for k, n in answer.counts.items())
    runs = Card(
        label="runs", value=str(len(answer.runs)), detail=counts, foot=f"{text.duration(answer.time_s)} of training"
    )
    return [*found, *slopes, runs]


def predictions(answer: Answer) -> Table:
    """What every arm says about the target."""
    head = ("arm", answer.size_axis, "learning rate", "loss (nats)", "largest attention logit", "stable", "verdict")
    rows = []
    for p in (arm.prediction for arm in answer.arms if arm.prediction):
        stable = {True: "yes", False: "no", None: "-"}[p.stable]
        numbers = (
            Cell(text.interval(p.lr)),
            Cell(text.interval(p.loss, 4)),
            Cell(text.interval(p.attention_logit_max)),
        )
        rows.append((words(p.arm), Cell(text.size(p.size), p.size), *numbers, Cell(stable), verdict(p.verdict)))
    return Table(_head(head), tuple(rows))


def verifications(answer: Answer) -> Table:
    """What was predicted, what was measured."""
    head = ("arm", answer.size_axis, "predicted learning rate", "measured", "factor", "excess loss (nats)", "outcome")
    rows = []
    for arm in answer.arms:
        if v := arm.verification:
            tone = {True: "ok", False: "refuse", None: "weak"}[v.held]
            outcome = Cell(
                f"{readings.held(v)}: {text.clean(v.reason, 300)}" if v.reason else readings.held(v), None, tone
            )
            numbers = (
                Cell(text.interval(v.predicted)),
                Cell(text.interval(v.measured)),
                value(v.factor),
                value(v.excess_loss),
            )
            rows.append((words(arm.name), Cell(text.size(v.size), v.size), *numbers, outcome))
    return Table(_head(head), tuple(rows))


def sizes(answer: Answer) -> Table:
    """Every size of every arm: optimum, best loss, sensitivity."""
    head = (
        "arm",
        answer.size_axis,
        "parameters",
        "best learning rate",
        "best loss (nats)",
        "sensitivity (nats)",
        "verdict",
    )
    rows = []
    for arm in answer.arms:
        for s in arm.sizes:
            count = Cell(f"{s.parameters:,}" if s.parameters is not None else "-", s.parameters)
            numbers = (Cell(text.interval(s.optimum)), Cell(text.interval(s.best_loss, 4)), value(s.sensitivity))
            rows.append((words(arm.name), Cell(text.size(s.size), s.size), count, *numbers, verdict(s.verdict)))
    return Table(_head(head), tuple(rows))


def comparison(answer: Answer) -> Table:
    """The arms against one another, best first; no rows without a comparison."""
    head = (
        "arm",
        "learning rate",
        "loss (nats)",
        "above the best",
        "p",
        "sensitivity",
        "step (ms)",
        "state B",
        "outcome",
    )
    rows = []
    for place, r in enumerate(answer.comparison.rivals if answer.comparison else ()):
        arm = next(a for a in answer.arms if a.name == r.arm)
        at = next((s for s in arm.sizes if answer.comparison and s.size == answer.comparison.size), None)
        word = "lowest" if not place else "worse" if r.told else "not told"
        outcome = Cell(
            word + (", at the edge" if r.edge else ""), None, "ok" if not place else "" if r.told else "weak"
        )
        above = Cell(text.interval(r.difference, 2), r.difference.value if r.difference else None)
        loss = Cell(text.interval(r.loss, 4), r.loss.value)
        costs = (
            value(at and at.sensitivity, 2),
            value(None if r.step_s is None else 1e3 * r.step_s, 2),
            value(r.state_bytes),
        )
        rows.append((words(r.arm, 40), value(r.lr), loss, above, value(r.p, 2), *costs, outcome))
    return Table(head, tuple(rows))


def laws(answer: Answer) -> Table:
    """Every law: coefficients, backtest, verdict."""
    rows = []
    for arm, law in readings.laws(answer):
        coefficients = "; ".join(f"{text.clean(k, 30)} {text.interval(v)}" for k, v in law.coefficients.items())
        b = law.backtest
        test = f"off by {b.factor:.2f}, {'inside' if b.hit else 'outside'} the interval" if b else "-"
        rows.append((words(arm.name), words(law.name), Cell(coefficients or "-"), Cell(test), verdict(law.verdict)))
    return Table(("arm", "law of", "coefficients", "backtest", "verdict"), tuple(rows))


def runs(answer: Answer) -> Table:
    """Every run."""
    head = (
        "arm",
        answer.size_axis,
        "learning rate",
        "seed",
        "stage",
        "status",
        "steps",
        "loss",
        "max logit",
        "time (s)",
        "run",
    )
    rows = []
    for r in answer.runs:
        tone = {"done": "ok", "diverged": "weak", "failed": "refuse", "oom": "refuse"}.get(r.status, "")
        status = Cell(
            f"{text.clean(r.status, 20)}: {text.clean(r.reason, 200)}" if r.reason else text.clean(r.status, 20)
        )
        ends = (Cell(str(r.steps), r.steps), value(r.loss, 4), value(r.attention_logit_max), value(r.time_s))
        start = (words(r.arm), Cell(text.size(r.size), r.size), value(r.lr), Cell(str(r.seed), r.seed), words(r.stage))
        rows.append((*start, Cell(status.shown, status.shown, tone), *ends, Cell(text.clean(r.id)[:12])))
    return Table(_head(head), tuple(rows))


def pairs(values: Mapping[str, object]) -> list[tuple[str, str]]:
    """Names and values of a mapping, fit for display."""
    return [(text.clean(k, NAME), text.clean(v, 300)) for k, v in values.items()]


def _head(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(text.clean(n, 40) for n in names)


def _prediction_card(answer: Answer, arm: Arm) -> Card:
    name, p, v = text.clean(arm.name, 40), arm.prediction, arm.verification
    label = f"{name}: learning rate" + (f" at {text.clean(answer.size_axis, 20)} {text.size(p.size)}" if p else "")
    if p is None or p.lr is None:
        reason = p.verdict.reason if p else arm.lr_law.verdict.reason if arm.lr_law else answer.verdict.reason
        return Card(label=label, value="cannot tell", detail=text.clean(reason, 200), tone="refuse")
    detail = f"{text.number(p.lr.low)} to {text.number(p.lr.high)} ({text.percent(p.lr.level)} interval)"
    if v is None:
        return Card(
            label=label, value=text.number(p.lr.value), detail=detail, foot=str(p.verdict), tone=p.verdict.status
        )
    measured = f"trained: {text.number(v.measured.value)}, " if v.measured else "trained: "
    factor = f", factor {v.factor:.2f}" if v.factor is not None else ""
    tone = {True: "ok", False: "refuse", None: "weak"}[v.held]
    foot = f"{measured}{readings.held(v)}{factor}"
    return Card(label=label, value=text.number(p.lr.value), detail=detail, foot=foot, tone=tone)


def _rival_card(rival: Rival, seeds: int) -> Card:
    detail = f"at learning rate {text.number(rival.lr)}, {seeds} seeds"
    foot = f"above the best: {text.interval(rival.difference, 2)}" if rival.difference else "lowest of all"
    return Card(
        label=f"{text.clean(rival.arm, 40)}: loss (nats)",
        value=text.number(rival.loss.value, 4),
        detail=detail,
        foot=foot,
    )


def _slope_card(answer: Answer, arm: Arm) -> Card:
    assert arm.lr_law is not None
    slope, axis = arm.lr_law.coefficients["slope"], text.clean(answer.size_axis, 20)
    detail = f"{text.number(slope.low)} to {text.number(slope.high)} ({text.percent(slope.level)} interval)"
    return Card(label=f"{text.clean(arm.name, 40)}: octaves per doubling of {axis}", value=text.number(slope.value),
                detail=detail, foot=readings.drift(slope))  # fmt: skip
