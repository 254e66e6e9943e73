"""Tables of real experiments, kept beside the repository because some state no licence."""

import csv
import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("TOWTANK_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


def table(name: str) -> dict[str, list]:
    """Columns of a table, numbers where they read as numbers; skips the test where the tables are absent."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"the table {name} of real experiments is not here; name its folder in TOWTANK_DATA")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {column: [_number(row[column]) for row in rows] for column in rows[0]}


def where(columns: dict[str, list], keep) -> dict[str, list]:
    """The rows for which `keep(row)` holds; a row is a dict."""
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return {name: [row[name] for row in rows if keep(row)] for name in columns}


def chinchilla(*, drop: int = 5) -> dict[str, list]:
    """The compute-optimal table without the rows of the largest loss."""
    rows = table("chinchilla_epoch/chinchilla_points.csv")
    cut = sorted(rows["loss"])[-drop] if drop else float("inf")
    return where(rows, lambda row: row["loss"] < cut)


def _number(text: str):
    try:
        return float(text) if text else None
    except ValueError:
        return text
