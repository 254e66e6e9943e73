"""Rows for a fit: the columns of a table checked, so that what is wrong with them is said before anything is fitted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from towtank.laws.table import Floats, Ints, Table, column

UNITS = 1e5  # a ratio of tokens to parameters beyond which one of them is probably not in units
SHOWN = 5  # row numbers named in a message


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Checked rows.

    Args:
        x: values of each variable of the law, shape (R,) each.
        y: measured quantity, shape (R,).
        weight: weight of each row, shape (R,).
        group: index of the run that each row belongs to, 0..G-1; without groups every row is its own.
        censored: rows of which only y >= the value is known, shape (R,).
        number: position of each row in the table it came from.
        columns: the column behind each variable, and that of y under "".
        warnings: what is odd about the rows.
        grouped: whether groups were named.
    """

    x: dict[str, Floats]
    y: Floats
    weight: Floats
    group: Ints
    censored: np.ndarray[Any, np.dtype[np.bool_]]
    number: Ints
    columns: dict[str, str]
    warnings: tuple[str, ...] = ()
    grouped: bool = False

    def __len__(self) -> int:
        return self.y.size

    @property
    def groups(self) -> int:
        """Number of independent runs."""
        return int(self.group.max(initial=-1)) + 1

    def take(self, keep: Any) -> Rows:
        """The rows with this mask or these indices."""
        return Rows(
            x={name: values[keep] for name, values in self.x.items()},
            y=self.y[keep],
            weight=self.weight[keep],
            group=_dense(self.group[keep], self.grouped),
            censored=self.censored[keep],
            number=self.number[keep],
            columns=self.columns,
            warnings=self.warnings,
            grouped=self.grouped,
        )


def read_rows(
    table: Table,
    x: Mapping[str, str],
    y: str,
    *,
    weights: str | None = None,
    groups: str | None = None,
    censored: str | Sequence[int] | None = None,
    drop: bool = False,
    positive_y: bool = True,
    zero_allowed: Collection[str] = (),
) -> Rows:
    """Read and check the columns of a fit.

    Args:
        table: columns by name.
        x: column of each variable of the law.
        y: column of the measured quantity.
        weights: column of weights; None: 1.
        groups: column of labels; rows of one label are one run.
        censored: column that is true, or numbers of the rows, where y is only known to be at least the value given.
        drop: leave out rows with missing or infinite numbers instead of refusing them.
        positive_y: whether y must be positive.
        zero_allowed: variables that may be 0.

    Raises:
        ValueError: if a column is missing or of another length, or rows are not finite (unless dropped) or not positive.

    Example:
        >>> rows = read_rows({"n": [1, 2, None], "loss": [3.0, 2.0, 1.0]}, {"N": "n"}, "loss", drop=True)
        >>> len(rows), rows.warnings
        (2, ('1 row with missing or infinite numbers left out: 2',))
    """
    parts = {name: column(table, name) for name in {*x.values(), y, *([weights] if weights else [])}}
    length = parts[y].size
    for name, values in parts.items():
        if values.size != length:
            raise ValueError(f"expected columns of equal length, got {values.size} in {name!r} and {length} in {y!r}")
    warnings: list[str] = []
    usable = np.all([np.isfinite(v) for v in parts.values()], axis=0) if length else np.zeros(0, bool)
    bad = np.flatnonzero(~usable)
    if bad.size and not drop:
        raise ValueError(
            f"expected finite numbers, got {_count(bad)} with missing or infinite ones: {_named(bad)}; "
            "correct them, or leave them out with drop=True"
        )
    if bad.size:
        warnings.append(f"{_count(bad)} with missing or infinite numbers left out: {_named(bad)}")
    zero = {x[variable] for variable in zero_allowed}
    for name in [*x.values(), *([y] if positive_y else []), *([weights] if weights else [])]:
        wrong = np.flatnonzero(usable & ((parts[name] < 0) if name in zero else (parts[name] <= 0)))
        if wrong.size:
            raise ValueError(
                f"expected {'numbers of 0 or more' if name in zero else 'positive numbers'} in {name!r}, got {parts[name][wrong[0]]:g} ({_count(wrong)}: {_named(wrong)}); "
                "correct or remove them"
            )
    keep = np.flatnonzero(usable)
    xs = {variable: parts[name][keep] for variable, name in x.items()}
    label = _labels(table, groups, length)[keep]
    warnings += _duplicates([*xs.values(), parts[y][keep], label if groups else label * 0], keep)
    warnings += _units(xs, dict(x))
    return Rows(
        x=xs,
        y=parts[y][keep],
        weight=parts[weights][keep] if weights else np.ones(keep.size),
        group=_dense(label, groups is not None),
        censored=_censored(table, censored, length)[keep],
        number=keep,
        columns={**x, "": y},
        warnings=tuple(warnings),
        grouped=groups is not None,
    )


def _labels(table: Table, groups: str | None, length: int) -> Ints:
    if groups is None:
        return np.arange(length)
    if groups not in table:
        column(table, groups)  # raises, naming the nearest
    labels = np.unique(np.array([str(v) for v in table[groups]]), return_inverse=True)[1].astype(np.int64)
    if labels.size != length:
        raise ValueError(f"expected {length} labels in {groups!r}, got {labels.size}")
    return labels


def _dense(label: Ints, grouped: bool) -> Ints:
    return np.unique(label, return_inverse=True)[1].astype(np.int64) if grouped else np.arange(label.size)


def _censored(table: Table, censored: str | Sequence[int] | None, length: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    if isinstance(censored, str):
        values = column(table, censored)
        if values.size != length:
            raise ValueError(f"expected {length} rows in {censored!r}, got {values.size}")
        return np.nan_to_num(values) != 0
    mask = np.zeros(length, dtype=bool)
    if censored is not None:
        mask[np.asarray(censored, dtype=np.int64)] = True
    return mask


def _duplicates(columns: Sequence[Floats | Ints], number: Ints) -> list[str]:
    if not number.size:
        return []
    order = np.lexsort(columns)
    same = np.all([np.diff(np.asarray(c)[order]) == 0 for c in columns], axis=0)
    again = np.sort(number[order[1:][same]])
    return (
        [f"{_count(again)} repeated exactly: {_named(again)}; a copy is not a second measurement"] if again.size else []
    )


def _units(xs: Mapping[str, Floats], columns: Mapping[str, str]) -> list[str]:
    """Sizes and counts of one kind of thing rarely differ a million-fold: one is then probably in millions or billions."""
    if len(xs) < 2 or not all(v.size for v in xs.values()):
        return []
    typical = {name: float(np.exp(np.median(np.log(v)))) for name, v in xs.items() if name in COUNTS}
    if len(typical) < 2:
        return []
    low, high = min(typical, key=lambda n: typical[n]), max(typical, key=lambda n: typical[n])
    ratio = typical[high] / typical[low]
    if ratio < UNITS:
        return []
    return [
        f"{columns[high]!r} is typically {ratio:.2g} times {columns[low]!r}: is one of them in millions or billions? "
        "Give both in units"
    ]


COUNTS = ("N", "D")  # variables that count parameters and tokens


def _count(rows: Ints) -> str:
    return f"{rows.size} row{'' if rows.size == 1 else 's'}"


def _named(rows: Ints) -> str:
    return ", ".join(map(str, rows[:SHOWN])) + (", ..." if rows.size > SHOWN else "")
