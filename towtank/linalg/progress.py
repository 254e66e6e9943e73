"""A bar on the error stream, on a terminal and only once the work turns out to be long."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

LONG_S = 2.0


class Meter:
    """Shows how much of a piece of work is done.

    Args:
        what: a few words.
        total: units to do, or None if not known.
        show: True draws at once, False never, None on a terminal when the work has run for `LONG_S` seconds.

    Example:
        >>> with Meter("trace", 3, show=False) as meter:
        ...     meter.advance(1)
    """

    def __init__(self, what: str, total: float | None, *, show: bool | None = None) -> None:
        self._what, self._total = what, total
        self._allowed = sys.stderr.isatty() if show is None else show
        self._begin = time.monotonic() + (0.0 if show else LONG_S)
        self._done = 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, units: float, note: str = "") -> None:
        """So many more units are done; `note` is shown after the name."""
        self._done += units
        if not self._allowed or time.monotonic() < self._begin:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total)
        self._bar.update(self._task, completed=self._done, description=f"{self._what} {note}".rstrip())
