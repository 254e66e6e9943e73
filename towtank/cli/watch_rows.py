"""What a watched run shows: one row a reading, tensors and modules reduced to the worst of their kind, and how the run is."""

from __future__ import annotations

import math
import os
import re
import socket
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from towtank.record.lines import Run
from towtank.record.stream import Series, Stream

ORDER = (
    "train", "val", "eval", "grad", "stability", "curvature", "noise", "attention", "output", "activation", "update",
    "parameter", "representation", "data",
)  # fmt: skip
LIMITS = {
    "stability/sharpness_ratio": 1.0,
    "stability/preconditioned_ratio": 1.0,
    "stability/trace_ratio": 1.0,
    "stability/frobenius_ratio": 1.0,
    "attention/max_logit": 1e4,
}
FLOORS = {"stability/epsilon_ratio": 10.0}  # limits that a reading must not fall below
FALLING = {*FLOORS, "attention/entropy", "noise/snr", "representation/effective_rank"}  # the lowest is the worst
_BESIDE = ("_low", "_high", "_error")
SILENT_S = 10.0
FRESH = 100  # steps for which an alarm marks its reading


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Args:
        key: of the reading.
        begin: what the keys of all tensors or modules of its kind begin with; empty for a reading of its own.
        series: [(step, value)].
        kind: number of tensors or modules of which this is one; 0 for a reading of its own.
        limit: that the reading should not cross.
        floor: whether it should stay above the limit.
        alarmed: severity of the alarms about it.
        low: lower end of its interval, or None.
        high: upper end.
    """

    key: str
    begin: str = ""
    series: Series = field(repr=False)
    kind: int = 0
    limit: float | None = None
    floor: bool = False
    alarmed: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def value(self) -> float:
        """The newest value."""
        return self.series[-1][1]

    @property
    def step(self) -> int:
        """Its step."""
        return self.series[-1][0]

    @property
    def over(self) -> bool:
        """Whether it is beyond its limit, or no finite number."""
        if not math.isfinite(self.value):
            return True
        return self.limit is not None and (self.value < self.limit if self.floor else self.value > self.limit)


@dataclass(frozen=True, kw_only=True)
class Health:
    """Whether somebody is still writing.

    Args:
        age_s: seconds since the last line.
        silent: longer than the run usually takes between lines.
        gone: the writing process is gone; None where that cannot be seen from here.
        per_s: steps a second, lately; None before the second step.
    """

    age_s: float
    silent: bool
    gone: bool | None
    per_s: float | None


def rows(stream: Stream, *, few: int | None = 3) -> list[Row]:
    """The rows of a run, in the order in which one looks at them.

    Args:
        stream: the run.
        few: tensors or modules shown of each kind, the worst first; None shows all.

    Example:
        >>> from towtank.record.lines import Run
        >>> series = {"update/ratio/a": [(1, 0.1)], "update/ratio/b": [(1, 0.2)], "train/loss": [(1, 3.0)]}
        >>> run = Stream(header=Run(id="a"), series=series, alarms=(), notes=(), status="done", step=1, time_s=1.0, recent=(),
        ...              damaged=())
        >>> [(row.key, row.value, row.kind) for row in rows(run, few=1)]
        [('train/loss', 3.0, 0), ('update/ratio/b', 0.2, 2)]
    """
    kinds: dict[str, list[str]] = {}
    for key in stream.series:
        if not _beside(key, stream.series):
            kinds.setdefault(_kind(key), []).append(key)
    made = []
    for kind in sorted(kinds, key=lambda kind: _rank(kind, kinds[kind])):
        parts = [key for key in kinds[kind] if key != kind]
        worst = sorted(parts, key=lambda k: _badness(stream.series[k][-1][1], kind in FALLING), reverse=True)[:few]
        common = _common(parts)
        for key in [*(kinds[kind] if not parts else [kind] * (kind in stream.series)), *worst]:
            made.append(_row(stream, key, "" if key == kind else common, 0 if key == kind else len(parts)))
    return made


def health(stream: Stream, age_s: float) -> Health:
    """How the run is, from the age of its last line.

    Args:
        stream: the run.
        age_s: seconds.
    """
    steps = list(stream.recent)
    gaps = [b - a for (_, a), (_, b) in zip(steps, steps[1:], strict=False) if b > a]
    usual = statistics.median(gaps) if gaps else 0.0
    silent = stream.status == "running" and age_s > max(SILENT_S, 10 * usual)
    per_s = (steps[-1][0] - steps[0][0]) / (steps[-1][1] - steps[0][1]) if gaps else None
    gone = None if stream.status != "running" else _gone(stream.header)
    return Health(age_s=max(age_s, 0.0), silent=silent, gone=gone, per_s=per_s)


def change(series: Series) -> float | None:
    """Mean of the last tenth of a series against the tenth before, as a fraction; None where the sign changed, or there is nothing to tell.

    Example:
        >>> change([(i, 1.0 + (i > 9)) for i in range(1, 11)])
        1.0
    """
    count = max(1, len(series) // 10)
    after, before = _mean(series[-count:]), _mean(series[-2 * count : -count])
    if after is None or before is None or before == 0 or before * after < 0:
        return None
    return (after - before) / abs(before)


def sparkline(series: Sequence[tuple[int, float]], width: int, marks: str) -> str:
    """A series as one line of characters over steps; on a logarithmic scale where it spans more than two decades.

    Args:
        series: (step, value), in order.
        width: characters.
        marks: from low to high, and last the one for what is not finite.

    Example:
        >>> sparkline([(i, float(i)) for i in range(8)], 8, "01234567x")
        '01234567'
    """
    if not series or width < 1:
        return ""
    first, last = series[0][0], series[-1][0]
    bins: list[list[float]] = [[] for _ in range(width)]
    for step, value in series:
        bins[(step - first) * (width - 1) // max(last - first, 1)].append(value)
    heights = [None if not b else _mean_of(b) for b in bins]
    finite = [h for h in heights if h is not None and math.isfinite(h)]
    if finite and min(finite) > 0 and max(finite) > 100 * min(finite):
        heights = [math.log(h) if h is not None and math.isfinite(h) else h for h in heights]
        finite = [math.log(h) for h in finite]
    return "".join(_mark(h, finite, marks) for h in _filled(heights))[:width]


def _row(stream: Stream, key: str, begin: str, parts: int) -> Row:
    kind, alarms = _kind(key), [alarm for alarm in stream.alarms if alarm.key == key]
    severities = {alarm.severity for alarm in alarms if alarm.step >= stream.step - FRESH}
    said = next((alarm.limit for alarm in reversed(alarms) if alarm.limit is not None), None)
    value = stream.series[key][-1][1]
    low, high, error = (stream.series[key + end][-1][1] if key + end in stream.series else None for end in _BESIDE)
    if error is not None:
        low, high = value - error, value + error
    return Row(
        key=key, begin=begin, series=stream.series[key], kind=parts, limit=FLOORS.get(kind, LIMITS.get(kind, said)),
        floor=kind in FALLING, alarmed="critical" if "critical" in severities else "warning" if severities else "",
        low=low, high=high,
    )  # fmt: skip


def _kind(key: str) -> str:
    """What a reading is of: the first two parts of its key; a third is the tensor or module."""
    return "/".join(key.split("/")[:2])


def _beside(key: str, series: Mapping[str, Series]) -> bool:
    """Whether it tells how sure another reading is."""
    return any(key.endswith(end) and key.removesuffix(end) in series for end in _BESIDE)


def _rank(kind: str, keys: Sequence[str]) -> tuple[int, bool, str]:
    """Groups in their order, in each the readings of the whole network first."""
    group = kind.partition("/")[0]
    return (ORDER.index(group) if group in ORDER else len(ORDER), kind not in keys, kind)


def _common(keys: Sequence[str]) -> str:
    """What all keys begin with, up to a dot or a slash."""
    return re.sub(r"[^./]*$", "", os.path.commonprefix(list(keys)))


def _badness(value: float, falling: bool) -> float:
    if not math.isfinite(value):
        return math.inf
    return -value if falling else value


def _mean(points: Iterable[tuple[int, float]]) -> float | None:
    finite = [value for _, value in points if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _mean_of(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _filled(heights: Sequence[float | None]) -> list[float]:
    """Where nothing was read, what was read before."""
    filled: list[float] = []
    for height in heights:
        filled.append(height if height is not None else filled[-1])
    return filled


def _mark(height: float, finite: Sequence[float], marks: str) -> str:
    if not math.isfinite(height):
        return marks[-1]
    low, high, levels = min(finite), max(finite), len(marks) - 2
    if high - low <= 1e-6 * max(abs(high), abs(low)):  # constant, up to rounding
        return marks[levels // 2]
    return marks[round((height - low) / (high - low) * levels)]


def _gone(header: Run) -> bool | None:
    if not header.pid or header.host != socket.gethostname():
        return None
    try:
        os.kill(header.pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return None
    return False
