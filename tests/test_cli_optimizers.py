"""`towtank optimizers`: every rule with its costs, and all about one."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from towtank.cli.main import run
from towtank.optim import OPTIMIZERS, rule_of


def towtank(*arguments: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("COLUMNS", "80")
        code = run(["optimizers", *arguments])
    return code, out.getvalue(), err.getvalue()


def test_the_list_has_one_line_for_each_and_fits_a_terminal() -> None:
    code, out, err = towtank()
    lines = out.splitlines()
    assert code == 0 and not err and max(map(len, lines)) <= 80 and out.isascii()
    for name in OPTIMIZERS:
        (line,) = [x for x in lines if x.split()[:1] == [name]]
        assert (
            f"{rule_of(name).state_bytes:g}" in line.split() and str(len(rule_of(name).deviations)) == line.split()[-1]
        )
    assert next(x for x in lines if x.startswith("Lion")).split() == [
        "Lion", "4", "0", "0.1", "to", "0.33", "Chen", "et", "al.", "2023", str(len(rule_of("Lion").deviations))
    ]  # fmt: skip


def test_one_is_told_whole_whatever_its_case() -> None:
    code, out, _ = towtank("sophiag")
    said = " ".join(out.split())
    assert code == 0 and said.startswith("SophiaG: ")
    for word in (
        "source: Liu et al. 2024",
        "squared samples",
        "weight decay: 0.1, decoupled",
        "labels are sampled from the model",
    ):
        assert word in said
    assert "variants: paper, official" in towtank("AdaBelief")[1]


def test_json_holds_everything() -> None:
    content = json.loads(towtank("--json")[1])
    assert content["command"] == "optimizers" and [o["name"] for o in content["optimizers"]] == list(OPTIMIZERS)
    for told in content["optimizers"]:
        rule = rule_of(told["name"])
        assert told["deviations"] == list(rule.deviations) and told["lr_vs_adamw"] == list(rule.lr_vs_adamw)
        assert told["source"] and told["summary"] and told["defaults"]["lr"] == rule.hyper().lr
    assert len(json.loads(towtank("Muon", "--json")[1])["optimizers"]) == 1


def test_an_unknown_name_is_one_line_with_the_nearest() -> None:
    code, out, err = towtank("Lyon")
    assert (
        code == 2 and not out and err == 'towtank: NAME = "Lyon": expected an optimizer\'s name; did you mean Lion?\n'
    )


def test_the_code_of_the_guide_runs() -> None:
    guide = (Path(__file__).parents[1] / "docs" / "optimizers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    known: dict[str, object] = {}
    said = io.StringIO()
    with redirect_stdout(said):
        for block in blocks:
            exec(block, known)
    assert len(blocks) == 5 and "'3.weight': 'head'" in said.getvalue() and "update_rms" in said.getvalue()
