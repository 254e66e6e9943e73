"""When a probe runs: at fixed steps, at log-spaced steps, or as often as a budget of time allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from towtank.signals.step import Need, Probe, Step


@dataclass(frozen=True)
class Scheduled:
    """A probe with steps of its own.

    Args:
        probe: what runs.
        due: whether it runs at a step.
        said: the cadence in words.
    """

    probe: Probe
    due: Callable[[int], bool]
    said: str

    def __call__(self, step: Step) -> Mapping[str, float | Tensor]:
        """Run the probe."""
        return self.probe(step)


def every(n: int, probe: Probe) -> Scheduled:
    """The probe at step 1 and at every step that n divides.

    Args:
        n: steps between two runs.
        probe: see `Probe`.

    Raises:
        ValueError: if n is not positive.

    Example:
        >>> scheduled = every(10, lambda step: {"train/lr": step.lr})
        >>> [s for s in range(1, 31) if scheduled.due(s)]
        [1, 10, 20, 30]
    """
    if n < 1:
        raise ValueError(f"expected a positive number of steps, got {n}")
    return Scheduled(probe, lambda step: step == 1 or step % n == 0, f"every {n} steps" if n > 1 else "every step")


def log_spaced(probe: Probe, *, per_decade: int = 10) -> Scheduled:
    """The probe at steps that grow by a constant factor: often at the start, where most happens, rarely later.

    Args:
        probe: see `Probe`.
        per_decade: runs in a tenfold of steps.

    Raises:
        ValueError: if `per_decade` is not positive.

    Example:
        >>> scheduled = log_spaced(lambda step: {}, per_decade=3)
        >>> [s for s in range(1, 101) if scheduled.due(s)]
        [1, 3, 5, 10, 22, 47, 100]
    """
    if per_decade < 1:
        raise ValueError(f"expected a positive number of runs in a decade, got {per_decade}")

    def due(step: int) -> bool:
        # the k-th time is ceil(10^(k / per_decade)); a step is due if one of these lies in (step - 1, step]
        k = math.floor(per_decade * math.log10(step) + 1e-9)
        return math.ceil(10 ** (k / per_decade) - 1e-9) == step

    return Scheduled(probe, due, f"{per_decade} times a decade of steps")


def name_of(probe: Probe) -> str:
    """What a probe is called in plans and notes."""
    inner = probe.probe if isinstance(probe, Scheduled) else probe
    own = getattr(inner, "name", None) or getattr(inner, "__name__", None)
    return str(own or type(inner).__name__)


def attribute(probe: Probe, name: str, default: Any = None) -> Any:
    """An optional attribute of a probe, or of the probe inside its schedule."""
    inner = probe.probe if isinstance(probe, Scheduled) else probe
    return getattr(inner, name, default)


@dataclass(eq=False)
class Slot:
    """A probe in a monitor: when it is due, what it needs recorded, what it cost so far.

    A probe with a schedule keeps it. One without runs every `n` steps if it is cheap. A dear one, which tells its cost, runs once
    at `first`, and from then on whenever its share of the budget has paid for the last run: a bucket that fills by
    `share * step time` a step and is emptied by the time that a run takes.

    Args:
        probe: what runs.
        n: steps between runs of a cheap probe without a schedule.
        first: step of a dear probe's first run.
        fixed: whether a dear probe without a schedule runs every `n` steps too, whatever it costs.
    """

    probe: Probe
    n: int
    first: int = 1
    fixed: bool = False
    needs: set[Need] = field(default_factory=set)
    credit_s: float = 0.0
    last_s: float = 0.0
    spent_s: float = 0.0
    runs: int = 0
    failures: int = 0
    refusals: int = 0

    def __post_init__(self) -> None:
        self.needs |= set(attribute(self.probe, "needs", ()))
        self.name = name_of(self.probe)

    @property
    def scheduled(self) -> bool:
        """Whether the probe has steps of its own."""
        return isinstance(self.probe, Scheduled)

    @property
    def dear(self) -> bool:
        """Whether the budget decides when the probe runs."""
        return not self.scheduled and not self.fixed and attribute(self.probe, "cost") is not None

    def due(self, step: int) -> bool:
        """Whether the probe runs at a step."""
        if self.failures >= 3 and not self.fixed:  # the other processes wait for a fixed one
            return False
        if isinstance(self.probe, Scheduled):
            return self.probe.due(step)
        if not self.dear:
            return step == 1 or step % self.n == 0
        return step >= self.first and (self.runs == 0 or self.credit_s >= 0)

    def earn(self, seconds: float) -> None:
        """A step has passed that earned the probe this much time."""
        if self.dear and self.runs:
            self.credit_s = min(self.credit_s + seconds, 0.0)

    def ran(self, seconds: float) -> None:
        """The probe has run."""
        self.runs += 1
        self.last_s = seconds
        self.spent_s += seconds
        self.credit_s -= seconds

    def refused(self, step: int) -> None:
        """A dear probe could not tell at its first run: it is asked again after 1, 10, 100, ... steps."""
        if self.dear and self.runs == 1:
            self.runs, self.credit_s, self.refusals = 0, 0.0, self.refusals + 1
            self.first = step + 10 ** (self.refusals - 1)

    @property
    def said(self) -> str:
        """The cadence in words."""
        if isinstance(self.probe, Scheduled):
            return self.probe.said
        if not self.dear:
            return f"every {self.n} steps" if self.n > 1 else "every step"
        return "as the budget allows"
