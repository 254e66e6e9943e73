"""The edge of stability, at small scale."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"


def test_sharpness_rises_to_the_limit_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TUTORIALS))
    tutorial = importlib.import_module("edge_of_stability")
    result = tutorial.main(tmp_path, lrs=(0.22,), steps=450, images=100, cadence=25)
    (run,) = result.runs
    # Descent on a quadratic is unstable beyond 1. The paper's networks begin far below and then hover just above 1.
    assert run.ratio[0] < 0.5
    tail = run.ratio[-6:]
    assert 0.8 < min(tail) <= max(tail) < 1.3
    assert run.trend.kind == "edge of stability"
    assert any(b > a for a, b in zip(run.loss, run.loss[1:]))  # the loss rises at some steps,
    assert run.loss[-1] < 0.5 * run.loss[0]  # and falls in the long run
    assert list(tmp_path.rglob("records/*.json"))
    assert len(tutorial.figure(result).data) == 2
