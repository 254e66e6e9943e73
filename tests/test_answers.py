"""The acceptance lines of the built-in studies, on the records that `make run` left, where they are there.

Training the studies takes longer than the suite may; `make run` and `towtank sweep attention-logits` make the records.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from towtank import answer, load_records

RUNS = Path(__file__).parents[1] / "runs"


def records_of(name: str) -> list:
    if not (RUNS / name / "records").is_dir():
        pytest.skip(f"runs/{name} is not there; `towtank sweep {name}` makes it")
    return list(load_records(RUNS / name)[0])


def test_lr_transfer_shows_the_known_truth() -> None:
    told = answer(records_of("lr-transfer"))
    arms = {arm.name: arm for arm in told.arms}
    sp, mup = (arms[name].lr_law.coefficients["slope"] for name in ("sp", "mup"))
    assert -1.2 <= sp.value <= -0.6 and 0 not in sp
    assert abs(mup.value) <= 0.25
    check = arms["sp"].verification
    assert check.size == 256 and check.factor <= 1.5 and check.measured.value in check.predicted and check.held


def test_attention_logits_grow_without_qk_norm_only() -> None:
    told = answer(records_of("attention-logits"))
    found = {}
    for arm in told.arms:
        size = next(s for s in arm.sizes if s.size == 64)
        found[bool(arm.settings["qk_norm"])] = (size.rates[-1], size.sensitivity)
    (without, ragged), (with_norm, calm) = found[False], found[True]
    assert without.lr == with_norm.lr == 0.3
    assert without.attention_logit_max > 3e4 and with_norm.attention_logit_max < 1e3
    assert calm < ragged
