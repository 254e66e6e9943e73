"""Cells hold all that decides a run; ensembles are the members that may train together."""

from __future__ import annotations

import itertools
import math

import light_task
import msgspec
import pytest

from towtank.record.errors import ConfigError
from towtank.record.record import Loss, Record
from towtank.study.config import Refine, Study, Verify
from towtank.study.grid import Describer, cell_id, ensemble_key, expand, make_jobs
from towtank.study.run import sweep
from towtank.study.stages import extend_cells, refine_cells, verify_cells
from towtank.train.settings import LATER_KEYS, MEMBER_KEYS, TRAINING_KEYS

STUDY = Study(
    name="x",
    task=light_task.TASK,
    grid={"kind": ["a", "b"], "width": [32, 64], "lr": {"log2": [-12, -4]}, "seed": [0, 1]},
    refine=Refine(seeds=(2,), points=3),
    verify=Verify(target=256, seeds=(0, 1)),
)
CELLS = expand(STUDY)[0]
RUNS = Describer(light_task.describe).runs(CELLS, "grid")


def records(cells, loss=light_task.loss, status="done", stage="grid") -> list[Record]:
    made = []
    for cell in cells:
        out = Loss(initial=5.5, final=loss(cell) if status == "done" else None)
        made.append(Record(id=cell_id(cell, "light"), config=cell, status=status, steps=200, loss=out, stage=stage))
    return made


def test_a_cell_holds_everything_that_decides_its_run() -> None:
    assert len(CELLS) == 2 * 2 * 9 * 2
    task = {"task", "width", "depth", "kind", "sleep", "trace", "fault"}
    assert set(CELLS[0]) == (MEMBER_KEYS | TRAINING_KEYS | task) - LATER_KEYS
    assert len({run.id for run in RUNS}) == len(CELLS)


def test_identity_depends_on_every_key_and_the_corpus_and_on_no_order() -> None:
    cell = CELLS[0]
    assert cell_id(dict(reversed(cell.items())), "light") == cell_id(cell, "light")
    changed = [cell | {key: "other"} for key in cell]
    ids = {cell_id(c, "light") for c in [cell, *changed]} | {cell_id(cell, "another corpus")}
    assert len(ids) == len(cell) + 2


def test_one_and_one_point_zero_are_one_run() -> None:
    for lr in (1, 1.0):
        study = Study(name="x", task=light_task.TASK, grid={"width": [2], "lr": [lr]})
        assert expand(study)[0][0]["lr"] == 1.0 and isinstance(expand(study)[0][0]["lr"], float)


def test_describe_is_asked_once_for_each_ensemble() -> None:
    asked = []
    describer = Describer(lambda cell: asked.append(cell) or light_task.describe(cell))
    describer.runs(CELLS, "grid")
    assert len(asked) == 4


def test_what_the_task_refuses_is_an_error_of_the_study() -> None:
    study = Study(name="x", task=light_task.TASK, grid={"width": [33], "lr": [0.1]})
    with pytest.raises(ConfigError, match="width = 33: expected a multiple of 2") as caught:
        Describer(light_task.describe).runs(expand(study)[0], "grid")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyError("corpus"), RuntimeError("shapes\n(2, 3)"), AttributeError("no digest")])
def test_any_error_of_a_task_that_cannot_be_built_is_one_line_naming_task_and_type(error: Exception) -> None:
    def fail(cell):
        raise error

    with pytest.raises(ConfigError) as caught:
        Describer(fail).runs(CELLS, "grid")
    said = str(caught.value)
    assert light_task.TASK in said and f"got {type(error).__name__}: " in said and "\n" not in said


@pytest.mark.parametrize(("workers", "memory"), [*itertools.product([1, 2, 8], [1.0, 300.0, 1e9])])
def test_jobs_hold_each_run_once_and_fit_memory_and_workers(workers: int, memory: float) -> None:
    jobs = make_jobs(RUNS, workers=workers, memory=memory)
    assert sorted(run.id for job in jobs for run in job.runs) == sorted(run.id for run in RUNS)
    costs = [job.cost for job in jobs]
    assert costs == sorted(costs, reverse=True)
    for job in jobs:
        assert len({ensemble_key(run.cell) for run in job.runs}) == 1
        assert len(job.runs) == 1 or len(job.runs) * job.runs[0].about.member_bytes <= memory / workers
    if workers > 1:
        assert len(jobs) >= 2 * workers
    if workers == 1 and memory == 1e9:
        assert len(jobs) == 4


