"""Bad studies are refused in one line that says where, what, and what was probably meant; good ones mean what they say."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from towtank.record.errors import ConfigError
from towtank.study.axes import axis_values
from towtank.study.config import Refine, Study, Verify
from towtank.study.grid import expand
from towtank.study.keys import Key
from towtank.study.load import builtin_studies, load_study, study_toml

GOOD = """\
name = "mine"
task = "light_task:bowl"

[grid]
width = [32, 64]
lr = {log2 = [-8, -4]}
seed = [0, 1]

[fixed]
depth = 2
steps = 100
schedule = "wsd"

[refine]
seeds = [2, 3]
points = 3

[verify]
width = 256
factors = [0.5, 1, 2]
"""


def refusal(tmp_path: Path, text: str) -> str:
    file = tmp_path / "mine.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_study(file)
    line = str(caught.value)
    assert "\n" not in line and line.isprintable() and line.startswith(str(file))
    return line.removeprefix(str(file))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("depth = 2", "detph = 2", ":10: fixed.detph: expected a keyword of the task or a training setting; did you mean depth?"),
        ("[refine]", "[refnie]", ':14: refnie = {"seeds": [2, 3], "points": 3}: expected one of'),
        ("points = 3", "poinst = 3", ":16: refine.poinst = 3: expected one of seeds, points, equal_compute; did you mean points?"),
        ("width = 256", "with = 256", ":19: verify.with = 256: expected one of width, factors, seeds; did you mean width?"),
        ("lr =", "rl =", ":6: grid.rl: expected a keyword"),
        ("depth = 2", "depth = 2.5", ":10: fixed.depth = 2.5: expected an integer"),
        ("depth = 2", 'depth = "2"', ':10: fixed.depth = "2": expected an integer'),
        ("depth = 2", "depth = true", ":10: fixed.depth = true: expected an integer"),
        ("depth = 2", "depth = [2]", ":10: fixed.depth = [2]: expected one value; lists and ranges belong to [grid]"),
        ("depth = 2", "depth = 9223372036854775808", ":10: fixed.depth = 9223372036854775808: expected an integer below 2**63"),
        ("points = 3", 'points = "3"', ':16: refine.points = "3": expected an integer'),
        ("points = 3", "points = 0", ":16: refine.points = 0: expected an integer of 1 or more"),
        ('name = "mine"', "name = 3", ":1: name = 3: expected a text"),
        ('name = "mine"', "", ": name: expected to be set"),
        ('name = "mine"', 'name = ""', ':1: name = "": expected a text'),
        ("lr = {log2 = [-8, -4]}", "lr = [0.1, -0.1]", ":6: grid.lr = -0.1: expected a positive number"),
        ("lr = {log2 = [-8, -4]}", "lr = [0.0]", ":6: grid.lr = 0.0: expected a positive number"),
        ("lr = {log2 = [-8, -4]}", "lr = [nan]", ":6: grid.lr = NaN: expected a positive number"),
        ("lr = {log2 = [-8, -4]}", "lr = []", ":6: grid.lr = []: expected at least one value"),
        ("lr = {log2 = [-8, -4]}", "lr = 0.1", ":6: grid.lr = 0.1: expected a list, or a range"),
        ("lr = {log2 = [-8, -4]}", "", ": lr: expected a number in [grid] or [fixed]; nothing sets it"),
        ("lr = {log2 = [-8, -4]}", "lr = {lg2 = [-8, -4]}", ":6: grid.lr.lg2 = [-8, -4]: expected log2, log10 or linear"),
        ("lr = {log2 = [-8, -4]}", "lr = {log2 = [-4, -8]}", ":6: grid.lr.log2 = [-4, -8]: expected two numbers, the lower first"),
        ("lr = {log2 = [-8, -4]}", "lr = {log2 = [-8, -4.5]}", ":6: grid.lr.log2 = [-8.0, -4.5]: expected a whole number of octaves"),
        ("lr = {log2 = [-8, -4]}", "lr = {log10 = [-4, -1]}", ":6: grid.lr.points: expected how many points"),
        ("lr = {log2 = [-8, -4]}", "lr = {log2 = [-8, inf]}", ":6: grid.lr.log2 = [-8, Infinity]: expected two numbers"),
        ("width = [32, 64]", "width = [0, 64]", ":5: grid.width = 0: expected a positive number"),
        ("width = [32, 64]", "width = [32, 256]", ":19: verify.width = 256: expected a width the grid does not train"),
        ("width = [32, 64]", "lr2 = [1]", ': size = "width": expected a key of [grid] or [fixed]'),
        ("seed = [0, 1]", "seed = [-1]", ":7: grid.seed = -1: expected 0 or more"),
        ("seed = [0, 1]", "depth = [2]", ":10: fixed.depth = 2: expected a key that [grid] does not sweep"),
        ('schedule = "wsd"', 'schedule = "wds"', ':12: fixed.schedule = "wds": expected cosine | linear | wsd | constant; did you mean wsd?'),
        ("steps = 100", "steps = 0", ":11: fixed.steps = 0: expected 1 or more"),
        ("factors = [0.5, 1, 2]", "factors = []", ":20: verify.factors = []: expected a list of positive numbers"),
        ("seeds = [2, 3]", "seeds = []", ":15: refine.seeds = []: expected a list of integers of 0 or more"),
        ("light_task:bowl", "light_task:bowel", ':2: task = "light_task:bowel": expected a function in light_task; did you mean bowl?'),
        ("light_task:bowl", "light_tsk:bowl", ':2: task = "light_tsk:bowl": expected a module that imports (ModuleNotFoundError'),
        ("light_task:bowl", "bowl", ':2: task = "bowl": expected "package.module:function"'),
        ("[grid]", "[grid", ": TOML: expected valid syntax"),
        ("[fixed]", '[fixed]\n"a\\u001b[31m\\u202e" = 1', ': fixed.a?[31m?: expected a keyword'),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path: Path, before: str, after: str, expected: str) -> None:
    assert before in GOOD
    assert refusal(tmp_path, GOOD.replace(before, after, 1)).startswith(expected)


@pytest.mark.parametrize(
    "lr",
    [
        "{linear = [1, 2], points = 1000000000}",
        "{log2 = [-1000, 1000], points = 100000}",
        "{log10 = [-3, -1], points = 1000}",
    ],
)
def test_too_many_runs_are_refused_before_they_are_made(tmp_path: Path, lr: str) -> None:
    text = GOOD.replace("{log2 = [-8, -4]}", lr).replace("seed = [0, 1]", "seed = {linear = [0, 999], points = 1000}")
    began = time.perf_counter()
    assert "expected at most 20000" in refusal(tmp_path, text)
    assert time.perf_counter() - began < 1


@pytest.mark.parametrize(
    "bomb",
    [
        "x = {" + "b . " * 20_000,
        "x = " + "[" * 99_000,
        "x = " + "{a=" * 50_000,
        "x = " + "9" * 99_000,
        "a." * 40_000 + "b=1",
    ],
)
def test_toml_bombs_are_refused(tmp_path: Path, bomb: str) -> None:
    began = time.perf_counter()
    refusal(tmp_path, bomb)
    assert time.perf_counter() - began < 5


def test_a_study_too_large_or_not_text_is_refused(tmp_path: Path) -> None:
    assert "at most 100000 bytes" in refusal(tmp_path, GOOD + "#" * 100_001)
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_study(tmp_path / "b.toml")


@pytest.mark.parametrize(
    "name", ["no-such-study", "lr-transfr", "../lr-transfer", "", "a\0b", "x" * 5000, "/dev/zero", "/tmp"]
)
def test_unknown_studies_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="lr-transfer|can be read"):
        load_study(name)


def test_a_good_study_survives_the_round_trip(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(GOOD)
    study = load_study(tmp_path / "a.toml")
    assert study.verify == Verify(target=256) and study.refine == Refine(seeds=(2, 3))
    odd = Study(name='"\\\n\x1b€', grid={"width": [2], "lr": [1e-3, float("1e-300")]}, fixed={"clip": float("inf")})
    for one in (study, odd):
        (tmp_path / "b.toml").write_text(study_toml(one))
        assert load_study(tmp_path / "b.toml", check_task=False) == one


@pytest.mark.parametrize("name", builtin_studies())
def test_the_built_in_studies_fit_their_task(name: str) -> None:
    study = load_study(name)
    assert study.name == name and study.question.endswith("?")
    expand(study)


def test_lr_transfer_is_the_study_it_is_said_to_be() -> None:
    cells, notes = expand(load_study("lr-transfer"))
    assert len(cells) == 2 * 3 * 8 * 2 and not notes
    assert {cell["lr"] for cell in cells} == {2.0**k for k in range(-10, -2)}
    assert {(cell["steps"], cell["batch"], cell["context"], cell["qk_norm"]) for cell in cells} == {(200, 8, 64, True)}


def test_ranges() -> None:
    lr, width = Key(name="lr", kinds=(float,)), Key(name="width", kinds=(int,))
    assert axis_values(lr, {"log10": [-4, -1], "points": 4})[0] == [1e-4, 1e-3, 1e-2, 1e-1]
    assert axis_values(lr, {"log2": [-2, -1], "points": 3})[0] == [0.25, 2**-1.5, 0.5]
    assert axis_values(lr, {"linear": [0, 1], "points": 3})[0] == [0.0, 0.5, 1.0]
    assert axis_values(width, {"log2": [5, 7]})[0] == [32, 64, 128]
    with pytest.raises(ConfigError, match="an integer"):
        axis_values(width, {"linear": [1, 2], "points": 3})


def test_duplicates_are_merged_with_a_note() -> None:
    study = Study(name="x", task="light_task:bowl", grid={"width": [32, 64, 32], "lr": [1, 1.0, 0.5]})
    cells, notes = expand(study)
    assert [(c["width"], c["lr"]) for c in cells] == [(32, 1.0), (32, 0.5), (64, 1.0), (64, 0.5)]
    assert notes == ["grid.width: 1 repeated value merged", "grid.lr: 1 repeated value merged"]


def test_a_python_study_is_checked_like_a_file() -> None:
    with pytest.raises(ConfigError, match="grid.lr = 0.1: expected a list"):
        Study(name="x", grid={"width": [32], "lr": 0.1})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match="^lr: expected a number"):
        expand(Study(name="x", task="light_task:bowl", grid={"width": [32]}))


def test_a_task_with_open_keywords_takes_any_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "open_task.py").write_text("def make(*, width: int, **more): ...\ndef bad(width, /): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    study = Study(name="x", task="open_task:make", grid={"width": [32], "lr": [0.1], "anything": ["a", 1, True]})
    assert [cell["anything"] for cell in expand(study)[0]] == ["a", 1, True]
    with pytest.raises(ConfigError, match="function of keyword arguments, width is positional"):
        expand(Study(name="x", task="open_task:bad", grid={"width": [32], "lr": [0.1]}))
