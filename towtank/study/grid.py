"""From a study to cells, from cells to the ensembles that train them."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from towtank.record.errors import ConfigError
from towtank.record.record import Scalar, Stage, canonical
from towtank.study.axes import axis_values
from towtank.study.config import Study
from towtank.study.keys import Keys
from towtank.train.cells import canonical as effective
from towtank.train.cells import own_numbers
from towtank.train.planner import largest_ensemble
from towtank.train.settings import LATER_KEYS, MEMBER_KEYS

Cell = dict[str, Scalar]
JOBS_PER_WORKER = 2
# Fitted to bench/ensemble.py (CPU, one thread, widths 32 to 256): a step takes as long as flops + _SMALL * sqrt(flops)
# operations of a large matrix product; the second term stands for all that is not one.
_SMALL = 5.3e4


class Description(Protocol):
    """What a run would cost, and on what data; see `towtank.train.cells.Description`."""

    @property
    def corpus(self) -> str: ...  # noqa: D102
    @property
    def parameters(self) -> int: ...  # noqa: D102
    @property
    def member_bytes(self) -> int: ...  # noqa: D102
    @property
    def flops_per_step(self) -> float: ...  # noqa: D102


Describe = Callable[[Cell], Description]


@dataclass(frozen=True, kw_only=True)
class Run:
    """A cell with its identity and cost."""

    id: str
    cell: Cell
    stage: Stage
    about: Description

    @property
    def training(self) -> str:
        """What is trained: runs that agree in it are one and the same (muP at the base width, say, and `sp`)."""
        return cell_id(effective(self.cell), self.about.corpus)

    @property
    def cost(self) -> float:
        """Cost of the whole run, in operations of a large matrix product that take as long."""
        flops = max(1.0, self.about.flops_per_step)
        return int(self.cell["steps"] or 1) * (flops + _SMALL * math.sqrt(flops))


@dataclass(frozen=True, kw_only=True)
class Job:
    """Runs that train together as one ensemble, and how often that was tried."""

    runs: tuple[Run, ...]
    attempts: int = 0

    @property
    def cost(self) -> float:
        """Cost of the whole job."""
        return sum(run.cost for run in self.runs)

    def halves(self) -> tuple[Job, Job]:
        """Two jobs of half the members."""
        middle = len(self.runs) // 2
        return replace(self, runs=self.runs[:middle]), replace(self, runs=self.runs[middle:])


def expand(study: Study, keys: Keys | None = None) -> tuple[list[Cell], list[str]]:
    """The cells of a study's grid, each with every default filled in, and notes on what was merged.

    Args:
        study: the study.
        keys: as `study.check_task` returned them; found anew when left out.

    Raises:
        ConfigError: if the study does not fit its task.

    Example:
        >>> cells, notes = expand(Study(name="mine", grid={"width": [32], "lr": [0.01, 0.02]}))
        >>> len(cells), cells[0]["steps"]
        (2, 200)
    """
    keys = keys or study.check_task()
    axes: list[list[Scalar]] = []
    notes: list[str] = []
    for name, axis in study.grid.items():
        values, merged = axis_values(keys.of(name), axis)
        axes.append(values)
        notes += merged
    base = _defaults(study, keys)
    chosen = [dict(zip(study.grid, values, strict=True)) for values in itertools.product(*axes)]
    return [own_numbers(base | cell, set(study.fixed) | set(study.grid)) for cell in chosen], notes


def cell_id(cell: Mapping[str, Scalar], corpus: str) -> str:
    """Identity of a run: a hash of all that decides it.

    Example:
        >>> cell_id({"lr": 0.1, "width": 32}, "") == cell_id({"width": 32, "lr": 0.1}, "")
        True
    """
    return hashlib.sha256(canonical({"cell": dict(cell), "corpus": corpus}).encode()).hexdigest()[:16]


class Describer:
    """Describes cells, asking `describe` once for all that differ only in their numbers.

    Args:
        describe: what describes one cell; its errors mean a study that cannot be built.
    """

    def __init__(self, describe: Describe) -> None:
        self._describe = describe
        self._known: dict[str, Description] = {}

    def run(self, cell: Cell, stage: Stage) -> Run:
        """The run of a cell.

        Raises:
            ConfigError: if the task cannot be built from the cell.
        """
        group = ensemble_key(cell)
        if group not in self._known:
            try:
                self._known[group] = self._describe(cell)
            except Exception as error:  # the user's task may fail in any way
                why = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
                raise ConfigError("task", f"cells that it can build, got {why}", value=cell["task"]) from error
        about = self._known[group]
        return Run(id=cell_id(cell, about.corpus), cell=cell, stage=stage, about=about)

    def runs(self, cells: Iterable[Cell], stage: Stage) -> list[Run]:
        """The runs of cells, each once."""
        return list({run.id: run for run in (self.run(cell, stage) for cell in cells)}.values())


def ensemble_key(cell: Cell) -> str:
    """What members of one ensemble have in common: everything but their numbers."""
    return canonical({key: value for key, value in cell.items() if key not in MEMBER_KEYS})


def same_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by what is trained for them; one training serves all of a list."""
    same: dict[str, list[Run]] = {}
    for run in runs:
        same.setdefault(run.training, []).append(run)
    return same


def make_jobs(runs: Sequence[Run], *, workers: int, memory: float, device: str = "cpu") -> list[Job]:
    """Group runs into ensembles, the longest job first.

    Args:
        runs: what is to be run.
        workers: jobs that run at a time.
        memory: bytes for all of them together.
        device: where they run.

    Returns:
        Jobs small enough for the memory and, with several workers, to keep all of them busy.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(ensemble_key(run.cell), []).append(run)
    share = sum(run.cost for run in runs) / (JOBS_PER_WORKER * workers) if workers > 1 else math.inf
    jobs: list[Job] = []
    for members in groups.values():
        fit = int(memory / workers / max(1, members[0].about.member_bytes))
        most = min(largest_ensemble(device, members[0].about.parameters), fit, share / members[0].cost)
        jobs += [Job(runs=tuple(part)) for part in _even_parts(members, max(1, int(most)))]
    return sorted(jobs, key=lambda job: -job.cost)


def _even_parts(members: list[Run], most: int) -> list[list[Run]]:
    parts = math.ceil(len(members) / most)
    edges = [len(members) * i // parts for i in range(parts + 1)]
    return [members[a:b] for a, b in itertools.pairwise(edges)]


def _defaults(study: Study, keys: Keys) -> Cell:
    """What a cell holds where the grid says nothing."""
    known = {n: key.default for n, key in keys.known.items() if not key.required and n not in LATER_KEYS}
    fixed = {name: keys.of(name).coerce(value) for name, value in study.fixed.items()}
    return {"task": study.task, **known, "size_key": study.size, **fixed}  # type: ignore[dict-item]