def test_refinement_adds_seeds_at_the_rates_around_each_optimum() -> None:
    planned = refine_cells(STUDY, CELLS, records(CELLS))
    assert planned.notes == []
    for kind, width in itertools.product(["a", "b"], [32, 64]):
        rates = sorted(c["lr"] for c in planned.cells if (c["kind"], c["width"]) == (kind, width))
        nearest = 2.0 ** round(math.log2(0.1 / width))
        assert rates == [nearest / 2, nearest, nearest * 2]
    assert {cell["seed"] for cell in planned.cells} == {2} and set(planned.cells[0]) == set(CELLS[0])


def test_refinement_leaves_edges_and_unfinished_sizes_alone() -> None:
    edge = refine_cells(STUDY, CELLS, records(CELLS, loss=lambda cell: cell["lr"]))
    assert edge.cells == [] and len(edge.notes) == 4 and "edge of the grid" in edge.notes[0]
    assert refine_cells(STUDY, CELLS, records(CELLS, status="diverged")).cells == []
    assert refine_cells(STUDY, CELLS, []).cells == []


def test_a_rate_at_which_one_seed_diverged_is_not_the_best() -> None:
    made = records(CELLS)
    best = min(made[:18], key=lambda r: r.loss.final)
    made = [r if r is not best else records([r.config], status="diverged")[0] for r in made]
    planned = refine_cells(STUDY, CELLS, made)
    rates = sorted(c["lr"] for c in planned.cells if c["kind"] == "a" and c["width"] == 32)
    assert best.config["lr"] != rates[1]


def test_verification_tries_the_target_around_the_rate_of_each_arm() -> None:
    seen = []

    def predict(own, size):
        seen.append({(r.config["kind"], r.stage) for r in own})
        return (0.1 / size, "") if own[0].config["kind"] == "a" else (None, "not bracketed")

    made = records(CELLS) + records([CELLS[0] | {"width": 256}], stage="verify")
    planned = verify_cells(STUDY, CELLS, made, predict)
    assert seen == [{("a", "grid")}, {("b", "grid")}]
    assert planned.notes == ["kind=b: not verified, no prediction (not bracketed)"]
    tried = [(c["kind"], c["width"], c["lr"], c["seed"]) for c in planned.cells]
    rates = [0.000195, 0.000391, 0.000781]
    assert tried == [("a", 256, rate, seed) for rate in rates for seed in (0, 1)]
    assert all(type(cell["width"]) is int for cell in planned.cells)


def test_equal_compute_gives_a_smaller_size_more_seeds() -> None:
    study = msgspec.structs.replace(STUDY, refine=Refine(seeds=(2, 5), points=1, equal_compute=True))
    found: dict[float, set[int]] = {}
    for cell in refine_cells(study, CELLS, records(CELLS)).cells:
        found.setdefault(cell["width"], set()).add(cell["seed"])
    assert found == {64: {2, 5}, 32: {2, 5, 6, 7}}


def test_a_verification_with_its_best_at_an_edge_is_widened_to_that_side() -> None:
    arm = next(cell for cell in CELLS if cell["kind"] == "a")
    cells = [arm | {"width": 256, "lr": 0.01 * 2**k, "seed": s} for k in (-1, 0, 1) for s in (0, 1)]

    def widened(loss, bracketed=None) -> set[tuple[float, int]]:
        made = records(cells, loss=loss, stage="verify")
        return {(c["lr"], c["seed"]) for c in extend_cells(STUDY, cells, made, bracketed).cells}

    assert widened(lambda cell: cell["lr"]) == {(0.0025, 0), (0.0025, 1)}
    assert widened(lambda cell: -cell["lr"]) == {(0.04, 0), (0.04, 1)}
    assert widened(lambda cell: abs(cell["lr"] - 0.01)) == set()
    assert widened(lambda cell: cell["lr"], lambda own, size_axis: size_axis == "width") == set()


def test_mup_at_the_base_width_and_sp_are_trained_once_and_recorded_twice(tmp_path) -> None:
    trained = []

    def work(cells, *, device, on_step):
        trained.extend(cells)
        return light_task.work(cells, device=device, on_step=on_step)

    grid = {"parametrization": ["sp", "mup"], "width": [32, 64], "lr": [0.1], "seed": [0]}
    study = Study(name="x", task=light_task.TASK, grid=grid, fixed={"base_width": 32})
    swept = sweep(study, tmp_path, workers=1, work=work, describe=light_task.describe)
    assert len(swept.records) == 4 and len(trained) == 3
    at_base = [r for r in swept.records if r.config["width"] == 32]
    assert {r.config["parametrization"] for r in at_base} == {"sp", "mup"}
    assert at_base[0].loss == at_base[1].loss and at_base[0].id != at_base[1].id
    assert sweep(study, tmp_path, workers=1, work=work, describe=light_task.describe).ran == 0
