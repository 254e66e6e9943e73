"""`towtank measure` and `towtank landscape` as a user meets them."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from towtank.cli.main import run

MODEL = """
import torch
from torch import nn
from towtank.problem import Problem

def parts():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    return model, nn.functional.mse_loss, (torch.ones(4, 3), torch.zeros(4, 1))

def trained():
    model, loss, data = parts()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loss(model(data[0]), data[1]).backward()
    optimizer.step()
    return model, loss, data, optimizer

def fresh():
    return {"model": (p := parts())[0], "loss": p[1], "data": p[2], "optimizer": torch.optim.Adam(p[0].parameters()), "mode": "eval"}

def problem():
    return Problem(*parts())

def number():
    return 3

def broken():
    raise OSError("the disk is gone")

def nan():
    model, loss, data = parts()
    return model, loss, (data[0] * float("nan"), data[1])
"""


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    where = tmp_path_factory.mktemp("user")
    (where / "cli_measured.py").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        patch.syspath_prepend(where)
        yield where
    sys.modules.pop("cli_measured", None)


def towtank(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = run(list(arguments))
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize("function", ["parts", "problem"])
def test_json(function: str) -> None:
    code, out, _ = towtank("measure", f"cli_measured:{function}", "--json")
    said = json.loads(out)
    assert code == said["exit_code"] == 0 and said["command"] == "measure" and said["parameters"] == 4
    readings = {r["name"]: r for r in said["readings"]}
    # 2 mean x x^T of x = (1, 1, 1, 1): one eigenvalue 8
    assert readings["sharpness"]["value"] == pytest.approx(8.0, rel=1e-6)
    assert readings["trace"]["value"] == pytest.approx(8.0, rel=1e-6)
    assert readings["limit: gradient descent"]["value"] == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("columns", ["60", "140"])
def test_the_table_has_every_line(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    code, out, err = towtank("measure", "cli_measured:trained", "--top", "2")
    assert code == 0 and not err
    for name in ("sharpness", "preconditioned sharpness", "limit: Adam", "effective rank", "no weight decay"):
        assert name in " ".join(out.split())


def test_a_line_that_cannot_be_measured_is_an_exit_code() -> None:
    code, out, _ = towtank("measure", "cli_measured:fresh", "--json")
    refused = [r for r in json.loads(out)["readings"] if r["status"] == "refuse"]
    assert code == 1 and {r["name"] for r in refused} == {"preconditioned sharpness", "limit: Adam"}
    assert all(r["value"] is None and r["reason"] for r in refused)


@pytest.mark.parametrize(
    ("target", "code", "said"),
    [
        ("cli_measured", 2, "package.module:function"),
        ("cli_measured:part", 2, "did you mean parts?"),
        ("no_such_module:f", 2, "a module that imports"),
        ("cli_measured:number", 2, "it returned int"),
        ("cli_measured:broken", 4, "the disk is gone"),
        ("cli_measured:nan", 4, "finite"),
    ],
)
def test_errors_are_one_line(target: str, code: int, said: str) -> None:
    got, out, err = towtank("measure", target)
    assert got == code and not out and said in err and err.count("\n") == 1


def test_landscape_writes_a_figure_and_prints_the_numbers(folder: Path) -> None:
    code, out, err = towtank("landscape", "cli_measured:parts", "--points", "3", "--kind", "eigen", "--span", "1")
    assert code == 0 and "lowest on the slice" in out and "landscape.html" in err
    assert (folder / "landscape.html").read_text().count("plotly") > 3
    code, out, _ = towtank("landscape", "cli_measured:trained", "--points", "3", "--dims", "2", "--json")
    said = json.loads(out)
    assert code == 0 and said["figure"] is None and len(said["loss"]) == len(said["loss"][0]) == 3
    assert towtank("landscape", "cli_measured:parts", "--kind", "up")[0] == 2
    assert towtank("landscape", "cli_measured:parts", "--span", "-1")[0] == 2
    assert towtank("landscape", "cli_measured:parts", "--out", str(folder / "none" / "x.html"))[0] == 4
