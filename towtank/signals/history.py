"""What a run has shown so far: bounded series of readings by key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CAPACITY = 4096


class History:
    """Series of readings, each of at most `CAPACITY` points: where one is full, every other old point is let go.

    Example:
        >>> history = History()
        >>> for step in range(3):
        ...     history.add(step, {"train/loss": 2.0**-step})
        >>> steps, values = history["train/loss"]
        >>> values.tolist(), history.last("train/loss"), history.last("no/such")
        ([1.0, 0.5, 0.25], 0.25, None)
    """

    def __init__(self) -> None:
        self._points: dict[str, tuple[list[int], list[float]]] = {}
        self._newest = -1
        self._fresh: list[str] = []  # keys that the newest step told

    def add(self, step: int, readings: Mapping[str, float]) -> None:
        """Append the readings of a step."""
        self._newest, self._fresh = step, list(readings)
        for key, value in readings.items():
            steps, values = self._points.setdefault(key, ([], []))
            steps.append(step)
            values.append(value)
            if len(steps) > CAPACITY:  # the recent half keeps every point
                half = CAPACITY // 2
                steps[:half], values[:half] = steps[:half:2], values[:half:2]

    def __contains__(self, key: str) -> bool:
        return key in self._points

    def __getitem__(self, key: str) -> tuple[Floats, Floats]:
        """Steps and values of a key, oldest first; empty where there is none."""
        steps, values = self._points.get(key, ([], []))
        return np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)

    def last(self, key: str) -> float | None:
        """The newest value of a key, or None."""
        return self._points[key][1][-1] if key in self._points else None

    def tail(self, key: str, count: int) -> list[float]:
        """The newest values of a key, oldest first."""
        return self._points[key][1][-count:] if key in self._points else []

    def head(self, key: str, count: int) -> list[float]:
        """The oldest values of a key, oldest first."""
        return self._points[key][1][:count] if key in self._points else []

    def updated(self, step: int, pattern: str) -> Iterator[str]:
        """Keys that have a reading of the newest step, if this is it: `pattern` itself, or every key below it where it ends in a slash."""
        if step != self._newest:
            return
        if not pattern.endswith("/"):
            if pattern in self._fresh:
                yield pattern
            return
        yield from [key for key in self._fresh if key.startswith(pattern)]

    def items(self) -> Iterator[tuple[str, list[tuple[int, float]]]]:
        """Every series as (key, [(step, value)])."""
        for key, (steps, values) in self._points.items():
            yield key, list(zip(steps, values, strict=True))
