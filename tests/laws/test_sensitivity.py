"""Learning-rate sensitivity as published."""

import pytest

from towtank.laws.sensitivity import lr_sensitivity

PLAIN = [2.719, 2.570, 2.582, 2.682, 2.895, 3.023]  # width 64, without qk-norm, rates 1e-3 ... 3e-1
NORMED = [2.716, 2.558, 2.529, 2.561, 2.641, 2.746]


@pytest.mark.parametrize(("losses", "published"), [(PLAIN, 0.175), (NORMED, 0.096)])
def test_measured_curves(losses, published):
    assert lr_sensitivity(losses, initial=5.6) == pytest.approx(published, abs=5e-4)


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), 50.0])
def test_a_diverged_run_counts_as_the_initial_loss(bad):
    assert lr_sensitivity([2.0, 2.5, bad], initial=5.0) == pytest.approx((0 + 0.5 + 3.0) / 3)


def test_a_model_that_never_trains_scores_zero():
    assert lr_sensitivity([6.0, None, 7.0], initial=5.0) == 0


def test_nothing_to_average():
    with pytest.raises(ValueError, match="0 losses"):
        lr_sensitivity([], initial=1.0)
    with pytest.raises(ValueError, match="finite initial loss"):
        lr_sensitivity([1.0], initial=float("nan"))
