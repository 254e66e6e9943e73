"""Probes run when they said they would, and dear ones within the budget."""

from __future__ import annotations

import pytest

from towtank.signals.cadence import Slot, every, log_spaced, name_of


def nothing(step: object) -> dict[str, float]:
    return {}


class Dear:
    name = "dear"

    def __call__(self, step: object) -> dict[str, float]:
        return {}

    def cost(self, problem: object) -> float:
        return 10.0


def test_every_and_log_spaced() -> None:
    assert [s for s in range(1, 13) if every(4, nothing).due(s)] == [1, 4, 8, 12]
    assert [s for s in range(1, 5) if every(1, nothing).due(s)] == [1, 2, 3, 4]
    due = [s for s in range(1, 10_001) if log_spaced(nothing, per_decade=2).due(s)]
    assert due == [1, 4, 10, 32, 100, 317, 1000, 3163, 10_000]  # ceil(10^(k/2))
    with pytest.raises(ValueError, match="positive"):
        every(0, nothing)
    with pytest.raises(ValueError, match="positive"):
        log_spaced(nothing, per_decade=0)


def test_a_dense_log_spacing_runs_at_every_early_step() -> None:
    due = [s for s in range(1, 30) if log_spaced(nothing, per_decade=100).due(s)]
    assert due[:20] == list(range(1, 21))


def test_names() -> None:
    assert name_of(every(3, nothing)) == "nothing" and name_of(Dear()) == "dear"


def test_a_dear_probe_runs_once_and_then_as_the_budget_pays() -> None:
    """It takes 3 s and earns 0.1 s a step: after the first run at step 5 it runs every 30 steps."""
    slot = Slot(Dear(), n=10, first=5)
    ran = []
    for step in range(1, 200):
        if slot.due(step):
            ran.append(step)
            slot.ran(3.0)
        slot.earn(0.1 + 1e-12)
    assert ran[0] == 5 and {b - a for a, b in zip(ran, ran[1:], strict=False)} == {30}
    assert slot.spent_s == pytest.approx(3.0 * len(ran))


def test_credit_is_not_saved_up() -> None:
    """A probe that has waited longer than it costs does not run twice in a row."""
    slot = Slot(Dear(), n=10)
    slot.ran(1.0)
    for _ in range(1000):
        slot.earn(0.1)
    assert slot.due(1001)
    slot.ran(1.0)
    assert not slot.due(1002)


def test_cheap_and_scheduled_probes_are_not_governed_by_the_budget() -> None:
    cheap, scheduled = Slot(nothing, n=10), Slot(every(7, Dear()), n=10)
    assert not cheap.dear and not scheduled.dear and Slot(Dear(), n=10).dear and not Slot(Dear(), n=10, fixed=True).dear
    assert [s for s in range(1, 31) if cheap.due(s)] == [1, 10, 20, 30]
    assert [s for s in range(1, 15) if scheduled.due(s)] == [1, 7, 14]


def test_a_probe_that_keeps_failing_is_left_alone() -> None:
    slot = Slot(nothing, n=1)
    slot.failures = 3
    assert not slot.due(1)


def test_a_dear_probe_that_cannot_tell_yet_is_asked_again() -> None:
    slot, asked = Slot(Dear(), n=10), []
    for step in range(1, 200):
        if slot.due(step):
            asked.append(step)
            slot.ran(1.0)
            slot.refused(step)
    assert asked == [1, 2, 12, 112]
