"""The values of a grid axis: a list, or a range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from towtank.record.errors import MISSING, ConfigError, nearest
from towtank.record.record import Scalar
from towtank.study.keys import Key

MAX_RUNS = 20_000
_LIMIT = {"log2": 1000.0, "log10": 300.0, "linear": 1e300}
_RANGE = "a list, or a range such as {log2 = [-10, -3]} or {log10 = [-4, -1], points = 7}"

Axis = Sequence[Scalar] | Mapping[str, object]


def axis_length(key: str, axis: object) -> int:
    """How many values an axis asks for, found without making them.

    Raises:
        ConfigError: if it is neither a list nor a range, or asks for none or too many.
    """
    if isinstance(axis, Mapping):
        count = _range(key, axis)[3]
    elif isinstance(axis, Sequence) and not isinstance(axis, str):
        count = len(axis)
    else:
        raise ConfigError(key, _RANGE, value=axis)
    if count == 0:
        raise ConfigError(key, "at least one value", value=axis)
    if count > MAX_RUNS:
        raise ConfigError(key, f"at most {MAX_RUNS} values, not {count}", value=axis)
    return count


def axis_values(key: Key, axis: Axis) -> tuple[list[Scalar], list[str]]:
    """The values of an axis in the key's type, without duplicates, and a note on those that were merged.

    Raises:
        ConfigError: as `axis_length`, and for values of the wrong type.

    Example:
        >>> axis_values(Key(name="lr", kinds=(float,)), {"log2": [-3, -1]})
        ([0.125, 0.25, 0.5], [])
    """
    axis_length(key.name, axis)
    raw = _spread(key, axis) if isinstance(axis, Mapping) else axis
    values = [key.coerce(value) for value in raw]
    kept = list(dict.fromkeys((type(v), v) for v in values))
    dropped = len(values) - len(kept)
    notes = [f"grid.{key.name}: {dropped} repeated value{'s' * (dropped > 1)} merged"] if dropped else []
    return [value for _, value in kept], notes


def _spread(key: Key, axis: Mapping[str, object]) -> Sequence[float]:
    """The values of a range; whole numbers where the key takes them and all are whole."""
    scale, low, high, count = _range(key.name, axis)
    values = [low + (high - low) * i / (count - 1) if count > 1 else low for i in range(count)]
    if scale == "log2":
        values = [2.0**x for x in values]
    else:
        values = [float(f"{10.0**x if scale == 'log10' else x:.12g}") for x in values]
    whole = (int in key.kinds or not key.kinds) and all(v.is_integer() for v in values)
    return [int(v) for v in values] if whole else values


def _range(key: str, axis: Mapping[str, object]) -> tuple[str, float, float, int]:
    # scale, ends, number of points
    for name in axis:
        if name not in (*_LIMIT, "points"):
            near = nearest(name, (*_LIMIT, "points"))
            raise ConfigError(f"{key}.{name}", "log2, log10 or linear, and points", value=axis[name], nearest=near)
    scales = [name for name in _LIMIT if name in axis]
    if len(scales) != 1:
        raise ConfigError(key, _RANGE, value=dict(axis))
    scale = scales[0]
    low, high = _ends(f"{key}.{scale}", axis[scale], _LIMIT[scale])
    points = axis.get("points", MISSING)
    if points is MISSING:
        return scale, low, high, _octaves(key, scale, low, high)
    if isinstance(points, bool) or not isinstance(points, int) or points < 1:
        raise ConfigError(f"{key}.points", "an integer of 1 or more", value=points)
    return scale, low, high, points


def _ends(key: str, ends: object, limit: float) -> tuple[float, float]:
    expected = f"two numbers, the lower first, between -{limit:g} and {limit:g}"
    if not isinstance(ends, Sequence) or isinstance(ends, str) or len(ends) != 2:
        raise ConfigError(key, expected, value=ends)
    if any(isinstance(x, bool) or not isinstance(x, int | float) or not abs(x) <= limit for x in ends):
        raise ConfigError(key, expected, value=ends)
    if ends[0] > ends[1]:
        raise ConfigError(key, expected, value=ends)
    return float(ends[0]), float(ends[1])


def _octaves(key: str, scale: str, low: float, high: float) -> int:
    if scale != "log2":
        raise ConfigError(f"{key}.points", f"how many points the {scale} range has")
    if not math.isclose(high - low, round(high - low), abs_tol=1e-9):
        raise ConfigError(f"{key}.log2", "a whole number of octaves, or points = ...", value=[low, high])
    return round(high - low) + 1
