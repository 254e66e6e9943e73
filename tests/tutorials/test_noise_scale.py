"""Noise scale: small batches scale perfectly, large ones gain nothing, and the probe tells where that turns."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"


def test_noise_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TUTORIALS))
    tutorial = importlib.import_module("noise_scale")
    sizes = {"batches": (2, 8, 32, 128, 512), "seeds": (0, 1), "lrs": (0.125, 0.25, 0.5, 1.0), "width": 16}
    result = tutorial.main(tmp_path, target=0.7, watched=128, **sizes)

    few = {t.batch: np.mean(t.steps) for t in result.tuned}
    assert few[2] / few[8] > 2  # perfect scaling is 4
    assert few[128] / few[512] < 1.5  # and no gain is 1
    assert result.tuned[0].lr < result.tuned[-1].lr
    found = result.fit.coefficients
    assert found["S_min"].low > 0 and 2 < found["B_crit"].value < 512  # the law sees both ends
    scales = np.concatenate([run.scale for run in result.watched])
    assert scales.min() <= result.predicted <= scales.max()
    # McCandlish et al. claim the order of magnitude
    assert 0.1 < result.predicted / found["B_crit"].value < 10
    assert "agree to a factor" in result.sentence
    assert len(tutorial.figure(result).data) == 2 + 2 + 1


def test_mean_by_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TUTORIALS))
    tutorial = importlib.import_module("noise_scale")

    def run(*scale: float) -> object:
        rest = {"step": (1.0,) * len(scale), "low": scale, "high": scale}
        return tutorial.Watched(seed=0, scale=scale, **rest)

    # a huge-batch run with B = 10, then 30; at batch 10 its steps become 1 + 1 and 1 + 3 steps
    assert tutorial.mean_scale([run(10.0, 10.0, 30.0, 30.0, 30.0, 30.0)], 10) == pytest.approx(20.0)
    # a step of no worth takes 10 examples of a run of one step's worth
    assert tutorial.mean_scale([run(10.0, 10.0, float("inf"))], 10) == pytest.approx(20.0)
