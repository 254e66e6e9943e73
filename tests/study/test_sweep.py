"""Sweeps with a task that trains nothing: what is run, how often, and what becomes of the runs that go wrong."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path

import light_task
import pytest

from towtank.estimate import Interval, Verdict
from towtank.record import record as record_module
from towtank.record.errors import ConfigError, FolderError
from towtank.record.record import load_records
from towtank.study.config import Refine, Study, Verify
from towtank.study.crew import Crew
from towtank.study.executors import InProcessExecutor, WorkerPool
from towtank.study.run import Swept, sweep

GRID = {"width": [32, 64], "lr": {"log2": [-12, -5]}, "seed": [0, 1]}


@dataclass
class Forecast:
    lr: Interval | None
    verdict: Verdict


def predict(records, size, *, size_axis):
    assert size_axis == "width" and {r.stage for r in records} <= {"grid", "refine"}
    return [Forecast(Interval(0.1 / size, 0.05 / size, 0.2 / size), Verdict("ok"))]


def refuse(records, size, *, size_axis):
    return [Forecast(None, Verdict("refuse", "not bracketed"))]


def study(**changes) -> Study:
    return Study(**{"name": "x", "task": light_task.TASK, "grid": GRID, **changes})


def run(one: Study, out: Path, **options) -> Swept:
    return sweep(one, out, **{"work": light_task.work, "describe": light_task.describe, "workers": 1, **options})


def trained(trace: Path) -> Counter[str]:
    """How often each (width, lr, seed) was trained."""
    return Counter(line.rsplit(" ", 1)[0] for line in trace.read_text().splitlines()) if trace.exists() else Counter()


def test_three_stages_then_nothing_is_left_to_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    one = study(fixed={"trace": str(trace)}, refine=Refine(seeds=(2, 3)), verify=Verify(target=256, seeds=(0, 1)))
    swept = run(one, tmp_path / "out", predict=predict)
    stages = Counter(record.stage for record in swept.records)
    assert stages == {"grid": 32, "refine": 2 * 3 * 2, "verify": 3 * 2} and swept.ran == 50
    assert swept.counts == {"done": 50} and set(trained(trace).values()) == {1}
    assert {r.config["lr"] for r in swept.records if r.stage == "verify"} == {0.000195, 0.000391, 0.000781}
    assert load_records(tmp_path / "out")[1] == []
    again = run(one, tmp_path / "out", predict=predict)
    assert again.ran == 0 and again.records == swept.records and sum(trained(trace).values()) == 50


def test_an_arm_without_prediction_is_not_verified_and_that_is_said(tmp_path: Path) -> None:
    swept = run(study(verify=Verify(target=256)), tmp_path, predict=refuse)
    assert {record.stage for record in swept.records} == {"grid"}
    assert swept.notes == ("x: not verified, no prediction (not bracketed)",)


def test_divergence_is_a_result(tmp_path: Path) -> None:
    one = study(grid={"width": [32], "lr": [0.01, 1.0]})
    swept = run(one, tmp_path)
    assert swept.counts == {"done": 1, "diverged": 1}
    diverged = next(record for record in swept.records if record.status == "diverged")
    assert diverged.loss.final is None and diverged.steps == 3 and diverged.reason == "loss is NaN at step 3"
    assert load_records(tmp_path)[0] != [] and diverged.loss.initial == 5.5
    assert run(one, tmp_path).ran == 0


def test_eight_workers_run_each_of_200_cells_once(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    grid = {"width": [32, 64], "lr": {"log10": [-4, -1], "points": 25}, "seed": [0, 1, 2, 3]}
    swept = run(study(grid=grid, fixed={"trace": str(trace)}), tmp_path / "out", workers=8)
    assert swept.counts == {"done": 200} and len(trained(trace)) == 200 and set(trained(trace).values()) == {1}
    assert len({line.rsplit(" ", 1)[1] for line in trace.read_text().splitlines()}) > 1


def test_a_killed_worker_costs_only_its_own_job(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    fixed = {"trace": str(trace), "fault": f"kill-once:{tmp_path}/killed", "sleep": 0.05}
    swept = run(study(fixed=fixed), tmp_path / "out", workers=2)
    calm = run(study(fixed={}), tmp_path / "calm")
    assert (tmp_path / "killed").exists() and swept.counts == {"done": 32}
    assert [r.loss for r in swept.records] == [r.loss for r in calm.records]
    for record in swept.records:
        steps = [step for step, _ in record.loss.curve]
        assert steps == sorted(set(steps))


def test_a_worker_that_always_dies_is_given_up_and_tried_again_next_time(tmp_path: Path) -> None:
    one = study(grid={"width": [32], "lr": [0.01], "fault": ["", "kill"]})
    for ran in (2, 1):
        swept = run(one, tmp_path, workers=2)
        assert swept.ran == ran and swept.counts == {"done": 1, "failed": 1}
        failed = next(record for record in swept.records if record.status == "failed")
        assert failed.reason == "its worker process died (3 attempts)" and failed.loss.final is None
        assert any("its worker process died" in note for note in swept.notes)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_exception_is_a_failed_run_with_its_reason(tmp_path: Path, workers: int) -> None:
    one = study(grid={"width": [32], "lr": [0.01, 0.02], "fault": ["", "raise"]})
    swept = run(one, tmp_path, workers=workers)
    assert swept.counts == {"done": 2, "failed": 2}
    reasons = {record.reason for record in swept.records if record.status == "failed"}
    assert len(reasons) == 1 and reasons.pop().startswith("RuntimeError: the task is broken (light_task.py:")
    assert run(one, tmp_path, workers=workers).ran == 2


def test_out_of_memory_halves_the_ensemble_until_it_fits(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    swept = run(study(fixed={"fault": "oom:3", "trace": str(trace)}), tmp_path / "out")
    assert swept.counts == {"done": 32} and max(trained(trace).values()) == 4  # 16, 8, 4, 2


def test_a_run_out_of_memory_alone_is_final_and_larger_ones_are_skipped(tmp_path: Path) -> None:
    def work(cells, **options):
        if cells[0]["width"] >= 64:
            raise MemoryError("too big")
        return light_task.work(cells, **options)

    one = study(grid={"width": [32, 64], "lr": [0.01, 0.001]}, verify=Verify(target=128))
    swept = run(one, tmp_path, work=work, predict=predict)
    by_width = {(r.config["width"], r.status, r.reason.split(":")[0]) for r in swept.records}
    assert by_width == {(32, "done", ""), (64, "oom", "MemoryError"), (128, "oom", "skipped")}
    assert run(one, tmp_path, work=work, predict=predict).ran == 0


def test_memory_bounds_the_ensembles(tmp_path: Path) -> None:
    sizes = []

    def work(cells, **options):
        sizes.append(len(cells) * cells[0]["width"])
        return light_task.work(cells, **options)

    run(study(), tmp_path, work=work, memory=150.0)
    assert max(sizes) <= 150 and len(sizes) == 4 + 8


def test_torn_and_changed_records_are_set_aside_and_run_again(tmp_path: Path) -> None:
    first = run(study(), tmp_path)
    files = sorted((tmp_path / "records").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].write_text(files[1].read_text().replace('"steps": 200', '"steps": 201', 1))
    (tmp_path / "records" / ".killed-1.tmp").write_text("half")
    second = run(study(), tmp_path)
    assert second.ran == second.damaged == 2
    assert sum(f"record is damaged: {file}" in note for note in second.notes for file in files[:2]) == 2
    assert [r.loss for r in second.records] == [r.loss for r in first.records]
    names = {path.suffix for path in (tmp_path / "records").iterdir()}
    assert names == {".json", ".damaged"} and load_records(tmp_path)[1] == []


def test_a_full_disk_stops_the_sweep_and_keeps_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [4]
    real = os.fsync

    def fsync(handle: int) -> None:
        if os.fstat(handle).st_size > 1000 and not os.path.isdir(f"/proc/self/fd/{handle}"):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    trace = tmp_path / "trace"
    one = study(fixed={"trace": str(trace)})
    monkeypatch.setattr(record_module.os, "fsync", fsync)
    with pytest.raises(FolderError, match="no space left on the disk"):
        run(one, tmp_path / "out")
    monkeypatch.undo()
    records, problems = load_records(tmp_path / "out")
    assert len(records) == 4 and problems == []
    assert not list((tmp_path / "out" / "records").glob(".*.tmp"))
    assert sum(trained(trace).values()) == 16  # the second ensemble was not begun
    assert run(one, tmp_path / "out").ran == 28


def test_a_folder_that_cannot_be_written_costs_no_compute(tmp_path: Path) -> None:
    def work(cells, **options):
        pytest.fail("trained")

    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError):
        run(study(), tmp_path / "file", work=work)


def test_a_changed_study_adds_runs_and_touches_no_old_one(tmp_path: Path) -> None:
    run(study(), tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "records").iterdir()}
    swept = run(study(fixed={"steps": 300}), tmp_path)
    assert swept.ran == 32 and any("another study" in note for note in swept.notes)
    assert all(path.read_bytes() == text for path, text in before.items())
    assert len(load_records(tmp_path)[0]) == 64 and run(study(), tmp_path).ran == 0


def test_a_verified_run_that_joins_the_grid_becomes_evidence(tmp_path: Path) -> None:
    run(study(verify=Verify(target=128, factors=(1.0,))), tmp_path, predict=predict)
    one = study(grid={"width": [128], "lr": [0.000781]})
    swept = run(one, tmp_path)
    assert swept.ran == 0 and [record.stage for record in swept.records] == ["grid"]


def test_a_study_that_does_not_fit_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        run(study(fixed={"dpeth": 3}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_target_that_cannot_be_built_is_refused_before_the_grid_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="width = 257: expected a multiple of 2"):
        run(study(verify=Verify(target=257)), tmp_path / "out", predict=predict)
    assert not (tmp_path / "out").exists()


def test_a_counter_whose_lock_is_never_released_is_read_and_replaced() -> None:
    crew = Crew(light_task.work, "cpu", workers=2)
    crew._counter.value = 3.0
    lock = crew._counter.get_lock()
    thread = threading.Thread(target=lock.acquire)  # as a worker that was killed with it
    thread.start()
    thread.join()
    assert crew.progress() == 3.0
    crew._renew()
    assert crew._counter.get_lock() is not lock and crew.progress() == 3.0
    crew.close()


def test_any_executor_may_be_passed(tmp_path: Path) -> None:
    class Counting(InProcessExecutor):
        submitted = 0

        def submit(self, *args, **kwargs) -> Future:
            self.submitted += 1
            return super().submit(*args, **kwargs)

    class Breaking(Executor):
        def submit(self, *args, **kwargs) -> Future:
            future: Future = Future()
            future.set_exception(RuntimeError("no node"))
            return future

    counting = Counting()
    assert run(study(), tmp_path / "a", executor=counting, workers=2).counts == {"done": 32} and counting.submitted >= 4
    broken = run(study(), tmp_path / "b", executor=Breaking())
    assert broken.counts == {"failed": 32} and broken.records[0].reason == "RuntimeError: no node"


def test_records_say_where_and_with_what(tmp_path: Path) -> None:
    environment = run(study(), tmp_path).records[0].environment
    names = {"python", "towtank", "torch", "numpy", "platform", "device", "device_name", "cpus", "executor"}
    assert names <= set(environment) and environment["executor"] == "InProcessExecutor(1)"


def test_a_changed_environment_is_said_when_a_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(study(grid={"width": [32], "lr": [0.1]}), tmp_path)
    monkeypatch.setattr("towtank.study.environment._version", lambda name: "9.9")
    notes = run(study(grid={"width": [32], "lr": [0.1, 0.2]}), tmp_path).notes
    assert any(
        note.startswith("not all records are of one environment: towtank") and "-> 9.9" in note for note in notes
    )


def test_workers_are_spawned_never_forked() -> None:
    with WorkerPool(1) as pool:
        assert pool._mp_context.get_start_method() == "spawn"
        assert pool.submit(signal.getsignal, signal.SIGINT).result() == signal.SIG_IGN
        assert pool.submit(os.getenv, "OMP_NUM_THREADS").result() == "1"


PARENT = """
import sys
sys.path.insert(0, sys.argv[3])
import light_task
from towtank.study.config import Study
from towtank.study.run import sweep
if __name__ == "__main__":
    grid = {"width": [32, 64], "lr": [0.01, 0.02, 0.03, 0.04]}
    study = Study(name="x", task=light_task.TASK, grid=grid, fixed={"sleep": 60.0, "trace": sys.argv[2]})
    sweep(study, sys.argv[1], work=light_task.work, describe=light_task.describe, workers=2)
"""


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    script, trace = tmp_path / "parent.py", tmp_path / "trace"
    script.write_text(PARENT)
    command = [sys.executable, str(script), str(tmp_path / "out"), str(trace), str(Path(__file__).parent)]
    parent = subprocess.Popen(command)
    until = time.monotonic() + 60
    while len(workers := _pids(trace)) < 2 and time.monotonic() < until:
        time.sleep(0.1)
    assert len(workers) == 2 and all(map(_alive, workers))
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while any(map(_alive, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(_alive, workers))


def _pids(trace: Path) -> set[int]:
    return {int(line.rsplit(" ", 1)[1]) for line in trace.read_text().splitlines()} if trace.exists() else set()


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
