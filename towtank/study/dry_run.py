"""What a sweep would cost, found without training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from towtank.record.record import Record, Scalar
from towtank.study.config import Study
from towtank.study.environment import available_memory
from towtank.study.executors import usable_cpus
from towtank.study.folder import StudyFolder
from towtank.study.grid import Cell, Describe, Describer, Run, expand, make_jobs, same_runs
from towtank.study.run import FINAL, MAX_EXTENSIONS, default_workers, describer
from towtank.study.stages import refine_cells, seeds_at

_EVALUATION = 1.1  # the held-out loss before and after


@dataclass(frozen=True, kw_only=True)
class DryRow:
    """Runs of one stage and size."""

    stage: str
    size: float
    runs: int
    done: int
    parameters: int
    time_s: float  # of the runs that are not done, on one worker
    memory: float  # bytes of the largest ensemble
    bound: bool  # the stage depends on results still to come: at most so many runs


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """The plan of a sweep."""

    folder: Path
    axes: dict[str, list[Scalar]]
    rows: tuple[DryRow, ...]
    workers: int
    time_s: float  # wall time of what is left, on all workers
    memory: float  # bytes, all workers together
    notes: tuple[str, ...]

    @property
    def runs(self) -> int:
        """All runs of the study, at most."""
        return sum(row.runs for row in self.rows)

    @property
    def done(self) -> int:
        """Runs whose records are there."""
        return sum(row.done for row in self.rows)


def dry_run(
    study: Study,
    out: Path | str,
    *,
    workers: int | None = None,
    device: str = "cpu",
    memory: float | None = None,
    describe: Describe | None = None,
    rate: float | None = None,
) -> DryRun:
    """Plan a sweep and estimate its cost; trains nothing and writes nothing.

    Args:
        study: the study.
        out: its folder, which need not exist.
        workers: as in `sweep`.
        device: as in `sweep`.
        memory: as in `sweep`.
        describe: as in `sweep`.
        rate: floating-point operations per second of one worker; measured in a tenth of a second when left out.

    Raises:
        ConfigError: if the study does not fit its task.
    """
    cells, notes = expand(study)
    folder = StudyFolder(out)
    records, problems = folder.load() if folder.records.is_dir() else ([], [])
    runs = describer(describe)
    workers = workers or default_workers(device, None)
    rate = rate or measured_rate(device, threads=max(1, usable_cpus() // workers))
    planner = _Planner(runs, records, study.size, workers, memory or available_memory(device), rate, device)
    rows = planner.rows("grid", cells, bound=False)
    left = any(row.done < row.runs for row in rows)
    grid = [record for record in records if record.stage == "grid"]
    rows += planner.rows(
        "refine", _all_refined(study, cells) if left else refine_cells(study, cells, grid).cells, bound=left
    )
    rows += planner.rows("verify", _all_verified(study, cells), bound=True)
    return DryRun(
        folder=Path(out),
        axes={name: list(dict.fromkeys(cell[name] for cell in cells)) for name in study.grid},
        rows=tuple(rows),
        workers=workers,
        time_s=sum(row.time_s for row in rows) / workers,
        memory=max((row.memory for row in rows), default=0.0) * workers,
        notes=(*notes, *problems, *_widening(study)),
    )


def measured_rate(device: str, threads: int = 1) -> float:
    """Floating-point operations per second of large matrix products."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a = torch.ones(512, 512, device=device)
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < 0.1:
            (a @ a).sum().item()
            count += 1
        return 2 * 512**3 * count / (time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)


class _Planner:
    """Rows of a plan: what is done, what the rest takes."""

    def __init__(
        self,
        describer: Describer,
        records: Sequence[Record],
        size: str,
        workers: int,
        memory: float,
        rate: float,
        device: str,
    ) -> None:
        self._describer, self._size, self._workers = describer, size, workers
        self._memory, self._rate, self._device = memory, rate, device
        self._final = {record.id for record in records if record.status in FINAL}
        self._verified = [r for r in records if r.stage == "verify" and r.status in FINAL]

    def rows(self, stage: str, cells: Sequence[Cell], *, bound: bool) -> list[DryRow]:
        """One row for each size of a stage."""
        runs = self._describer.runs(cells, stage)  # type: ignore[arg-type]
        sizes = sorted({float(run.cell[self._size] or 0) for run in runs})
        return [self._row(stage, s, [r for r in runs if r.cell[self._size] == s], bound) for s in sizes]

    def _row(self, stage: str, size: float, runs: list[Run], bound: bool) -> DryRow:
        done = sum(run.id in self._final for run in runs)
        missing = [run for run in runs if run.id not in self._final]
        if stage == "verify":  # their rates are not known yet: count what is there
            done = min(len(runs), sum(r.config.get(self._size) == size for r in self._verified))
            missing = runs[done:]
        trained = [same[0] for same in same_runs(missing).values()]
        jobs = make_jobs(trained, workers=self._workers, memory=self._memory, device=self._device)
        memory = max((len(job.runs) * job.runs[0].about.member_bytes for job in jobs), default=0)
        return DryRow(
            stage=stage, size=size, runs=len(runs), done=done, parameters=runs[0].about.parameters,
            time_s=sum(map(self._seconds, trained)), memory=memory, bound=bound,
        )  # fmt: skip

    def _seconds(self, run: Run) -> float:
        return _EVALUATION * run.cost / self._rate


def _all_refined(study: Study, cells: Sequence[Cell]) -> list[Cell]:
    """As many cells as the refinement can ask for (which rates is not known yet)."""
    if study.refine is None:
        return []
    rates = sorted({cell["lr"] for cell in cells})[: study.refine.points]  # type: ignore[type-var]
    largest = max(float(cell[study.size] or 1) for cell in cells)
    return [
        cell | {"seed": seed}
        for cell in cells
        if cell["lr"] in rates
        for seed in seeds_at(study.refine, float(cell[study.size] or 1), largest)
    ]


def _widening(study: Study) -> list[str]:
    """What a verification may take besides its rows."""
    if study.verify is None:
        return []
    return [
        f"a verification that does not find its optimum is widened by up to {MAX_EXTENSIONS} learning rates for each arm, "
        "not counted here"
    ]


def _all_verified(study: Study, cells: Sequence[Cell]) -> list[Cell]:
    """As many cells as the verification can ask for, at made-up rates."""
    if study.verify is None:
        return []
    target = type(cells[0][study.size])(study.verify.target)  # type: ignore[arg-type, call-arg, misc]
    rate = float(cells[0]["lr"] or 1.0)
    tries = [{"lr": rate * f, "seed": s} for f in study.verify.factors for s in study.verify.seeds]
    return [cell | {study.size: target} | one for cell in cells for one in tries]
