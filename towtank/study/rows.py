"""Records as the rows of a table, to be fitted by any law."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from towtank.record.record import Curve, Record


def rows_of(records: Iterable[Record]) -> list[dict[str, Any]]:
    """One row a run: the keys of its cell, what became of it, its losses, and the largest value of every signal.

    A run that diverged has no `loss`; one that failed or ran out of memory tells nothing about the model and is left out.

    Args:
        records: the runs.

    Returns:
        Rows with `status`, `stage`, `steps`, `parameters`, `time_s`, the keys of the cell, `loss` (at the end, held out,
        nats), `loss_best` (the lowest along the run), `loss_initial`, and every signal's largest value by its own name.

    Example:
        >>> from towtank.record.record import Loss
        >>> run = Record(id="a", config={"width": 32}, status="done", steps=9, loss=Loss(final=2.5, curve=[(5, 2.4)]))
        >>> row = rows_of([run])[0]
        >>> row["width"], row["loss"], row["loss_best"]
        (32, 2.5, 2.4)
    """
    return [_row(record) for record in records if record.status in ("done", "diverged")]


def _row(record: Record) -> dict[str, Any]:
    told = {"status": record.status, "stage": record.stage, "steps": record.steps, "parameters": record.parameters}
    losses = {
        "loss": record.loss.final if record.status == "done" else None,
        "loss_best": min(_finite([*record.loss.curve, (record.steps, record.loss.final)]), default=None),
        "loss_initial": record.loss.initial,
    }
    signals = {name: max(_finite(curve), default=None) for name, curve in record.signals.items()}
    return told | {"time_s": record.time_s} | signals | record.config | losses


def _finite(curve: Curve) -> list[float]:
    return [v for _, v in curve if v is not None and math.isfinite(v)]
