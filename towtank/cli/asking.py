"""What `towtank fit` was asked: the law, the columns, the points to predict."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from towtank.record.errors import ConfigError, nearest

if TYPE_CHECKING:
    from towtank.laws.law import Law

_VALUE = re.compile(r"(?:(\w+)=)?([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A fit as asked for on the command line."""

    words: Sequence[str]  # the table, and values of --predict after the first
    law: str
    x: Sequence[str]
    y: str
    columns: Mapping[str, str]  # other columns, by keyword of the law's `fit`
    where: Sequence[str]
    drop: bool
    predict: Sequence[str]
    hold_out: str
    out: Path | None
    seed: int


def find_law(name: str) -> Law:
    """The law of a name.

    Raises:
        ConfigError: if there is none.
    """
    from towtank.laws import LAWS

    known = {law.name: law for law in LAWS}
    if name not in known:
        near = nearest(name, known)
        raise ConfigError("--law", "a name that `towtank laws` lists", value=name, nearest=near)
    return known[name]


def words_of(request: Request, law: Law) -> tuple[Path, list[dict[str, float]]]:
    """The table, and the points to predict: what follows `--predict` after its first word stands among the words.

    Raises:
        ConfigError: if there is not one table.
    """
    values = [*request.predict] if request.predict else []
    tables = []
    for word in request.words:
        is_value = request.predict and _VALUE.fullmatch(word) and not Path(word).exists()
        (values if is_value else tables).append(word)
    if len(tables) != 1:
        hint = "; give every column its own --x" if any("=" in word for word in tables) else ""
        raise ConfigError("TABLE", f"one file or folder{hint}", value=tables)
    return Path(tables[0]), _points(values, _forecast_by(law))


def _forecast_by(law: Law) -> list[str]:
    """Variables of a forecast: a law that first finds the best of every sweep is one of the sizes alone."""
    return list(getattr(law, "form", law).variables)


def _points(words: Sequence[str], names: list[str]) -> list[dict[str, float]]:
    """Points from values in any order: the first value of every variable makes the first point.

    Raises:
        ConfigError: if a value names no variable, or one lacks values.
    """
    values: dict[str, list[float]] = {name: [] for name in names}
    for word in words:
        match = _VALUE.fullmatch(word)
        name = (match[1] or (names[0] if len(names) == 1 else "")) if match else ""
        if match is None or name not in values:
            near = nearest(name, names)
            raise ConfigError("--predict", f"{' '.join(f'{n}=NUMBER' for n in names)}", value=word, nearest=near)
        values[name].append(float(match[2]))
    if len({len(v) for v in values.values()}) > 1:
        counts = ", ".join(f"{len(v)} of {name}" for name, v in values.items())
        raise ConfigError("--predict", f"every variable as often as the others, got {counts}")
    return [dict(zip(names, point, strict=True)) for point in zip(*values.values(), strict=True)]


def variables_of(x: Sequence[str], law: Law) -> dict[str, str]:
    """Column of every variable from words such as params=N.

    Raises:
        ConfigError: if a variable is unknown, or has no column.
    """
    names, columns = list(law.variables), {}
    if set(names) == {
        "step",
        "lr",
    }:  # the loss curves of a law of schedules: columns of these names unless others are given
        given = {word.rpartition("=")[2] for word in x}
        x = [*x, *(f"{name}={name}" for name in names if name not in given)]
    example = f"--x COLUMN={names[-1]}"
    for word in x:
        column, _, name = word.rpartition("=")
        if not column:  # a bare column
            column, name = word, word if word in names or len(names) > 1 else names[0]
        if name not in names:
            swapped = f", the column first: {name}={column}" if column in names else ""
            raise ConfigError(
                "--x", f"COLUMN=VARIABLE with a variable of {law.name} ({', '.join(names)}){swapped}", value=word
            )
        if name in columns:
            raise ConfigError("--x", f"one column for {name}, got {columns[name]} and {column}")
        columns[name] = column
    missing = [f"{name} ({law.variables[name]})" for name in names if name not in columns]
    if missing:
        raise ConfigError("--x", f"a column for {' and '.join(missing)}, such as {example}")
    return columns


def hold_out_of(text: str) -> str | int | float:
    """A number, a fraction, or a word that the law knows."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
