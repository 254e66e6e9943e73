"""The tutorials run as they stand in the documentation, shortened."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from towtank import load_records

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"


def test_own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TUTORIALS))
    sentence = importlib.import_module("own_model").main(tmp_path, steps=40)
    records, problems = load_records(tmp_path)
    assert len(records) == 3 * 8 * 2 and not problems
    assert {r.status for r in records} <= {"done", "diverged"}
    best = min(r.loss.final for r in records if r.loss.final is not None)
    assert best < min(r.loss.initial for r in records)  # it learns
    assert "width 64" in sentence
