"""What a monitor raises when something is about to go wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from towtank.estimate import Interval, finite

Severity = Literal["warning", "critical"]


class Stop(RuntimeError):  # noqa: N818 - an order, no error of the program
    """Raised by `Monitor.step` where an alarm's action is "stop"; `alarm` says why."""

    def __init__(self, alarm: Alarm) -> None:
        self.alarm = alarm
        super().__init__(str(alarm))


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Something that goes wrong, or will.

    Args:
        name: of the rule, such as "attention logits".
        step: at which it was raised.
        message: what is seen, in a sentence with its numbers.
        source: where the rule is from.
        suggestion: the remedy.
        severity: "warning" for what will go wrong or costs quality, "critical" for what has begun to destroy the run.
        key: of the reading that raised it.
        value: of that reading.
        limit: that the reading crossed, or will cross.
        lead: the step at which the limit is crossed, with a 95 % interval, for a forecast.
        subject: what of the network or the data it is about: a tensor, a module, a batch.

    Example:
        >>> print(Alarm(name="epsilon", step=7, message="the gradient is at 3 epsilon", source="Wortsman et al. 2023, 3.4",
        ...             suggestion="lower eps", key="stability/epsilon_ratio", value=3.0, limit=10.0))
        step 7: epsilon: the gradient is at 3 epsilon; lower eps
    """

    name: str
    step: int
    message: str
    source: str
    suggestion: str
    key: str
    value: float
    limit: float
    severity: Severity = "warning"
    lead: Interval | None = None
    subject: str = ""

    def __str__(self) -> str:
        return f"step {self.step}: {self.name}: {self.message}; {self.suggestion}"

    def to_json(self) -> dict[str, Any]:
        """Plain data: numbers that are not finite are None."""
        words = ("name", "step", "message", "source", "suggestion", "severity", "key", "subject")
        numbers = {k: getattr(self, k) if finite(getattr(self, k)) else None for k in ("value", "limit")}
        lead = [self.lead.value, self.lead.low, self.lead.high] if self.lead else None
        return {k: getattr(self, k) for k in words} | numbers | {"lead": lead}
