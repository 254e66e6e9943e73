"""How numbers print, and what their intervals mean."""

from __future__ import annotations

import math

import pytest

from towtank.estimate import Estimate


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(12.4, 0.3, 96), "12.4 ± 0.3 (96 products)"),
        (Estimate(1234.5678, 0.0, 1000), "1235 (1,000 products)"),
        (Estimate(0.0123456, 0.00012, 7.5), "0.01235 ± 0.00012 (7.5 products)"),
        (Estimate(-5.0, 20.0, 3, converged=False), "-5 ± 20 (3 products, not converged)"),
        (Estimate(math.nan, math.nan, 0, converged=False), "nan ± nan (0 products, not converged)"),
        (Estimate(0.0, 0.1, 2), "0 ± 0.1 (2 products)"),
    ],
)
def test_an_estimate_prints_value_error_and_cost(estimate: Estimate, text: str) -> None:
    assert str(estimate) == text


def test_the_interval_is_the_normal_one() -> None:
    interval = Estimate(10.0, 2.0, 4).interval()
    assert (interval.low, interval.high) == pytest.approx((10 - 1.959964 * 2, 10 + 1.959964 * 2))
    with pytest.raises(ValueError, match="draw more samples"):
        Estimate(1.0, math.nan).interval()
