"""The owner of submitted jobs: workers that die, ensembles that do not fit, jobs that raise."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import replace
from typing import Any

from towtank.study.executors import (
    InProcessExecutor,
    Outcome,
    Work,
    WorkerPool,
    counted,
    run_job,
    step_counter,
    usable_cpus,
    use_counter,
)
from towtank.study.grid import Job

MAX_ATTEMPTS = 3
_MOST_THREADS = 4  # models this small gain nothing from more
_Running = dict[Future[Outcome], Job]


class Crew:
    """Runs jobs on an executor and owns them until they have an outcome.

    Args:
        work: what trains the cells of a job; must be importable by name in a worker process.
        device: where.
        workers: how many jobs at a time; with one, and no executor, they run in this process.
        executor: the user's own; kept open, and not renewed if it breaks.
    """

    def __init__(self, work: Work, device: str, workers: int, executor: Executor | None = None) -> None:
        self._work, self._device, self.workers = work, device, workers
        self._own = executor is None
        self._counter = self._new_counter()
        self._counted = 0.0  # by the workers before these
        self._executor = executor or self._new_executor()
        self._out_of_memory_at = float("inf")

    @property
    def kind(self) -> str:
        """Name of the executor, for the record."""
        return f"{type(self._executor).__name__}({self.workers})"

    def progress(self) -> float:
        """Cost of all steps made so far."""
        return self._counted + counted(self._counter)

    def outcomes(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Every job with its outcome, as they end; a job out of memory is split, one whose worker died is tried again."""
        waiting, running = deque(jobs), _Running()
        while waiting or running:
            for job in [job for job in waiting if self._too_big(job)]:
                waiting.remove(job)
                yield job, Outcome(kind="oom", reason="skipped: a run that needs less memory was out of memory")
            self._fill(waiting, running)
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            results = [(running.pop(future), _outcome(future)) for future in ended]
            if any(outcome is None for _, outcome in results):  # then every job of the pool ends
                wait(running)
                results += [(job, _outcome(future)) for future, job in running.items()]
                running.clear()
                self._renew()
            for job, outcome in results:
                yield from self._settle(job, outcome, waiting)

    def close(self, *, kill: bool = False) -> None:
        """Let the workers go; with `kill`, at once."""
        if self._own and kill and isinstance(self._executor, WorkerPool):
            self._executor.kill()
        elif self._own:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def _settle(self, job: Job, outcome: Outcome | None, waiting: deque[Job]) -> Iterator[tuple[Job, Outcome]]:
        if outcome is None:
            job = replace(job, attempts=job.attempts + 1)
            if self._own and job.attempts < MAX_ATTEMPTS:
                waiting.append(job)
            else:
                yield job, Outcome(kind="failed", reason=f"its worker process died ({job.attempts} attempts)")
        elif outcome.kind == "oom" and len(job.runs) > 1:
            waiting.extendleft(job.halves())
        else:
            if outcome.kind == "oom":
                self._out_of_memory_at = min(self._out_of_memory_at, *(run.about.member_bytes for run in job.runs))
            yield job, outcome

    def _fill(self, waiting: deque[Job], running: _Running) -> None:
        """Submit what fits; a job whose worker died twice runs alone, so that it takes no other down with it."""
        while waiting and len(running) < self.workers:
            suspect = any(job.attempts >= 2 for job in (waiting[0], *running.values()))
            if suspect and running:
                return
            job = waiting.popleft()
            cells = [run.cell for run in job.runs]
            cost = job.cost / len(job.runs) / max(1, int(cells[0]["steps"] or 1))
            try:
                running[self._executor.submit(run_job, self._work, cells, self._device, cost)] = job
            except BrokenExecutor:  # an idle worker died
                waiting.appendleft(job)
                if running or not self._own:
                    running[_broken()] = waiting.popleft()
                    return
                self._renew()

    def _too_big(self, job: Job) -> bool:
        return job.runs[0].about.member_bytes > self._out_of_memory_at

    def _renew(self) -> None:
        if self._own:
            self.close(kill=True)
            self._counted, self._counter = self.progress(), self._new_counter()
            self._executor = self._new_executor()

    def _new_counter(self) -> Any:
        """Never that of workers who died: one of them may hold its lock for ever."""
        return step_counter() if self._own and self.workers > 1 else _LocalCounter()

    def _new_executor(self) -> Executor:
        if self.workers == 1:
            use_counter(self._counter)
            return InProcessExecutor()
        threads = max(1, min(_MOST_THREADS, usable_cpus() // self.workers))
        return WorkerPool(self.workers, threads=threads, counter=self._counter)


class _LocalCounter:
    """What `step_counter` is, for one process."""

    def __init__(self) -> None:
        self.value = 0.0

    def get_obj(self) -> _LocalCounter:
        return self

    def get_lock(self) -> Any:
        from contextlib import nullcontext

        return nullcontext()


def _outcome(future: Future[Outcome]) -> Outcome | None:
    """What came of a job; None if its executor broke."""
    try:
        return future.result()
    except BrokenExecutor:
        return None
    except Exception as error:  # what an executor of the user may raise
        return Outcome(kind="failed", reason=f"{type(error).__name__}: {' '.join(str(error).split())[:400]}")


def _broken() -> Future[Outcome]:
    future: Future[Outcome] = Future()
    future.set_exception(BrokenExecutor())
    return future
