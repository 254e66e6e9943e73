"""Run a study: its grid, more seeds around each optimum, the target size. One record a run; what is there is not run again."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from towtank.record.errors import ConfigError
from towtank.record.record import Loss, Record, Stage
from towtank.study.config import Study
from towtank.study.crew import Crew
from towtank.study.environment import available_memory, differences, environment
from towtank.study.executors import Outcome, Work, usable_cpus
from towtank.study.folder import StudyFolder
from towtank.study.grid import Cell, Describe, Describer, Job, Run, expand, make_jobs, same_runs
from towtank.study.progress import Silent
from towtank.study.stages import Planned, extend_cells, refine_cells, target_cells, verify_cells

_MOST_WORKERS = 16
_WORKER_BYTES = 3e8  # torch and a corpus, before any ensemble
MAX_EXTENSIONS = 2  # octaves by which a verification that does not bracket its optimum is widened
FINAL = ("done", "diverged", "oom")  # a failed run is tried again by the next sweep
Predict = Callable[..., Sequence[Any]]
"""`predict(records, size, size_axis=...)` -> predictions, as `towtank.report.answer.predict`."""
Bracketed = Callable[..., bool]
"""`bracketed(records, size_axis=...)`: whether the records of one arm, verification included, tell the optimum of the target."""


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What a sweep left behind.

    Args:
        folder: where the records are.
        records: those of this study, in the order of its cells.
        ran: how many of them are new.
        notes: what the user should know: merged values, damaged records, arms that were not verified.
        damaged: how many records were damaged; their runs were run again.
    """

    folder: Path
    records: tuple[Record, ...]
    ran: int
    notes: tuple[str, ...]
    damaged: int = 0

    @property
    def counts(self) -> dict[str, int]:
        """Number of runs by status."""
        return dict(Counter(record.status for record in self.records))


def sweep(
    study: Study,
    out: Path | str,
    *,
    predict: Predict | None = None,
    bracketed: Bracketed | None = None,
    executor: Executor | None = None,
    workers: int | None = None,
    device: str = "cpu",
    memory: float | None = None,
    progress: Silent | None = None,
    work: Work | None = None,
    describe: Describe | None = None,
) -> Swept:
    """Run what is missing of a study.

    Args:
        study: the study.
        out: its folder; made if need be, locked while the sweep lasts.
        predict: what names the learning rate of the target size, such as `towtank.report.answer.predict`; without it
            nothing is verified.
        bracketed: whether the runs of one arm tell where the target's optimum is, such as
            `towtank.report.answer.bracketed`; without it, whether their lowest loss lies inside.
        executor: where ensembles are trained; by default worker processes, or this process if `workers` is 1.
        workers: ensembles trained at a time; by default one for each processor, one on an accelerator.
        device: torch's name of the device.
        memory: bytes the ensembles may take together; by default half of what is free.
        progress: what shows how far the sweep is.
        work: what trains the cells of an ensemble; by default `towtank.train.cells.train_cells`.
        describe: what tells a cell's size, cost and data; by default `towtank.train.cells.describe`.

    Raises:
        ConfigError: if the study does not fit its task.
        FolderError: if the folder is in use or cannot be written; what is done is saved.

    Example:
        >>> swept = sweep(load_study("lr-transfer"), "runs/lr-transfer", predict=predict)  # doctest: +SKIP
    """
    if executor is None and multiprocessing.parent_process() is not None:
        raise ConfigError(
            "sweep", "to be called under `if __name__ == '__main__':`; worker processes import the script anew"
        )
    cells, notes = expand(study)
    describing = describer(describe)
    describing.runs(cells, "grid")  # a study that cannot be built leaves no trace
    if predict is not None:
        describing.runs(target_cells(study, cells), "verify")  # and is not found out after hours of training
    folder = StudyFolder(out)
    folder.create()
    workers = workers or default_workers(device, executor)
    with folder.locked(), _crew(work or _train_cells(), device, workers, executor) as crew:
        runner = Runner(study, folder, crew, progress or Silent(), describing, device, memory)
        with runner.progress:
            runner.open(notes)
            runner.stage("grid", Planned(cells, []))
            runner.stage("refine", refine_cells(study, cells, runner.current()))
            runner.verify(_verify(study, cells, runner.current(), predict), bracketed)
        return runner.swept()


