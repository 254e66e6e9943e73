"""The answer in one sentence, and how far to trust it as a whole."""

from __future__ import annotations

from collections.abc import Sequence

from towtank.estimate import Interval, Verdict
from towtank.laws.optimum import format_rate
from towtank.report.answer import Arm, Comparison, SizeResult

MOST_ARMS = 3  # that are told one by one; more are only compared


def main_verdict(arms: Sequence[Arm], target: float | None) -> Verdict:
    """The verdict of an answer with several arms.

    An arm that refuses does not silence the others: the answer is as good as the worst arm that answers, `weak` at best
    if some arm refuses, and `refuse` only if all do. An arm answers with its prediction where there is a target, else
    with the optimum of its largest size. A prediction that did not hold, or could not be verified, makes its arm `weak`.
    """
    if not arms:
        return Verdict("refuse", "no runs to answer from")
    own = [(arm.name, _arm_verdict(arm, target)) for arm in arms]
    answered = [v for _, v in own if v.status != "refuse"]
    if not answered:
        return Verdict("refuse", "; ".join(f"{name}: {v.reason}" for name, v in own))
    doubts: dict[str, list[str]] = {}
    for name, verdict in own:
        if verdict.status != "ok":
            reason = f"cannot tell, {verdict.reason}" if verdict.status == "refuse" else verdict.reason
            doubts.setdefault(reason, []).append(name)
    said = "; ".join(f"{', '.join(who)}: {why}" for why, who in doubts.items())
    return Verdict("weak", said) if doubts else Verdict("ok")


def write(arms: Sequence[Arm], axis: str, target: float | None, comparison: Comparison | None = None) -> str:
    """The answer in words."""
    if not any(arm.sizes for arm in arms):
        return "Cannot tell: no run has finished or diverged yet."
    if target is None:
        told = [] if comparison and len(arms) > MOST_ARMS else [_without_target(arms, axis)]
        return " ".join(told + ([compare(comparison, axis)] if comparison else []))
    uses = "; ".join(f"{_called(arm, arms)}{_use(arm)}" for arm in arms)
    checks = "; ".join(f"{_called(arm, arms)}{_check(arm)}" for arm in arms if arm.verification is not None)
    proof = f"Verified: {checks}." if checks else "Not verified by runs at that size."
    return f"At {axis} {target:g}, {uses}. {proof}"


def compare(comparison: Comparison, axis: str) -> str:
    """Which arm has the lowest loss, which cannot be told from it, and which are worse by more than noise."""
    best, *others = comparison.rivals
    same = [r.arm for r in others if not r.told]
    worse = [f"{r.arm} (+{r.difference.value:.2g})" for r in others if r.told and r.difference]
    parts = [
        f"At {axis} {comparison.size:g} and its best learning rate, {best.arm} has the lowest loss, {best.loss.value:.4g} nats",
        f"not told from it: {', '.join(same)}" if same else "",
        f"worse by more than noise: {', '.join(worse)}" if worse else "",
        *(f"{what}: {', '.join(names)}" for what, names in unsettled(comparison)),
    ]
    return "; ".join(p for p in parts if p) + "."


def unsettled(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """What keeps arms from a fair comparison, and which."""
    found = [
        ("best at the edge of the rates, so perhaps better beyond", [r.arm for r in comparison.rivals if r.edge]),
        ("not trained with enough seeds to compare", list(comparison.fewer)),
        ("no learning rate that every seed survived", list(comparison.lost)),
    ]
    return [(what, names) for what, names in found if names]


def _arm_verdict(arm: Arm, target: float | None) -> Verdict:
    if target is None:
        return arm.sizes[-1].verdict if arm.sizes else Verdict("refuse", "no run has finished")
    if arm.prediction is None:
        return Verdict("refuse", "no prediction")
    verdict, check = arm.prediction.verdict, arm.verification
    if check is not None and not check.held and verdict.status != "refuse":
        word = "missed" if check.held is False else "open"
        verdict = verdict.worse(Verdict("weak", f"verification {word}: {check.reason}"))
    return verdict


def _use(arm: Arm) -> str:
    prediction = arm.prediction
    if prediction is None or prediction.lr is None:
        return f"cannot tell the learning rate ({prediction.verdict.reason if prediction else 'no prediction'})"
    return f"use learning rate {_rates(prediction.lr)} ({prediction.verdict.status})"


def _check(arm: Arm) -> str:
    check = arm.verification
    assert check is not None
    return ("held, " if check.held else "missed, " if check.held is False else "") + check.reason


def _without_target(arms: Sequence[Arm], axis: str) -> str:
    largest = max(arm.sizes[-1].size for arm in arms if arm.sizes)
    parts = [f"{_called(arm, arms)}{_state(arm.sizes[-1], axis, largest)}" for arm in arms if arm.sizes]
    return f"At {axis} {largest:g}" + (", " if len(arms) == 1 else ": ") + "; ".join(parts) + "."


def _state(size: SizeResult, axis: str, largest: float) -> str:
    parts = [f"(at {axis} {size.size:g})"] if size.size != largest else []
    if size.optimum is not None:
        parts.append(f"the best learning rate is {_rates(size.optimum)} ({size.verdict.status})")
    else:
        parts.append(f"cannot tell the best learning rate ({size.verdict.reason})")
    if size.sensitivity is not None:
        parts.append(f"learning-rate sensitivity {size.sensitivity:.2g} nats")
    logits = [(r.attention_logit_max, r.lr) for r in size.rates if r.attention_logit_max is not None]
    if logits:
        logit, lr = max(logits)
        parts.append(f"largest attention logit {_number(logit)} (at learning rate {format_rate(lr)})")
    diverged = sum(r.diverged for r in size.rates)
    if diverged:
        parts.append(f"{diverged} of {sum(r.runs for r in size.rates)} runs diverged")
    return ", ".join(parts)


def _number(x: float) -> str:
    return f"{x:.3g}" if x < 1000 else f"{x:,.0f}"


def _called(arm: Arm, arms: Sequence[Arm]) -> str:
    return f"{arm.name}: " if len(arms) > 1 else ""


def _rates(interval: Interval) -> str:
    return f"{format_rate(interval.value)} [{format_rate(interval.low)}, {format_rate(interval.high)}]"
