"""Learning rate against batch size: it grows and saturates, as the curvature of batches falls and saturates."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"


def test_batch_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TUTORIALS))
    tutorial = importlib.import_module("batch_learning_rate")
    sizes = {
        "batches": (2, 8, 32, 64, 128, 256),
        "seeds": (0, 1, 2),
        "lrs": tuple(2.0**k for k in range(-4, 4)),
        "width": 16,
    }
    measured = {"moments": (0, 20), "sizes": (4, 16, 64, 256), "count": 6}
    result = tutorial.main(tmp_path, steps=40, **sizes, **measured)

    for rates in (result.best, result.largest):
        lr = {b: np.exp(np.mean([np.log(r) for at, r in zip(rates.batch, rates.lr) if at == b])) for b in rates.batch}
        growth = lr[8] / lr[2], lr[256] / lr[64]
        assert growth[0] > growth[1]  # both for 4 times the batch: the growth ends
        assert growth[0] > 4**0.25  # halfway, in log, between no growth and the square root
        assert rates.regime.exponent in ("1/b", "1/sqrt(b)", "neither", "cannot tell")
    assert all(a >= b for a, b in zip(result.largest.lr, result.best.lr))

    for moment in result.curvature:
        mean = list(moment.inflation.readings().values())
        assert mean[0] > mean[-1]  # a small batch is sharper
        assert mean[0] / mean[1] > mean[-2] / mean[-1]  # and that ends as well
        assert len(moment.thirds) == 3
    assert result.curvature[1].loss < result.curvature[0].loss
    assert "exponent" in result.sentence
    assert len(tutorial.figure(result).data) == 2 * (2 + 2)


def test_rates_read_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TUTORIALS))
    tutorial = importlib.import_module("batch_learning_rate")
    lrs = [2.0**k for k in range(-3, 4)]
    parabola = 1 + np.log(np.array(lrs) / 0.7) ** 2 / 10
    assert tutorial.best_rate(lrs, parabola) == pytest.approx(0.7)
    # the gain is guess - 1 at rates up to 1, none from 2 on: half of it is lost halfway between them, in log
    step = np.where(np.array(lrs) <= 1, 1.0, tutorial.GUESS)
    assert tutorial.largest_rate(lrs, step) == pytest.approx(2**0.5)
    with pytest.raises(ValueError, match="give larger ones"):
        tutorial.largest_rate(lrs, np.ones(7))
