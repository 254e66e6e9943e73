"""How far a sweep is: a bar on a terminal, else a plain line now and then; always on the error stream."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

from towtank.record.errors import plain

PLAIN_EVERY_S = 10.0
LIVE_EVERY_S = 0.25


class Silent:
    """Says nothing; the default of a sweep started from Python."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None: ...

    def start(self, stage: str, runs: int, cost: float, counter: Callable[[], float]) -> None:
        """A stage of so many runs begins; `counter()` tells the cost of the steps made since the sweep began."""

    def done(self, runs: int, cost: float) -> None:
        """So many runs have their records."""

    def note(self, text: str) -> None:
        """One line the user should see."""


class Progress(Silent):
    """Shows done and total runs, runs per second and the time left.

    Args:
        stream: where to write.
        live: draw a bar; by default if the stream is a terminal that can.
    """

    def __init__(self, stream: TextIO | None = None, *, live: bool | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = is_live(self._stream) if live is None else live
        self._bar: Any = None
        self._task: Any = None
        self._end = threading.Event()
        self._stage = ""
        self._runs = self._done_runs = 0
        self._cost = self._done_cost = self._before = 0.0
        self._began = time.monotonic()
        self._counter: Callable[[], float] = lambda: 0.0

    def __enter__(self) -> Progress:
        if self._live:
            self._bar = _bar(self._stream)
            self._bar.start()
        threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end.set()
        if self._bar is not None:
            self._draw()
            self._bar.stop()

    def start(self, stage: str, runs: int, cost: float, counter: Callable[[], float]) -> None:
        """A stage begins."""
        self._stage, self._runs, self._cost, self._counter = stage, runs, cost, counter
        self._done_runs, self._done_cost, self._before, self._began = 0, 0.0, counter(), time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task("", total=1.0)
            self._draw()
        else:
            self._line(f"{stage}: {runs} runs to do")

    def done(self, runs: int, cost: float) -> None:
        """So many runs have their records."""
        self._done_runs += runs
        self._done_cost += cost
        if self._done_runs == self._runs:
            self._draw() if self._bar is not None else self._line(self.text())

    def note(self, text: str) -> None:
        """One line the user should see."""
        if self._bar is not None:
            from rich.text import Text

            self._bar.console.print(Text(plain(text)))
        else:
            self._line(plain(text))

    def text(self) -> str:
        """How far the stage is, in one line."""
        elapsed = max(1e-9, time.monotonic() - self._began)
        rate = f", {self._done_runs / elapsed:.2g} runs/s" if self._done_runs else ""
        share = self._share()
        left = f", about {duration(elapsed * (1 - share) / share)} left" if 0.02 < share < 1 else ""
        left = f", {duration(elapsed)}" if self._done_runs == self._runs else left
        return f"{self._stage}: {self._done_runs}/{self._runs} runs{rate}{left}"

    def _share(self) -> float:
        cost = max(self._done_cost, self._counter() - self._before)
        return 1.0 if self._done_runs >= self._runs else min(0.99, cost / self._cost if self._cost else 0.0)

    def _tick(self) -> None:
        while not self._end.wait(LIVE_EVERY_S if self._live else PLAIN_EVERY_S):
            if self._bar is not None:
                self._draw()
            elif self._done_runs < self._runs:
                self._line(self.text())

    def _draw(self) -> None:
        if self._task is not None:
            self._bar.update(self._task, completed=self._share(), description=self.text())

    def _line(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def is_live(stream: TextIO) -> bool:
    """Whether a stream is a terminal on which a bar can be redrawn."""
    return stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "") and "NO_COLOR" not in os.environ


def duration(seconds: float) -> str:
    """A time span for reading.

    Example:
        >>> duration(3.2), duration(200), duration(9000)
        ('3 s', '3 min 20 s', '2 h 30 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bar

    text = TextColumn("{task.description}", markup=False)
    return Bar(BarColumn(bar_width=20), text, console=Console(file=stream), transient=False)
