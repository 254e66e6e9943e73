"""The Fisher explosion, at small scale."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"


def test_the_peak_is_higher_at_the_small_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TUTORIALS))
    tutorial = importlib.import_module("fisher_explosion")
    sizes = {"steps": 450, "images": 100, "channels": 4, "watched": 30, "per_decade": 7}
    result = tutorial.main(tmp_path, small=0.05, good=0.4, seeds=(0,), **sizes)
    small, good = (result.at(lr)[0] for lr in (0.05, 0.4))
    # Over seeds 0 to 2 the ratio is 3.4 to 6.
    assert small.peak.value > 2 * good.peak.value
    assert small.peak.rise > 10 and good.peak.kind == "early peak" and small.peak.kind in ("early peak", "rising")
    assert good.train_error == 0 and small.train_error < 0.1  # both learn
    assert "standard error" not in result.sentence  # one seed has none
    assert len(tutorial.figure(result).data) == 4
