"""What a sink is, and how several are told without one of them being able to end the training."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from towtank.record.lines import End
from towtank.signals.alarm import Alarm

_PATIENCE = 1024  # most calls that are skipped before a sink that fails is tried again


class Sink(Protocol):
    """Anything that takes readings, alarms and notes."""

    def write(self, step: int, time_s: float, readings: Mapping[str, float]) -> None:
        """Take the readings of a step; `time_s` is seconds since training began."""
        ...

    def alarm(self, alarm: Alarm) -> None:
        """Take an alarm."""
        ...

    def note(self, step: int, probe: str, text: str) -> None:
        """Take what a probe has to say in words."""
        ...

    def close(self, status: End) -> None:
        """The run ended: done, diverged, failed or stopped."""
        ...


@dataclass
class _Member:
    sink: Sink
    lost: int = 0
    failures: int = 0  # in a row
    pause: int = 0
    first: str = ""

    @property
    def name(self) -> str:
        return type(self.sink).__name__


class Sinks:
    """Several sinks as one. Whatever one of them raises becomes one warning and a note in the others; training goes on.

    A sink that fails is tried again after 1, 2, 4, ... further calls, so that a tracker which is down costs little time and one
    that comes back is used again. What it lost is said in the notes at the end. An interruption is passed on.

    Args:
        sinks: the sinks.

    Example:
        >>> class Print:
        ...     def write(self, step, time_s, readings):
        ...         print(step, dict(readings))
        >>> Sinks([Print()]).write(1, 0.5, {"train/loss": 2.0})
        1 {'train/loss': 2.0}
    """

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._members = [_Member(sink) for sink in sinks]
        self._step = 0

    def __iter__(self) -> Iterator[Sink]:
        return (member.sink for member in self._members)

    def __len__(self) -> int:
        return len(self._members)

    def write(self, step: int, time_s: float, readings: Mapping[str, float]) -> None:
        """Tell every sink the readings of a step."""
        self._step = step
        self._tell(lambda sink: sink.write(step, time_s, readings))

    def alarm(self, alarm: Alarm) -> None:
        """Tell every sink of an alarm, those that are being left alone too."""
        self._tell(lambda sink: sink.alarm(alarm), urgent=True)

    def note(self, step: int, probe: str, text: str) -> None:
        """Tell every sink what a probe has to say."""
        self._tell(lambda sink: sink.note(step, probe, text))

    def close(self, status: End) -> None:
        """Close every sink."""
        for member in self._members:
            if member.lost:
                said = f"{member.name} lost {member.lost} calls; the first: {member.first}"
                self._tell(lambda sink, said=said: sink.note(self._step, "sinks", said), but=member)
        self._tell(lambda sink: sink.close(status), urgent=True)

    def _tell(self, call: Callable[[Sink], Any], *, urgent: bool = False, but: _Member | None = None) -> None:
        news = [
            said for member in self._members if member is not but and (said := _try(member, call, urgent, self._step))
        ]
        for said, member in news:
            self._tell(lambda sink, said=said: sink.note(self._step, "sinks", said), but=member)


def load(name: str, extra: str) -> ModuleType:
    """A tracker's library.

    Raises:
        ImportError: if it is not installed, with the extra that brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"expected the package {name.partition('.')[0]}, got: {error}; install towtank[{extra}]"
        ) from error


def described(alarm: Alarm) -> str:
    """An alarm in words for a tracker: what is seen, the remedy, the source."""
    parts = [
        alarm.message,
        alarm.suggestion and f"Suggestion: {alarm.suggestion}.",
        alarm.source and f"Source: {alarm.source}.",
    ]
    return " ".join(part if part.endswith(".") else f"{part}." for part in parts if part)


def _try(member: _Member, call: Callable[[Sink], Any], urgent: bool, step: int) -> tuple[str, _Member] | None:
    """Call a sink; returns what to note in the others when it begins to fail."""
    if member.pause and not urgent:
        member.pause -= 1
        member.lost += 1
        return None
    try:
        call(member.sink)
    except Exception as error:  # a tracker may raise anything, and no tracker is worth a training
        return _failed(member, error, step)
    member.failures = member.pause = 0
    return None


def _failed(member: _Member, error: Exception, step: int) -> tuple[str, _Member] | None:
    member.failures += 1
    member.lost += 1
    member.pause = min(2 ** (member.failures - 1), _PATIENCE)
    if member.first:
        return None
    member.first = f"step {step}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    warnings.warn(f"{member.name} failed at {member.first}; training goes on", RuntimeWarning, stacklevel=4)
    return f"{member.name} failed at {member.first}", member
