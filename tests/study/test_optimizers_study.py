"""The optimizer as a key of a study: identity of runs, numbers of a rule's own, arms, and which differences are told."""

from __future__ import annotations

import json
import math

import light_task
import numpy as np
import pytest
from scipy import stats

from towtank.optim import OPTIMIZERS
from towtank.record.errors import ConfigError
from towtank.record.record import Loss, Record
from towtank.report.answer import answer
from towtank.report.comparison import holm
from towtank.report.grouping import split
from towtank.report.page import render
from towtank.study.config import Study
from towtank.study.grid import Describer, cell_id, expand
from towtank.study.load import load_study
from towtank.study.run import sweep
from towtank.train.cells import train_cells

SEEDS = range(5)
RATES = [2.0**k for k in (-9, -8, -7)]


def study(**grid: list) -> Study:
    return Study(name="x", task=light_task.TASK, grid={"width": [2], "lr": [0.1]} | grid)


def test_runs_that_name_no_optimizer_keep_the_identity_they_had_before_there_was_a_choice() -> None:
    (cell,) = expand(study())[0]
    assert "optimizer" not in cell and cell_id(cell, "light") == "ee109fc812749c85"  # of the version before
    assert cell["beta2"] == 0.95


def test_naming_the_default_is_the_same_training() -> None:
    (plain,), (named,) = expand(study())[0], expand(study(optimizer=["AdamW"]))[0]
    runs = [Describer(light_task.describe).run(c, "grid") for c in (plain, named)]
    assert runs[0].training == runs[1].training and runs[0].id != runs[1].id


def test_a_rule_brings_its_own_numbers_unless_they_were_set() -> None:
    cells = {c["optimizer"]: c for c in expand(study(optimizer=["AdamW", "Lion", "SGD", "SophiaG"]))[0]}
    numbers = {name: {k: c[k] for k in ("beta1", "beta2", "eps") if k in c} for name, c in cells.items()}
    assert numbers["AdamW"] == {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}  # as everywhere in studies
    assert numbers["Lion"] == {"beta1": 0.9, "beta2": 0.99} and numbers["SGD"] == {}
    assert numbers["SophiaG"] == {"beta1": 0.965, "beta2": 0.99, "eps": 1e-15}
    asked = expand(study(optimizer=["SophiaG"], beta2=[0.5]))[0][0]
    assert asked["beta2"] == 0.5 and asked["beta1"] == 0.965


def test_an_unknown_optimizer_is_one_line_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match='optimizer = "Lyon": expected AdaBelief | .*; did you mean Lion') as caught:
        study(optimizer=["Lyon"]).check_task()
    assert "\n" not in str(caught.value)


def made(
    rule: str, lr: float, seed: int, best: float, *, sd: float, log2_best: float = -8.0, noise: float = 0.0
) -> Record:
    """A run: a bowl over log2 lr, an offset of its seed that all arms share, and noise of its own."""
    own = np.random.default_rng([seed, *rule.encode(), int(-math.log2(lr))]).normal(0, noise)
    offset = np.random.default_rng(seed).normal(0, sd)
    loss = best + 0.04 * (math.log2(lr) - log2_best) ** 2 + offset + own
    numbers = {"beta2": 0.99} if rule == "Lion" else {}
    return Record(
        id=f"{rule}{lr}{seed}", config={"lr": lr, "width": 32, "seed": seed, "optimizer": rule, **numbers}, status="done",
        steps=100, loss=Loss(initial=5.0, final=loss), signals={"state_bytes": [(0, 8.0)]}, time_s=0.5,
    )  # fmt: skip


def records(best: dict[str, float], **more: float) -> list[Record]:
    return [made(rule, lr, s, loss, **more) for rule, loss in best.items() for lr in RATES for s in SEEDS]


def test_arms_are_called_after_their_optimizer_alone() -> None:
    groups = split(records({"AdamW": 2.0, "Lion": 2.0, "Nero": 2.0}, sd=0.1), "width")
    assert [g.name for g in groups] == ["AdamW", "Lion", "Nero"] and groups[1].settings == {"optimizer": "Lion"}


def test_pairing_by_seed_tells_a_difference_far_below_the_spread_of_seeds() -> None:
    told = answer(records({"AdamW": 2.0, "Lion": 2.02, "Nero": 2.0201, "SGD": 3.0}, sd=0.3, noise=0.001)).comparison
    assert told is not None and told.pairs == 6
    first, *others = told.rivals
    assert first.arm == "AdamW" and first.difference is None and [r.told for r in others] == [True] * 3
    lion = next(r for r in others if r.arm == "Lion")
    # a difference of two means of five vertices; the weights of the three points at the vertex are about 0, 1, 0
    error = 0.001 * math.sqrt(2 / 5)
    assert abs(lion.difference.value - 0.02) < 6 * error and lion.step_s == 0.005 and lion.state_bytes == 8
    assert not {("Lion", "Nero"), ("Nero", "Lion")} & set(told.told)


