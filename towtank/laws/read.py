"""Read a table from a file: columns by name, numbers as floats, everything else as it was written."""

from __future__ import annotations

import csv
import io
import json
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from towtank.laws import exports
from towtank.laws.table import Table, near

MISSING = frozenset(("", "na", "n/a", "nan", "null", "none"))
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION = re.compile(r"(.+?)(!=|<=|>=|=|<|>)(.*)", re.DOTALL)


def read_table(path: Path | str) -> dict[str, Any]:
    r"""Read the table in a file.

    By the end of its name: CSV (`.csv`, with commas), TSV (`.tsv`), JSON lines (`.jsonl`, `.ndjson`; wandb's history is
    one), JSON (`.json`: a list of rows, or an object of columns), Parquet (`.parquet`, needs pyarrow). wandb's chart
    exports ("run - metric" columns) become one row a run and step; a TensorBoard download, a folder of downloads or a
    folder of event files (needs tensorboard) becomes one row a run and step with a column a tag.

    Args:
        path: a file, or a folder of TensorBoard files.

    Returns:
        Columns by name: arrays of float64 where every entry is a number or missing (NaN), else lists of texts.

    Raises:
        ValueError: if it is no such file, or not a table, naming the line.
        FileNotFoundError: if it is not there.
        ImportError: if a package is needed to read it.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = Path(folder.name) / "runs.csv"
        >>> _ = file.write_text("params,loss,note\n1e6,3.5,a\n1e7,,b\n")
        >>> read_table(file)
        {'params': array([ 1000000., 10000000.]), 'loss': array([3.5, nan]), 'note': ['a', 'b']}
        >>> folder.cleanup()
    """
    path = Path(path)
    try:
        table = _read(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text in UTF-8, got a byte {error.object[error.start]:#04x}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not table or not len(next(iter(table.values()))):
        raise ValueError(f"{path}: expected a table with at least one row, got none")
    return table


def select(table: Table, conditions: Iterable[str]) -> dict[str, Any]:
    """The rows of a table that meet every condition.

    Args:
        table: columns by name.
        conditions: such as `loss<4.5`, `N>=1e8`, `data=c4`, `status!=failed`; `data=c4,rpj` takes either.

    Raises:
        ValueError: if a condition cannot be read, names no column, or compares text by size.

    Example:
        >>> select({"N": [1e6, 1e7, 1e8], "data": ["c4", "rpj", "c4"]}, ["N>2e6", "data=c4"])
        {'N': [100000000.0], 'data': ['c4']}
    """
    keep = np.ones(len(next(iter(table.values()))), dtype=bool)
    for condition in conditions:
        keep &= _meets(table, condition)
    return rows(table, keep)


def rows(table: Table, keep: Sequence[bool] | NDArray[np.bool_]) -> dict[str, Any]:
    """The rows of a table where a boolean column is true.

    Example:
        >>> rows({"a": [1, 2], "b": ["x", "y"]}, [False, True])
        {'a': [2], 'b': ['y']}
    """
    mask = np.asarray(keep, dtype=bool)
    columns: Mapping[str, Any] = table
    return {
        name: values[mask] if isinstance(values, np.ndarray) else [v for v, k in zip(values, mask, strict=True) if k]
        for name, values in columns.items()
    }


def _read(path: Path) -> dict[str, Any]:
    kind = path.suffix.lower()
    if path.is_dir() or "tfevents" in path.name:
        return columns_of(_tensorboard(path))
    if kind in (".csv", ".tsv"):
        return _tidy(_csv(_text(path), "," if kind == ".csv" else "\t"), path)
    if kind in (".jsonl", ".ndjson"):
        return columns_of(_lines(_text(path)))
    if kind == ".json":
        return _tidy(_json(_text(path)), path)
    if kind == ".parquet":
        return _parquet(path)
    raise ValueError("expected .csv, .tsv, .jsonl, .json, .parquet or a folder")


def _text(path: Path) -> str:
    content = path.read_bytes()
    utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")  # "Unicode text" of a spreadsheet
    return content.decode("utf-16" if utf16 else "utf-8-sig")


def _tidy(table: dict[str, Any], path: Path) -> dict[str, Any]:
    """The table itself, or what it holds if it is the export of a tracker."""
    if exports.is_wandb_chart(table):
        return columns_of(exports.from_wandb_chart(table))
    return columns_of(exports.from_scalars(table, path.name)) if exports.is_scalars(table) else table


def _tensorboard(path: Path) -> exports.Rows:
    """Downloads of single tags in a folder, else event files in or below it.

    Raises:
        ValueError: if there are neither.
    """
    if path.is_file():
        return exports.read_events([path], path.parent)
    parts = [p for p in sorted(path.iterdir()) if p.suffix.lower() in (".csv", ".json")]
    read: exports.Rows = []
    for part in parts:
        table = _csv(_text(part), ",") if part.suffix.lower() == ".csv" else _json(_text(part))
        if not exports.is_scalars(table):
            raise ValueError(
                f"{part.name}: expected a download of TensorBoard (Wall time, Step, Value), got {list(table)}; give one table"
            )
        read += exports.from_scalars(table, part.name)
    events = [p for p in path.rglob("*tfevents*") if p.is_file()]
    if not parts and not events:
        raise ValueError(
            "expected TensorBoard's files (run-RUN-tag-TAG.csv, or event files) or a study folder, got neither"
        )
    return exports.merge(read) if parts else exports.read_events(events, path)


def _csv(text: str, delimiter: str) -> dict[str, Any]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        head = next(reader, [])
        _check_head(head, delimiter)
        read = []
        for row in reader:
            if not row:
                continue  # an empty line
            if len(row) != len(head):
                raise ValueError(
                    f"line {reader.line_num}: expected {len(head)} fields as in the header, got {len(row)}"
                )
            read.append(row)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    names = [name.strip() or f"column {i}" for i, name in enumerate(head, start=1)]
    return {name: _numbers(values) for name, values in zip(names, zip(*read, strict=True), strict=False)}


def _check_head(head: list[str], delimiter: str) -> None:
    other = {";": "semicolons", "\t": "tabs", ",": "commas"}
    if len(head) == 1:
        for sign, word in other.items():
            if sign != delimiter and sign in head[0]:
                raise ValueError(
                    f"expected {other[delimiter]} between fields, got {word}; save it as .csv with commas and decimal points"
                )
    names = [name.strip() for name in head if name.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"expected every column once, got {', '.join(twice)} twice; rename one")


def _numbers(values: Sequence[str]) -> Any:
    """Floats if every entry is a number or missing, else the texts."""
    try:
        return np.array(values, dtype=np.float64)
    except ValueError:
        plain = ["nan" if v.strip().lower() in MISSING else v for v in values]
    try:
        return np.array(plain, dtype=np.float64)
    except ValueError:
        return [v.strip() for v in values]


def _lines(text: str) -> list[dict[str, Any]]:
    read = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: expected a JSON object, got: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"line {number}: expected a JSON object, got {type(row).__name__}")
            read.append(row)
    return read


def _json(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"expected JSON, got: {error}") from None
    if isinstance(content, dict) and content and all(isinstance(values, list) for values in content.values()):
        lengths = {name: len(values) for name, values in content.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"expected columns of equal length, got {lengths}")
        return {name: _values(values) for name, values in content.items()}
    if isinstance(content, list) and content and all(isinstance(row, dict) for row in content):
        return columns_of(content)
    if isinstance(content, list) and content and all(isinstance(row, list) and len(row) == 3 for row in content):
        return {name: _values(list(v)) for name, v in zip(exports.SCALARS, zip(*content, strict=True), strict=True)}
    raise ValueError("expected a list of rows or an object of columns; JSON lines end in .jsonl")


def columns_of(read: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Columns from rows; what a row lacks is missing, what is nested gets dotted names.

    Example:
        >>> columns_of([{"a": 1, "b": {"c": 2}}, {"a": None}])
        {'a': array([ 1., nan]), 'b.c': array([ 2., nan])}
    """
    flat = [_flat(row) if any(isinstance(v, dict) for v in row.values()) else row for row in read]
    names = list(dict.fromkeys(name for row in flat for name in row))
    return {name: _values([row.get(name) for row in flat]) for name in names}


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _values(values: list[Any]) -> Any:
    """Floats if every entry is a number or None; wandb writes what JSON cannot hold as texts, "NaN" and "Infinity"."""
    plain = [np.nan if v is None else float(v) if v in ("NaN", "Infinity", "-Infinity") else v for v in values]
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in plain):
        return np.array(plain, dtype=np.float64)
    return values


def _parquet(path: Path) -> dict[str, Any]:
    path.stat()  # so that a missing file is told before a missing package
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ImportError(f"{path}: Parquet needs pyarrow; install towtank[pandas], or save the table as CSV") from None
    try:
        return {name: _values(values) for name, values in parquet.read_table(path).to_pydict().items()}
    except ArrowException as error:
        raise ValueError(f"expected a Parquet file, got: {error}") from None


def _meets(table: Table, condition: str) -> Any:
    match = _CONDITION.fullmatch(condition)
    if match is None:
        raise ValueError(f"condition {condition!r}: expected a column, one of = != < <= > >=, and a value")
    name, sign, value = (part.strip() for part in match.groups())
    if name not in table:
        raise ValueError(f"condition {condition!r}: expected a column, got {name!r}{near(name, table)}")
    column, compare = table[name], _OPERATORS[sign]
    if sign in ("=", "!="):
        alike = np.any([_equal(column, word) for word in {value, *value.split(",")}], axis=0)
        return alike if sign == "=" else ~alike
    try:
        return compare(np.asarray(column, dtype=np.float64), float(value))
    except (TypeError, ValueError):
        raise ValueError(f"condition {condition!r}: expected numbers on both sides of {sign}") from None


def _equal(column: Sequence[Any], word: str) -> Any:
    if isinstance(column, np.ndarray):
        try:
            return column == float(word)
        except ValueError:
            return np.zeros(len(column), dtype=bool)
    return np.array([str(v).casefold() == word.strip().casefold() for v in column])
