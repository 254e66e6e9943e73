"""Where ensembles train: this process, or a pool of long-lived worker processes.

Any other `concurrent.futures.Executor` may be passed to a sweep as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

from towtank.record.errors import plain
from towtank.study.grid import Cell

HEARTBEAT_S = 1.0
Work = Callable[..., Sequence[Any]]
"""`work(cells, *, device, on_step)` -> one result for each cell, as `towtank.train.cells.train_cells`."""

_counter: Any = None  # set in each worker by its initializer: member-steps times their cost, shared with the parent


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of an ensemble; exceptions travel as text, since not every exception survives pickling."""

    kind: Literal["ok", "failed", "oom"]
    results: list[Any] = field(default_factory=list)
    reason: str = ""


class InProcessExecutor(Executor):
    """Runs each call at once, in the calling thread. Ctrl-C passes through."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call `fn` and return its finished future."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class WorkerPool(ProcessPoolExecutor):
    """Spawned, long-lived workers with a fixed number of torch threads.

    Args:
        workers: how many.
        threads: torch threads of each.
        counter: a shared double the workers add the cost of each finished step to; see `step_counter`.

    They ignore Ctrl-C (their parent decides) and exit by themselves when their parent dies.
    """

    def __init__(self, workers: int, *, threads: int = 1, counter: Any = None) -> None:
        super().__init__(
            max_workers=workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(threads, counter, os.getpid()),
        )

    def kill(self) -> None:
        """End all workers at once; what they were doing is lost."""
        processes = list((self._processes or {}).values())
        self.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            with contextlib.suppress(OSError, ValueError):
                process.kill()


def step_counter() -> Any:
    """A double that this process and its workers share."""
    return multiprocessing.get_context("spawn").Value("d", 0.0)


def counted(counter: Any) -> float:
    """What a counter shows, read without its lock: a worker may have died with it."""
    return counter.get_obj().value


def use_counter(counter: Any) -> None:
    """Count the steps that this process makes itself."""
    global _counter
    _counter = counter


def run_job(work: Work, cells: Sequence[Cell], device: str, step_cost: float) -> Outcome:
    """Train one ensemble; runs in a worker, never raises an ordinary exception.

    Args:
        work: what trains the cells.
        cells: the members.
        device: where.
        step_cost: what one step of one member adds to the counter.
    """
    try:
        results = list(work(cells, device=device, on_step=_count(step_cost * len(cells))))
    except Exception as error:  # any error of the user's task is a result
        kind = "oom" if _out_of_memory(error) else "failed"
        return Outcome(kind=kind, reason=_reason(error))
    finally:
        _free_device_memory()
    if len(results) != len(cells):
        return Outcome(kind="failed", reason=f"expected {len(cells)} results, got {len(results)}")
    return Outcome(kind="ok", results=results)


def usable_cpus() -> int:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _count(cost: float) -> Callable[[int, int], None]:
    def on_step(step: int, alive: int) -> None:
        if _counter is not None:
            with _counter.get_lock():
                _counter.value += cost

    return on_step


def _out_of_memory(error: Exception) -> bool:
    text = str(error)
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def _reason(error: Exception) -> str:
    """Type, message and place of an error in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return plain(f"{type(error).__name__}: {' '.join(str(error).split())[:400]}{place}")


def _free_device_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _start_worker(threads: int, counter: Any, parent: int) -> None:
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)  # torch, when imported, reads them
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    keep_freed_memory()
    use_counter(counter)
    if (torch := sys.modules.get("torch")) is not None:  # the main script imports it, which was before this
        torch.set_num_threads(threads)


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(HEARTBEAT_S)
    os._exit(1)


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks in place of returning them to the system after each step (about 10 % faster)."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
