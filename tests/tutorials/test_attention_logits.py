"""Attention logits: they run away without qk-norm, the alarm comes before, and qk-norm keeps them small."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from towtank import load_records

TUTORIALS = Path(__file__).parents[2] / "docs" / "tutorials"


def test_attention_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TUTORIALS))
    tutorial = importlib.import_module("attention_logits")
    result = tutorial.main(tmp_path, width=32, lr=0.3, warmup=20, steps=57, cadence=3)
    plain, normed = result.plain, result.normed

    assert plain.crossed is not None and max(plain.logit) > 1e4  # what Wortsman et al. call the limit
    first = next(alarm for alarm in plain.alarms if alarm.lead)
    assert first.step < plain.crossed  # said before it came
    assert any(plain.held(lead) for _, lead in plain.forecasts)
    assert [a.severity for a in plain.alarms][-1] == "critical"  # and said when it had come

    # queries and keys of LayerNorm with gain 1 have length sqrt(K): |q.k| / sqrt(K) <= sqrt(32) = 5.7 until gains have moved
    assert normed.logit[0] <= 32**0.5 + 1e-4
    assert (
        max(normed.logit) < max(plain.logit) / 100
    )  # 100 is the square of a gain of 10: Adam moves it by 0.3 a step, in 57
    assert normed.crossed is None and not any(a.severity == "critical" for a in normed.alarms)
    assert normed.final_loss < plain.final_loss

    for folder in ("plain", "qk_norm"):
        records, problems = load_records(tmp_path / folder)
        assert len(records) == 1 and not problems
    assert "passes 10000 by step" in result.sentence
    assert {trace.name for trace in tutorial.figure(result).data} >= {"without qk-norm", "with qk-norm", "first alarm"}
