"""What watching costs: seconds of the loop, of the monitor, and the share that dear probes may still take."""

from __future__ import annotations

import statistics
import time
from collections import deque

WINDOW = 50


class Clock:
    """Tells the time of the loop apart from the monitor's.

    The loop's time runs from the end of one `Monitor.step` to the beginning of the next. What hooks cost inside it is found by
    comparing steps with hooks and without. The monitor's time has three parts: what every step costs, what a step with cheap
    probes costs more, and dear probes.
    """

    def __init__(self) -> None:
        self._bare: deque[float] = deque(maxlen=WINDOW)
        self._hooked: deque[float] = deque(maxlen=WINDOW)
        self._every: deque[float] = deque(maxlen=WINDOW)
        self._cheap: deque[float] = deque(maxlen=WINDOW)
        self._entered = self._left = time.perf_counter()
        self.began = self._left
        self._steps = self._due = 0
        self._hooks_s = self.loop_s = self.own_s = 0.0

    def enter(self, *, hooked: bool) -> None:
        """The monitor begins to look at a step that had hooks, or had none."""
        self._entered = time.perf_counter()
        loop, self._hooks_s = self._entered - self._left, 0.0
        if not self._steps:  # how long ago the loop began is not known
            return
        (self._hooked if hooked else self._bare).append(loop)
        usual = statistics.median(self._hooked) if hooked and self._bare else self.step_s
        self._hooks_s = max(usual - self.step_s, 0.0)  # not of this one: an evaluation may lie before it
        self.loop_s += loop - self._hooks_s

    def leave(self, *, due: bool, dear_s: float) -> None:
        """The monitor has done its work.

        Args:
            due: whether cheap probes ran.
            dear_s: seconds of it for probes that the budget governs.
        """
        self._left = time.perf_counter()
        own = self._left - self._entered + self._hooks_s
        self.own_s += own
        self._steps += 1
        if not due:
            self._every.append(own - dear_s)
            return
        self._due += 1
        if self._due > 1:  # the first time loads and builds what is then there
            self._cheap.append(own - dear_s - self.every_s)

    @property
    def step_s(self) -> float:
        """Seconds of a step of the bare loop (median of the last ones); 0 where none was seen."""
        known = self._bare or self._hooked
        return statistics.median(known) if known else 0.0

    @property
    def every_s(self) -> float:
        """Seconds that every step costs, probes or not."""
        return statistics.median(self._every) if self._every else 0.0

    @property
    def cheap_s(self) -> float:
        """Seconds that a step with cheap probes costs more."""
        return max(statistics.median(self._cheap), 0.0) if self._cheap else 0.0

    @property
    def overhead(self) -> float:
        """Seconds of the monitor over seconds of the bare loop, so far."""
        return self.own_s / self.loop_s if self.loop_s > 0 else 0.0

    @property
    def seen(self) -> int:
        """Steps with cheap probes that were timed."""
        return len(self._cheap)

    @property
    def time_s(self) -> float:
        """Seconds since the beginning."""
        return time.perf_counter() - self.began
