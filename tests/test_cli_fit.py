"""`towtank fit` and `towtank laws` as a user meets them: what is asked, what is answered, what is wrong, in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_cli import towtank
from towtank.cli.asking import Request, find_law, words_of
from towtank.laws import LAWS
from towtank.record.record import Loss, Record
from towtank.report import fit_page
from towtank.study.folder import StudyFolder

RENDER = fit_page.render
TRUE = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}
LAW = "--law chinchilla --x params=N --x tokens=D --y loss"


def loss(n: float, d: float) -> float:
    return TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]


def write(folder: Path, name: str, head: str, rows: list[tuple[Any, ...]]) -> None:
    (folder / name).write_text("\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n")


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Few draws, and pages of one line: what is tested here is the command."""
    few = tuple(replace(law, draws=40) if hasattr(law, "draws") else law for law in LAWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("towtank.laws.LAWS", few)
        patch.setattr(fit_page, "render", lambda answer: answer.sentence)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tables of the tests; half a percent of noise, from a fixed seed."""
    folder = tmp_path_factory.mktemp("fit")
    rng = np.random.default_rng(0)
    grid = [(10.0 ** (7 + i / 2), 10.0 ** (9 + j / 2)) for i in range(6) for j in range(5)]
    rows = [
        (n, d, loss(n, d) * np.exp(0.005 * rng.standard_normal()), "c4" if i % 5 else "rpj")
        for i, (n, d) in enumerate(grid)
    ]
    write(folder, "runs.csv", "params,tokens,loss,data", rows)
    holes = [(n, d, "" if i in (3, 7) else y, w) for i, (n, d, y, w) in enumerate(rows)]
    write(folder, "holes.csv", "params,tokens,loss,data", holes)
    write(folder, "zero.csv", "params,tokens,loss", [(n, d, 0 if i == 4 else y) for i, (n, d, y, _) in enumerate(rows)])
    write(folder, "ragged.csv", "params,tokens,loss", [(1, 2, 3), (1, 2)])
    write(folder, "few.csv", "params,tokens,loss", [row[:3] for row in rows[:4]])
    sizes = [(10.0 ** (6 + i / 2), 2.0 + 30 * 10.0 ** (-0.3 * (6 + i / 2)) + 0.001 * (i % 3)) for i in range(9)]
    write(folder, "sizes.csv", "n,loss", sizes)
    return folder


@pytest.fixture(scope="module")
def asked(home: Path) -> dict[str, Any]:
    """The issue's own example, as JSON."""
    words = f"fit runs.csv {LAW} --predict N=1e10 D=3e11 --hold-out 3 --json --out page.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_page, "render", RENDER)
        code, out, err = towtank(*words.split(), cwd=home)
    assert code == 0, err
    return json.loads(out) | {"err": err}


def test_a_fit_answers_in_json_and_writes_its_page(home: Path, asked: dict[str, Any]) -> None:
    answer = asked["answer"]
    assert (asked["schema"], asked["command"], asked["page"]) == (1, "fit", "page.html") and asked[
        "err"
    ] == "page: page.html\n"
    assert answer["columns"] == {"N": "params", "D": "tokens"} and answer["rows"] == 30
    for name, true in TRUE.items():
        assert answer["coefficients"][name]["low"] <= true <= answer["coefficients"][name]["high"], name
    (forecast,) = answer["forecasts"]
    assert forecast["x"] == {"N": 1e10, "D": 3e11}
    assert forecast["value"]["low"] <= loss(1e10, 3e11) <= forecast["value"]["high"]
    assert [p["name"] for p in answer["backtest"]["points"]] == ["row 29", "row 24", "row 28"]  # largest N D first
    assert {p["name"] for p in answer["profiles"]} == set(TRUE) == set(answer["influence"])
    page = (home / "page.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and answer["sentence"] in page and answer["reproduce"] in page


ONE, TWO = {"N": 1e10, "D": 3e11}, {"N": 2e10, "D": 4e11}


@pytest.mark.parametrize(
    ("words", "predict", "points"),
    [
        (["runs.csv"], [], []),
        (["runs.csv", "D=3e11"], ["N=1e10"], [ONE]),
        (["D=3e11", "runs.csv"], ["N=1e10"], [ONE]),
        (["runs.csv"], ["D=3e11", "N=1e10"], [ONE]),
        (["runs.csv", "D=3e11", "D=4e11"], ["N=1e10", "N=2e10"], [ONE, TWO]),
        (["N=2e10", "D=3e11", "D=4e11", "runs.csv"], ["N=1e10"], [ONE, TWO]),
    ],
)
def test_values_after_predict_are_told_from_the_table(words: list[str], predict: list[str], points: list[Any]) -> None:
    law = find_law("chinchilla")
    request = Request(
        words=words, law="chinchilla", x=[], y="loss", columns={}, where=[], drop=False, predict=predict,
        hold_out="largest", out=None, seed=0,
    )  # fmt: skip
    assert words_of(request, law) == (Path("runs.csv"), points)


def test_the_terminal_tells_the_same_and_the_page_gets_a_name(home: Path, asked: dict[str, Any]) -> None:
    code, out, err = towtank(*f"fit runs.csv {LAW} --predict N=1e10 D=3e11".split(), cwd=home)
    assert code == 0 and err == "page: runs.chinchilla.html\n" and (home / "runs.chinchilla.html").exists()
    exponent = asked["answer"]["coefficients"]["alpha"]
    assert f"{exponent['low']:.4g} to {exponent['high']:.4g}" in out
    assert " ".join(asked["answer"]["sentence"].split(".  ")[0].split()[:9]) in " ".join(out.split())


def test_a_forecast_far_beyond_the_data_is_refused(home: Path) -> None:
    code, out, _ = towtank(*"fit sizes.csv --law power-floor --x n --y loss --predict 1e16".split(), cwd=home)
    assert code == 1 and "refuse" in out and "beyond" in out


def test_the_best_rate_of_sweeps_is_forecast_by_the_sizes_alone(home: Path) -> None:
    rows = [
        (10.0**d, 2.0**k, 3 + 0.02 * (k + 8 + (d - 9) / 2) ** 2) for d in (9, 9.5, 10, 10.5) for k in range(-13, -5)
    ]
    write(home, "sweeps.csv", "D,lr,loss", rows)
    words = "fit sweeps.csv --law sweep-horizon --x D=D --x lr=lr --y loss --predict D=1e11 --json"
    code, out, err = towtank(*words.split(), cwd=home)
    answer = json.loads(out)["answer"]
    assert code == 0 and answer["unit"] == "sweep" and answer["y"] == "lr" and answer["rows"] == 4, err
    assert abs(answer["forecasts"][0]["value"]["value"] / 2.0**-9 - 1) < 0.05  # loss, not its logarithm, is a parabola


def test_runs_that_are_not_grouped_are_warned_of(home: Path) -> None:
    rows = [(10.0 ** (k / 4), 2 + 10.0 ** (-k / 8), "ab"[k % 2]) for k in range(12)]
    write(home, "steps.csv", "step,loss,run", rows)
    for more, said in (("", True), (" --groups run", False)):
        _, out, _ = towtank(*f"fit steps.csv --law power --x step --y loss --json{more}".split(), cwd=home)
        assert any("12 rows of 2 runs" in w for w in json.loads(out)["answer"]["warnings"]) == said


def test_rows_are_chosen_and_keep_their_numbers(home: Path) -> None:
    words = f"fit holes.csv {LAW} --where data=c4 --where loss>0 --drop-nan --hold-out 2 --json"
    code, out, err = towtank(*words.split(), cwd=home)
    answer = json.loads(out)["answer"]
    kept = [i for i in range(30) if i % 5 and i not in (3, 7)]
    assert code == 0 and answer["rows"] == len(kept), err
    assert {p["name"] for p in answer["points"]} == {f"row {i}" for i in kept}
    assert {p["name"] for p in answer["backtest"]["points"]} == {"row 29", "row 24"} - {
        f"row {i}" for i in range(0, 30, 5)
    }


def test_missing_numbers_are_counted_and_dropped_only_on_request(home: Path) -> None:
    code, _, err = towtank(*f"fit holes.csv {LAW}".split(), cwd=home)
    assert code == 2 and "2 rows" in err and "3, 7" in err and "--drop-nan" in err
    code, out, _ = towtank(*f"fit holes.csv {LAW} --drop-nan --json".split(), cwd=home)
    answer = json.loads(out)["answer"]
    assert code == 0 and answer["rows"] == 28
    assert answer["warnings"][0] == "2 rows with missing or infinite numbers left out"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (f"fit none.csv {LAW}", 4, "No such file"),
        (f"fit ragged.csv {LAW}", 4, "ragged.csv: line 3: expected 3 fields"),
        (f"fit zero.csv {LAW}", 2, "positive numbers in 'loss'"),
        (f"fit few.csv {LAW}", 1, ""),
        ("fit runs.csv --law chinchila --x params=N --x tokens=D --y loss", 2, "did you mean chinchilla?"),
        ("fit runs.csv --law chinchilla --x params=N --x tokens=D --y los", 2, '--y = "los": expected a column of the table; did you mean loss?'),
        ("fit runs.csv --law chinchilla --x parms=N --x tokens=D --y loss", 2, "did you mean params?"),
        ("fit runs.csv --law chinchilla --x params=N --y loss", 2, "a column for D"),
        ("fit runs.csv --law chinchilla --x N=params --x tokens=D --y loss", 2, "the column first: params=N"),
        ("fit runs.csv --law chinchilla --x params=N --x tokens=N --y loss", 2, "one column for N, got params and tokens"),
        ("fit runs.csv --law chinchilla --x params=N --x data=D --y loss", 2, 'data in row 0 = "rpj": expected a number'),
        (f"fit runs.csv {LAW} --predict N=1e10", 2, "every variable as often as the others, got 1 of N, 0 of D"),
        (f"fit runs.csv {LAW} --predict N=1e10 M=3", 2, "--predict = \"M=3\": expected N=NUMBER D=NUMBER"),
        (f"fit runs.csv {LAW} --predict N=1e10 D=-3", 2, "positive"),
        (f"fit runs.csv sizes.csv {LAW}", 2, "expected one file or folder"),
        ("fit runs.csv --law chinchilla --x params=N tokens=D --y loss", 2, "give every column its own --x"),
        (f"fit runs.csv {LAW} --where los<4", 2, "did you mean 'loss'?"),
        (f"fit runs.csv {LAW} --where loss<0", 2, "expected conditions that some of the 30 rows meet"),
        (f"fit runs.csv {LAW} --hold-out most", 2, "hold_out = 'most'"),
        (f"fit runs.csv {LAW} --hold-out 30", 2, "hold_out = 30"),
        (f"fit runs.csv {LAW} --out none/page.html", 2, "a file in a folder that is there"),
        ("fit sizes.csv --law attention-logit --x n --y loss --groups n", 2, "--groups"),
        ("fit runs.csv --x params=N --y loss", 2, "Missing option '--law'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_with_an_exit_code(home: Path, words: str, code: int, said: str) -> None:
    found, out, err = towtank(*words.split(), cwd=home)
    assert found == code and said in err, err
    assert code == 1 or (not out and len(err.splitlines()) == 1)
    assert "Traceback" not in err and "TOWTANK_DEBUG" not in err


def test_an_older_page_stays_if_the_new_one_cannot_be_written(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(html: str, path: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("towtank.report.document.write", full)
    code, out, err = towtank(*"fit sizes.csv --law power --x n --y loss --out old.html".split(), cwd=home)
    assert code == 4 and not out and "old.html: expected a file that can be written, got: No space left" in err


def test_the_folder_of_a_sweep_is_a_table(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "runs")
    folder.create()
    for i, width in enumerate((32, 64, 128, 256, 512)):
        value = 3.0 * width**-0.1 + 0.001 * (-1) ** i
        folder.save(Record(id=str(i), config={"width": width}, status="done", steps=9, loss=Loss(final=value)))
    folder.save(Record(id="5", config={"width": 1024}, status="diverged", steps=3, loss=Loss()))
    words = "fit runs --law power --x width --y loss --drop-nan --json"
    code, out, err = towtank(*words.split(), cwd=tmp_path)
    answer = json.loads(out)["answer"]
    assert code == 0 and answer["rows"] == 5 and "1 rows" in answer["warnings"][0], err
    (folder.records / "0.json").write_text("torn")
    code, out, _ = towtank(*words.split(), cwd=tmp_path)
    assert code == 4 and "record is damaged" in json.loads(out)["answer"]["warnings"][0]


def long_table(folder: Path) -> dict[str, float]:
    """Loss curves L = 2 + S^-0.5 with S the sum of the rates; `dropped` has no losses. Returns its loss at step 400."""
    rows: list[tuple[Any, ...]] = []
    ends = {}
    for name, rate in {
        "one": lambda s: 0.1,
        "two": lambda s: 0.2 if s < 200 else 0.05,
        "dropped": lambda s: 0.2 if s < 300 else 0.02,
    }.items():
        total = np.cumsum([rate(s) for s in range(401)])
        ends[name] = 2 + total[400] ** -0.5
        for s in range(0, 401, 1 if name == "dropped" else 5):
            rows.append((name, s, rate(s), "" if name == "dropped" or s < 20 else 2 + total[s] ** -0.5))
    write(folder, "curves.csv", "run,at,eta,nats", rows)
    return ends


def test_laws_of_loss_curves_predict_the_run_that_has_no_losses(tmp_path: Path) -> None:
    ends = long_table(tmp_path)
    words = "fit curves.csv --law annealing --curves run --step at --lr eta --y nats --json"
    code, out, err = towtank(*words.split(), cwd=tmp_path)
    answer = json.loads(out)["answer"]
    assert code in (0, 1), err
    (forecast,) = answer["forecasts"]
    assert forecast["name"] == "dropped" and forecast["x"] == {"step": 400}
    if forecast["value"] is not None:
        assert forecast["value"]["value"] == pytest.approx(ends["dropped"], rel=0.02)
    assert answer["groups"] == 2 and {s["title"] for s in answer["slices"]} >= {"one", "two"}
    code, _, err = towtank(*words.replace("--curves run", "--curves rn").split(), cwd=tmp_path)
    assert code == 2 and "did you mean run?" in err


def test_laws_are_listed_with_formula_needs_and_source(tmp_path: Path) -> None:
    code, out, _ = towtank("laws", cwd=tmp_path)
    assert code == 0
    for law in LAWS:
        assert f"{law.name}: " in out
    listed = {law["name"]: law for law in json.loads(towtank("laws", "--json", cwd=tmp_path)[1])["laws"]}
    assert len(listed) == len(LAWS)
    assert listed["chinchilla"]["variables"] == {"N": "parameters", "D": "tokens"}
    assert all(law[key] for law in listed.values() for key in ("formula", "needs", "source", "variables"))


def test_copying_the_command_of_the_page_gives_the_same_numbers(
    home: Path, asked: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copy(home / "runs.csv", tmp_path)
    again = json.loads(towtank(*asked["answer"]["reproduce"].split()[1:], cwd=tmp_path)[1])
    assert again["answer"] == asked["answer"]
