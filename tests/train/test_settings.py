"""Bad settings are refused with the field, the value and what is allowed; the planner weighs compile time against gain."""

from __future__ import annotations

import math

import pytest

from towtank.train.planner import should_compile
from towtank.train.settings import Member, Training


@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0), ("lr", -1.0), ("lr", math.nan), ("lr", math.inf), ("weight_decay", -1), ("beta1", 1), ("beta2", -0.1),
     ("eps", -1), ("z_loss", -1), ("clip", 0), ("seed", -1)],
)  # fmt: skip
def test_member(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field} = .*: expected "):
        Member(**{"lr": 1.0, field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("warmup", 1.5), ("final_lr", -1), ("schedule", "cos"), ("decay", "l2"), ("parametrization", "ntk"),
     ("base_width", 0), ("eval_every", -1), ("signal_every", 0), ("diverged_at", 1), ("compile", "maybe"),
     ("precision", "float16"), ("decay_share", 2)],
)  # fmt: skip
def test_training(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} = .*: expected "):
        Training(**{field: value})


def test_compiling_is_chosen_only_where_it_repays() -> None:
    assert should_compile("always", "cpu", 1, 1, 1) and not should_compile("never", "cpu", 41_000, 64, 10**6)
    assert not should_compile("auto", "cpu", 41_000, 8, 200)  # 13 s of work cannot repay the compile time
    assert should_compile("auto", "cpu", 41_000, 16, 10_000)
    assert not should_compile("auto", "cpu", 3_000_000, 16, 100_000)  # no gain measured at this size
    assert not should_compile("auto", "cuda", 41_000, 16, 10**6)  # not measured there