class Runner:
    """One sweep in progress: knows the records, runs the missing cells of a stage, saves what comes."""

    def __init__(
        self, study: Study, folder: StudyFolder, crew: Crew, progress: Silent, describer: Describer, device: str,
        memory: float | None,
    ) -> None:  # fmt: skip
        self.study, self.folder, self.crew, self.progress = study, folder, crew, progress
        self._device, self._describer, self._memory = device, describer, memory or available_memory(device)
        self._environment = environment(device, crew.kind)
        self._records: dict[str, Record] = {}
        self._wanted: dict[str, None] = {}  # ids of this study, in order
        self._notes: list[str] = []
        self._ran = self._damaged = 0

    def open(self, notes: list[str]) -> None:
        """Read what is there, and keep the study beside it."""
        records, problems = self.folder.load(quarantine=True)
        self._records = {record.id: record for record in records}
        self._damaged = len(problems)
        changed = self.folder.save_study(self.study)
        for problem in problems:
            self._note(f"{problem}; set aside as .damaged, its run is run again")
        for note in notes:
            self._note(note)
        if changed:
            self._note("the folder held another study: its records stay, and are arms of their own in the report")
        if records and (changes := differences(records[-1].environment, self._environment)):
            self._note(f"not all records are of one environment: {', '.join(changes)}")

    def stage(self, stage: Stage, planned: Planned) -> None:
        """Run the missing cells of a stage."""
        for note in planned.notes:
            self._note(note)
        runs = self._describer.runs(planned.cells, stage)
        self._wanted |= dict.fromkeys(run.id for run in runs)
        missing = [run for run in runs if not self._is_final(run)]
        if not missing:
            return
        same = same_runs(missing)
        jobs = make_jobs(
            [runs[0] for runs in same.values()], workers=self.crew.workers, memory=self._memory, device=self._device
        )
        self.progress.start(stage, len(missing), sum(job.cost for job in jobs), self.crew.progress)
        for job, outcome in self.crew.outcomes(jobs):
            written = [twin for run in job.runs for twin in same[run.training]]
            for record in self._recorded(job, outcome, same):
                self._records[record.id] = self.folder.save(record)
                self._ran += 1
            self.progress.done(len(written), job.cost)
            if outcome.kind != "ok":
                self._note(f"{len(job.runs)} runs {outcome.kind}: {outcome.reason}")

    def verify(self, planned: Planned, bracketed: Bracketed | None) -> None:
        """Run the verification, and widen it where it does not tell the optimum and its best loss lies at an edge."""
        for _ in range(1 + MAX_EXTENSIONS):
            self.stage("verify", planned)
            more = extend_cells(self.study, planned.cells, self.current(), bracketed)
            if not more.cells:
                return
            planned = Planned(planned.cells + more.cells, [])

    def current(self) -> list[Record]:
        """Records of this study's runs."""
        return [self._records[i] for i in self._wanted if i in self._records]

    def swept(self) -> Swept:
        """What the sweep leaves behind."""
        return Swept(
            folder=self.folder.path, records=tuple(self.current()), ran=self._ran, notes=tuple(self._notes),
            damaged=self._damaged,
        )  # fmt: skip

    def _is_final(self, run: Run) -> bool:
        record = self._records.get(run.id)
        if record is None or record.status not in FINAL:
            return False
        if record.stage == "verify" != run.stage:  # now asked for as evidence: no longer a judge
            self._records[run.id] = self.folder.save(msgspec.structs.replace(record, stage=run.stage))
        return True

    def _recorded(self, job: Job, outcome: Outcome, same: dict[str, list[Run]]) -> Iterator[Record]:
        for index, trained in enumerate(job.runs):
            measured: dict[str, Any] = (
                _measured(outcome.results[index]) if outcome.kind == "ok" else _unmeasured(outcome)
            )
            for run in same[trained.training]:
                yield Record(
                    id=run.id, config=run.cell, corpus=run.about.corpus, environment=self._environment, stage=run.stage,
                    study=self.study.name, parameters=int(run.about.parameters), **measured,
                )  # fmt: skip
                measured["time_s"] = 0.0  # trained once

    def _note(self, text: str) -> None:
        self._notes.append(text)
        self.progress.note(text)


def _measured(result: Any) -> dict[str, Any]:
    """Fields of a record from a result, as plain Python numbers."""
    return dict(
        status=str(result.status),
        steps=int(result.steps),
        reason=str(result.reason),
        loss=Loss(initial=_number(result.initial), final=_number(result.final), curve=_curve(result.curve)),
        signals={str(name): _curve(curve) for name, curve in result.signals.items()},
        time_s=float(result.time_s),
    )


def _unmeasured(outcome: Outcome) -> dict[str, Any]:
    return dict(status=outcome.kind, steps=0, loss=Loss(), reason=outcome.reason)


def _curve(points: Sequence[Any]) -> list[tuple[int, float | None]]:
    return [(int(step), _number(value)) for step, value in points]


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _verify(study: Study, cells: Sequence[Cell], records: Sequence[Record], predict: Predict | None) -> Planned:
    if study.verify is None or predict is None:
        return Planned([], [])

    def rate(own: Sequence[Record], size: float) -> tuple[float | None, str]:
        for prediction in predict(own, size, size_axis=study.size):
            if prediction.lr is not None and prediction.verdict.status != "refuse":
                return prediction.lr.value, ""
            return None, prediction.verdict.reason
        return None, "nothing to predict from"

    return verify_cells(study, cells, records, rate)


@contextmanager
def _crew(work: Work, device: str, workers: int, executor: Executor | None) -> Generator[Crew]:
    """A crew that is let go at the end, and killed if the sweep is interrupted."""
    crew = Crew(work, device, workers, executor)
    try:
        yield crew
    except BaseException:
        crew.close(kill=True)
        raise
    crew.close()


def default_workers(device: str, executor: Executor | None) -> int:
    """Ensembles trained at a time when nobody says: one for each processor, as far as memory goes; one on an accelerator."""
    if executor is not None:
        return int(getattr(executor, "_max_workers", 4))
    if device != "cpu":
        return 1
    return max(1, min(usable_cpus(), _MOST_WORKERS, int(available_memory("cpu") / _WORKER_BYTES)))


def describer(describe: Describe | None) -> Describer:
    """What makes runs of cells; `towtank.train.cells.describe` unless another is given."""
    if describe is None:
        from towtank.train.cells import describe
    return Describer(describe)


def _train_cells() -> Work:
    from towtank.train.cells import train_cells

    return train_cells
