"""Opposing signals: a planted pair of groups is found, and carries the sharpness; without it there is less."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from scipy.stats import hypergeom

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"


def test_opposing_signals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TUTORIALS))
    tutorial = importlib.import_module("opposing_signals")
    sizes = {"images": 400, "count": 24, "lr": 0.4, "steps": 80, "cadence": 40}
    result = tutorial.main(tmp_path, brightness=(6.0, 0.0), **sizes)
    bar, plain = result.runs

    last = bar.found[-1]
    assert last.found and last.cosine < -0.9  # opposite, not just apart
    assert set(bar.digits) == {tutorial.FIRST, tutorial.SECOND}
    # 12 + 12 names out of 400: as many of the right group by chance are below this once in 1e9
    chance = 2 * int(hypergeom.isf(1e-9, 400, 12, 12))
    assert bar.recovered(last) > chance
    assert last.share > 0.5  # 6 % of the examples are most of the sharpness
    assert bar.sharpness_without < last.sharpness  # without them another direction is the sharpest, and less sharp

    assert plain.planted == (frozenset(), frozenset())
    assert plain.found[-1].share < last.share
    assert bar.loss[-1] < bar.loss[0] and plain.loss[-1] < plain.loss[0]
    assert "of 24 planted" in result.sentence
    assert len(tutorial.figure(result).data) == 2 * 3 * 2