def test_the_p_value_is_that_of_the_paired_t_test_times_holms_factor() -> None:
    rows = records({"AdamW": 2.0, "Lion": 2.004}, sd=0.3, noise=0.01)
    told = answer(rows).comparison
    assert told is not None
    means = {(a, lr): np.mean([r.loss.final for r in rows if (r.config["optimizer"], r.config["lr"]) == (a, lr)])
             for a in ("AdamW", "Lion") for lr in RATES}  # fmt: skip
    at_vertex = {}
    for arm in ("AdamW", "Lion"):  # an independent parabola: its coefficients from three points
        c, b, a = np.polynomial.polynomial.polyfit([-1, 0, 1], [means[arm, lr] for lr in RATES], 2)
        x = -b / (2 * a)
        weights = [x * (x - 1) / 2, 1 - x**2, x * (x + 1) / 2]
        final = {(r.config["lr"], r.config["seed"]): r.loss.final for r in rows if r.config["optimizer"] == arm}
        at_vertex[arm] = [sum(w * final[lr, s] for w, lr in zip(weights, RATES, strict=True)) for s in SEEDS]
    worse, better = (at_vertex[r.arm] for r in (told.rivals[1], told.rivals[0]))
    expected = stats.ttest_rel(worse, better)
    assert told.rivals[1].p == pytest.approx(expected.pvalue, rel=1e-6)
    low, high = expected.confidence_interval(0.95)
    assert (told.rivals[1].difference.low, told.rivals[1].difference.high) == pytest.approx((low, high), rel=1e-6)


def test_holm_against_its_definition() -> None:
    p = np.random.default_rng(0).uniform(size=30) ** 3
    for alpha in (0.01, 0.05, 0.2):  # reject the smallest p while p_(i) <= alpha / (n - i)
        rejected, order = set(), np.argsort(p)
        for i, k in enumerate(order):
            if p[k] > alpha / (len(p) - i):
                break
            rejected.add(int(k))
        assert {i for i, q in enumerate(holm(list(p))) if q <= alpha} == rejected


def test_false_alarms_are_as_rare_as_promised() -> None:
    """Eight equal arms, 200 studies: family-wise error at most 5 %; 22 or more of 200 has probability 2.4e-4 at 5 %."""
    losses = np.random.default_rng(1).normal(0, 1, (200, 8, 5))
    first, second = np.triu_indices(8, 1)
    p = stats.ttest_rel(losses[:, first], losses[:, second], axis=-1).pvalue
    assert sum(min(holm(list(row))) < 0.05 for row in p) < 22


def test_an_arm_best_at_the_edge_or_lost_everywhere_is_named() -> None:
    rows = records({"AdamW": 2.0, "Lion": 2.02, "Nero": 2.3}, sd=0.1, noise=0.001)
    rows += [made("SGD", lr, s, 2.1, sd=0.1, log2_best=-3.0) for lr in RATES for s in SEEDS]
    gone = [made("SGDP", lr, s, 2.1, sd=0.1) for lr in RATES for s in SEEDS]
    rows += [Record(id=r.id, config=r.config, status="diverged", steps=3, loss=Loss(initial=5.0)) for r in gone]
    made_answer = answer(rows)
    told = made_answer.comparison
    assert told is not None and [r.arm for r in told.rivals if r.edge] == ["SGD"] and told.lost == ("SGDP",)
    assert (
        "AdamW has the lowest loss, 2" in made_answer.sentence
        and "worse by more than noise: Lion (+0.02)" in made_answer.sentence
    )
    assert (
        "edge of the rates, so perhaps better beyond: SGD" in made_answer.sentence
        and "survived: SGDP" in made_answer.sentence
    )


def test_an_arm_with_fewer_seeds_is_not_ranked_by_their_luck() -> None:
    rows = records({"AdamW": 2.0, "Lion": 2.02, "Nero": 1.99}, sd=0.3, noise=0.001)
    told = answer([r for r in rows if r.config["optimizer"] != "Nero" or r.config["seed"] == 2]).comparison
    assert told is not None and [r.arm for r in told.rivals] == ["AdamW", "Lion"] and told.fewer == ("Nero",)


def test_one_seed_tells_no_difference() -> None:
    assert answer([r for r in records({"AdamW": 2.0, "Lion": 3.0}, sd=0.1) if r.config["seed"] == 0]).comparison is None


def test_the_page_shows_the_comparison() -> None:
    page = render(answer(records({"AdamW": 2.0, "Lion": 2.02, "Nero": 2.3, "SGD": 3.0}, sd=0.1, noise=0.001)))
    assert "paired by 5 seeds, p corrected for all 6 pairs" in page and "Lion: loss (nats)" in page


@pytest.mark.parametrize("name", ["optimizers", "optimizers-digits"])
def test_the_built_in_studies_hold_every_rule(name: str) -> None:
    cells = expand(load_study(name))[0]
    assert {c["optimizer"] for c in cells} == set(OPTIMIZERS)


def test_a_study_of_optimizers_end_to_end(tmp_path) -> None:
    """Real training: two rules, of which plain SGD at these rates must be the worse, by more than noise."""
    grid = {"optimizer": ["AdamW", "SGD"], "lr": [0.003, 0.01, 0.03], "seed": [0, 1, 2], "width": [16]}
    asked = Study(
        name="tiny", task="towtank.train.tasks:digits", grid=grid, fixed={"steps": 15, "batch": 16, "depth": 1}
    )
    swept = sweep(asked, tmp_path, workers=1, work=train_cells)
    told = answer(list(swept.records), size_axis="width").comparison
    assert told is not None and [r.arm for r in told.rivals] == ["AdamW", "SGD"] and told.rivals[1].told
    assert {r.arm: r.state_bytes for r in told.rivals} == {"AdamW": 8, "SGD": 4}
    assert all(r.step_s and r.step_s > 0 for r in told.rivals)
    assert json.dumps([r.config["optimizer"] for r in swept.records])
