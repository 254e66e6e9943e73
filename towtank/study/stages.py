"""What to run after the grid: more seeds around each optimum, then the target size at the predicted rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from towtank.record.record import Record, Scalar
from towtank.study.config import Refine, Study
from towtank.study.grid import Cell

Predictor = Callable[[Sequence[Record], float], tuple[float | None, str]]
"""Records of one arm and a size -> the learning rate to try there, or None and why it cannot be told."""


@dataclass(frozen=True)
class Planned:
    """Cells to run next, and what is not run and why."""

    cells: list[Cell]
    notes: list[str]


def refine_cells(study: Study, cells: Sequence[Cell], records: Sequence[Record]) -> Planned:
    """Extra seeds at the learning rates nearest the best one of each arm and size.

    Args:
        study: a study; without `refine` there is nothing to do.
        cells: the cells of its grid.
        records: their records.

    Returns:
        The cells, and a note for each size whose best rate lies at the edge of the grid: there, seeds would not help.
    """
    planned = Planned([], [])
    if study.refine is None:
        return planned
    largest = max(float(cell[study.size] or 1) for cell in cells)
    measured: dict[object, list[Record]] = {}
    for record in records:
        if record.stage == "grid":
            measured.setdefault(_without(record.config, ("lr", "seed")), []).append(record)
    for group in _grouped(cells, ("lr", "seed")):
        losses = _mean_losses(measured.get(_without(group[0], ("lr", "seed")), []))
        if not losses:
            continue
        rates = sorted({_rate(cell) for cell in group})
        best = min(losses, key=lambda rate: losses[rate])
        if best in (rates[0], rates[-1]):
            planned.notes.append(
                f"{_label(study, group[0])}: best rate {best:.3g} is at the edge of the grid, not refined"
            )
            continue
        near = sorted(rates, key=lambda rate: abs(math.log(rate / best)))[: study.refine.points]
        seeds = seeds_at(study.refine, float(group[0][study.size] or 1), largest)
        planned.cells.extend(group[0] | {"lr": rate, "seed": seed} for rate in sorted(near) for seed in seeds)
    return planned


def seeds_at(refine: Refine, size: float, largest: float) -> list[int]:
    """The extra seeds of a size."""
    seeds = list(refine.seeds)
    if refine.equal_compute:
        seeds += range(seeds[-1] + 1, seeds[-1] + 1 + round(len(seeds) * (largest / size - 1)))
    return seeds


def target_cells(study: Study, cells: Sequence[Cell]) -> list[Cell]:
    """A cell of the target size for each arm, at a learning rate of the grid: what can be known of it before training."""
    if study.verify is None:
        return []
    return [arm[0] | {study.size: _target(study, arm[0])} for arm in _grouped(cells, (study.size, "lr", "seed"))]


def verify_cells(study: Study, cells: Sequence[Cell], records: Sequence[Record], predict: Predictor) -> Planned:
    """The target size at the predicted learning rate times each factor, for every arm that has a prediction.

    Args:
        study: a study; without `verify` there is nothing to do.
        cells: the cells of its grid.
        records: records of the stages before.
        predict: see `Predictor`.
    """
    planned = Planned([], [])
    if study.verify is None:
        return planned
    free = (study.size, "lr", "seed")
    for arm in _grouped(cells, free):
        key = _without(arm[0], free)
        own = [r for r in records if r.stage != "verify" and _without(r.config, free) == key]
        rate, why = predict(own, study.verify.target) if own else (None, "no run of it has finished")
        if rate is None:
            planned.notes.append(f"{_label(study, arm[0], size=False)}: not verified, no prediction ({why})")
            continue
        planned.cells.extend(
            arm[0] | {study.size: _target(study, arm[0]), "lr": float(f"{rate * factor:.3g}"), "seed": seed}
            for factor in study.verify.factors
            for seed in study.verify.seeds
        )
    return planned


def extend_cells(
    study: Study,
    cells: Sequence[Cell],
    records: Sequence[Record],
    bracketed: Callable[..., bool] | None = None,
) -> Planned:
    """One more learning rate for every arm whose verification found its best loss at an edge: twice or half that rate.

    A verification that does not bracket the optimum says only that the prediction missed, not by how much.

    Args:
        study: a study.
        cells: its verification cells so far.
        records: the records of the study.
        bracketed: whether an arm's records tell the optimum all the same; such an arm is left as it is.
    """
    planned = Planned([], [])
    free = ("lr", "seed")
    for arm in _grouped(cells, free):
        key, whole = _without(arm[0], free), _without(arm[0], (*free, study.size))
        own = [r for r in records if _without(r.config, (*free, study.size)) == whole]
        if bracketed is not None and bracketed(own, size_axis=study.size):
            continue
        losses = _mean_losses([r for r in records if r.stage == "verify" and _without(r.config, free) == key])
        if len(losses) < 2:
            continue
        rates, best = sorted(_rate(cell) for cell in arm), min(losses, key=lambda rate: losses[rate])
        if best not in (rates[0], rates[-1]):
            continue
        rate = float(f"{best * (2 if best == rates[-1] else 0.5):.3g}")
        seeds = dict.fromkeys(cell["seed"] for cell in arm)
        planned.cells.extend(arm[0] | {"lr": rate, "seed": seed} for seed in seeds)
    return planned


def _target(study: Study, cell: Cell) -> Scalar:
    """The target size, as the type that the sizes of the grid have."""
    assert study.verify is not None
    return type(cell[study.size])(study.verify.target)  # type: ignore[arg-type, call-arg, misc]


def _grouped(cells: Sequence[Cell], free: tuple[str, ...]) -> list[list[Cell]]:
    """Cells that agree in all but the free keys."""
    groups: dict[object, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(_without(cell, free), []).append(cell)
    return list(groups.values())


def _without(cell: Cell, free: tuple[str, ...]) -> frozenset[tuple[str, object]]:
    return frozenset((key, value) for key, value in cell.items() if key not in free)


def _mean_losses(records: Sequence[Record]) -> dict[float, float]:
    """Mean final loss of the learning rates at which every run is done."""
    found: dict[float, list[float]] = {}
    for record in records:
        final = record.loss.final if record.status == "done" else None
        found.setdefault(_rate(record.config), []).append(math.inf if final is None else final)
    means = {rate: sum(losses) / len(losses) for rate, losses in found.items()}
    return {rate: mean for rate, mean in means.items() if math.isfinite(mean)}


def _rate(cell: Cell) -> float:
    return float(cell["lr"] or 0.0)


def _label(study: Study, cell: Cell, *, size: bool = True) -> str:
    """The swept keys of a cell that tell it apart, for messages."""
    names = [name for name in study.grid if name not in ("lr", "seed") and (size or name != study.size)]
    return " ".join(f"{name}={cell[name]}" for name in names) or study.name
