"""Softmax collapse and its cures, at small scale: bfloat16 collapses at a gap of 5.55 already."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"


def test_only_the_plain_softmax_collapses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TUTORIALS))
    tutorial = importlib.import_module("grokking_collapse")
    result = tutorial.main(tmp_path, p=29, steps=200, cadence=25, dtype=torch.bfloat16)
    plain, stable, ortho = (result.runs[n] for n in (tutorial.PLAIN, tutorial.STABLEMAX, tutorial.ORTHOGRAD))
    assert max(plain.collapse) > 0.5 and max(stable.collapse) == 0 and max(ortho.collapse) < 0.01
    assert plain.zero_losses == plain.collapse  # every training pair is right: the collapsed ones have no loss
    assert plain.alarm is not None and stable.alarm is None and ortho.alarm is None
    assert [run.train[-1] for run in (plain, stable, ortho)] == [1, 1, 1]
    # Chance is 1 / 29. Plain stays there; after 200 steps StableMax has not left it either.
    assert ortho.test[-1] > 0.4 and plain.test[-1] < 0.15
    # Before anything collapses the plain step goes along the weights.
    early = [a for a, c in zip(plain.alignment, plain.collapse) if c == 0]
    assert max(early) > 0.5
    assert len(tutorial.figure(result).data) == 9


def test_stablemax_is_a_softmax_of_its_logarithm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TUTORIALS))
    tutorial = importlib.import_module("grokking_collapse")
    z = torch.tensor([[3.0, 0.0, -1.0, -999.0]])
    s = torch.tensor([[4.0, 1.0, 0.5, 0.001]], dtype=torch.float64)
    torch.testing.assert_close(tutorial.StableMax()(z).softmax(-1), s / s.sum())
