"""What experiment trackers export, as rows of one long table: a row a run and step, a column a metric."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from towtank.laws.table import Table

SCALARS = ("Wall time", "Step", "Value")  # the columns of one tag that TensorBoard lets download
_DOWNLOAD = re.compile(r"run-(.+?)-tag-(.+)\.(?:csv|json)")
_CHART = re.compile(r"(.+) - (.+?)(__MIN|__MAX)?")

Rows = list[dict[str, Any]]


def is_wandb_chart(table: Table) -> bool:
    """Whether this is a chart exported by wandb: a step, then a column "run - metric" for every run.

    Example:
        >>> is_wandb_chart({"Step": [1], "small - loss": [3.5], "small - loss__MIN": [3.5]})
        True
    """
    others = list(table)[1:]
    return bool(others) and all(_CHART.fullmatch(name) for name in others)


def from_wandb_chart(table: Table) -> Rows:
    """A row for every run and step at which it has a value; the ranges of smoothed charts (__MIN, __MAX) are left out.

    Example:
        >>> from_wandb_chart({"Step": [1, 2], "a - loss": [3.5, None], "b - loss": [3.4, 3.3]})
        [{'run': 'a', 'Step': 1, 'loss': 3.5}, {'run': 'b', 'Step': 1, 'loss': 3.4}, {'run': 'b', 'Step': 2, 'loss': 3.3}]
    """
    step, *others = table
    read: Rows = []
    for name in others:
        match = _CHART.fullmatch(name)
        if match and not match[3]:
            values = zip(table[step], table[name], strict=True)
            read += [{"run": match[1], step: at, match[2]: v} for at, v in values if not _missing(v)]
    return merge(read, step)


def is_scalars(table: Table) -> bool:
    """Whether this is one tag of one run, downloaded from TensorBoard."""
    return tuple(table) == SCALARS


def from_scalars(table: Table, file: str) -> Rows:
    """Rows of one downloaded tag; run and tag are told by the name of the file, `run-RUN-tag-TAG.csv`.

    Example:
        >>> from_scalars({"Wall time": [17.0], "Step": [1], "Value": [3.5]}, "run-small-tag-loss.csv")
        [{'run': 'small', 'step': 1, 'loss': 3.5}]
    """
    match = _DOWNLOAD.fullmatch(file)
    run, tag = match.groups() if match else (None, "value")
    who = {} if run is None else {"run": run}
    return [who | {"step": step, tag: v} for step, v in zip(table["Step"], table["Value"], strict=True)]


def merge(read: Iterable[dict[str, Any]], step: str = "step") -> Rows:
    """Rows of the same run and step made one, in order of appearance.

    Example:
        >>> merge([{"run": "a", "step": 1, "loss": 3.5}, {"run": "a", "step": 1, "lr": 0.1}])
        [{'run': 'a', 'step': 1, 'loss': 3.5, 'lr': 0.1}]
    """
    merged: dict[tuple[Any, Any], dict[str, Any]] = {}
    for row in read:
        merged.setdefault((row.get("run"), row[step]), {}).update(row)
    return list(merged.values())


def read_events(files: Sequence[Path], root: Path) -> Rows:
    """Rows of TensorBoard's event files; a run is a folder below `root`.

    Raises:
        ImportError: if tensorboard is not installed.
        ValueError: if they hold no scalars.
    """
    try:
        from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # pyright: ignore[reportMissingImports]
        from tensorboard.util.tensor_util import make_ndarray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ImportError(
            f"{root}: event files need the package tensorboard; install it, or download the scalars from its page as CSV"
        ) from None
    read: Rows = []
    for folder in sorted({file.parent for file in files}):
        events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()  # 0: keep all of them
        run = str(folder.relative_to(root))
        for tag in events.PluginTagToContent("scalars") if "scalars" in _plugins(events) else ():
            read += [
                {"run": run, "step": e.step, tag: float(make_ndarray(e.tensor_proto))} for e in events.Tensors(tag)
            ]
    if not read:
        raise ValueError("expected scalars in the event files, got none")
    return merge(read)


def _plugins(events: Any) -> set[str]:
    named = (events.SummaryMetadata(tag).plugin_data.plugin_name for tag in events.Tags()["tensors"])
    return set(named)


def _missing(value: Any) -> bool:
    return value is None or value != value
