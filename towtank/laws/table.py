"""Tables of runs: columns by name, whatever holds them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Table = Mapping[str, Sequence[Any]]


def column(table: Table, name: str) -> Floats:
    """One column as floats; None becomes NaN.

    Raises:
        ValueError: if there is no such column, naming the nearest.

    Example:
        >>> column({"loss": [2.5, None]}, "loss")
        array([2.5, nan])
    """
    if name not in table:
        raise ValueError(f"expected a column {name!r}, got {sorted(table)}{near(name, table)}")
    return np.array([np.nan if v is None else v for v in table[name]], dtype=np.float64)


def near(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one that was probably meant, or nothing.

    Example:
        >>> near("los", ["loss", "params"])
        "; did you mean 'loss'?"
    """
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def positive(values: Floats, name: str) -> Floats:
    """The values, if all are positive and finite.

    Raises:
        ValueError: naming the first rows that are not.

    Example:
        >>> positive(np.array([1.0, 2.0]), "width")
        array([1., 2.])
    """
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if bad.size:
        raise ValueError(
            f"expected positive numbers in {name!r}, got {values[bad[0]]} in row {bad[0]} "
            f"({bad.size} such rows); remove or correct them"
        )
    return values
