"""Schedules against closed forms and against the sampled rates of nine real runs."""

import math

import numpy as np
import pytest

from tests.laws.schedule_runs import real_curves, schedule_of
from towtank.laws.curve_data import read_curves
from towtank.laws.schedules import (
    Schedule,
    constant,
    cosine,
    from_samples,
    hold,
    linear,
    piece,
    ramp,
    staircase,
    wsd,
)

EXACT = {"rtol": 1e-14, "atol": 0}  # a few roundings of float64


@pytest.mark.parametrize("size", ["25M", "100M"])
def test_rebuilds_the_sampled_rates_of_real_runs(size):
    for name, rows in real_curves(size).items():
        steps, rates = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
        half_digit = 0.5 * 10.0 ** (np.floor(np.log10(rates)) - 7)  # the table is written with eight digits
        np.testing.assert_array_less(np.abs(schedule_of(name).rates[steps] - rates), half_digit * 1.001)


def by_step(kind, step):
    """The definitions, one step at a time, in plain Python: peak 2, 100 steps, 10 of them warm-up, end 0.5."""
    if step < 10:
        return 2 * (step + 1) / 10
    p = (step - 10) / 90
    fall = max(0.0, (step - 70) / 30)
    return {
        "constant": 2.0,
        "cosine": 0.5 + 1.5 * (1 + math.cos(math.pi * p)) / 2,
        "linear": 2 - 1.5 * p,
        "wsd": 2 - 1.5 * fall,
        "exponential": 2 * 0.25**fall,
        "stairs": 2.0 if step < 40 else 1.0 if step < 90 else 0.1,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "run"),
    [
        ("constant", constant(peak=2.0, steps=100, warmup=10)),
        ("cosine", cosine(peak=2.0, steps=100, warmup=10, final=0.5)),
        ("linear", linear(peak=2.0, steps=100, warmup=10, final=0.5)),
        ("wsd", wsd(peak=2.0, steps=100, warmup=10, decay=30, final=0.5)),
        ("exponential", wsd(peak=2.0, steps=100, warmup=10, decay=30, final=0.5, shape="exponential")),
        ("stairs", staircase(peak=2.0, steps=100, warmup=10, drops={90: 0.1, 40: 1.0})),
    ],
)
def test_definitions(kind, run):
    np.testing.assert_allclose(run.rates, [by_step(kind, s) for s in range(100)], **EXACT)


def test_pieces_join_without_repeating_or_skipping_a_rate():
    whole = piece(1.0, 0.0, 100)
    halves = piece(1.0, 0.5, 50).then(piece(0.5, 0.0, 50))
    np.testing.assert_allclose(halves.rates, whole.rates, rtol=0, atol=1e-15)


def test_warmup_ends_at_the_peak_and_a_late_peak_is_none():
    assert ramp(1.0, 10).then(hold(1.0, 5)).warmup == 9
    assert piece(1.0, 0.0, 10).warmup == 0
    assert hold(1.0, 5).then(hold(0.5, 5), hold(2.0, 5)).warmup == 0  # it fell before: not a warm-up


def test_samples_are_hit_and_the_first_rate_is_held():
    run = from_samples([10, 20, 40], [1.0, 0.5, 0.25])
    np.testing.assert_array_equal(run.rates[[0, 10, 20, 40]], [1.0, 1.0, 0.5, 0.25])
    assert run.rates[30] == 0.375 and len(run) == 41


def test_a_schedule_cannot_be_changed():
    source = np.ones(3)
    run = Schedule(source)
    source[0] = 7
    assert run.rates[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        run.rates[0] = 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule(np.array([])), "in one row"),
        (lambda: Schedule(np.ones((2, 2))), "in one row"),
        (lambda: Schedule(np.array([1.0, -1.0])), "got -1.0 at step 1"),
        (lambda: Schedule(np.array([1.0, np.nan])), "got nan at step 1"),
        (lambda: Schedule(np.zeros(3)), "3 steps at rate zero"),
        (lambda: hold(1.0, 0), "at least one step"),
        (lambda: piece(1.0, 0.0, 5, shape="exponential"), "positive ends"),
        (lambda: piece(1.0, 0.0, 5, shape="cubic"), "line | cosine | exponential"),
        (lambda: cosine(peak=1.0, steps=5, warmup=5), "warmup < steps"),
        (lambda: wsd(peak=1.0, steps=10, decay=8, warmup=5), "decay <= steps - warmup"),
        (lambda: staircase(peak=1.0, steps=10, drops={10: 0.1}), "got one at 10"),
    ],
)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("rows", "more", "message"),
    [
        ([], {}, "expected rows"),
        ([(1, 0.1)], {}, "step, rate, loss"),
        ([(1, 0.1, 3.0), (1, 0.1, 2.9)], {}, "one row per step, got 1 repeated, first 1"),
        ([(1.5, 0.1, 3.0)], {}, "whole steps"),
        ([(1, 0.1, 0.0)], {}, "positive losses"),
        ([(1, 0.1, None)], {}, "in row 0"),
        ([(0, 0.0, 3.0), (1, 0.1, 2.0)], {}, "after the first positive rate, got step 0"),
        ([(5, 0.1, 3.0)], {"schedules": {"a": np.full(5, 0.1)}}, "between 0 and 4"),
        ([(3, 0.2, 3.0)], {"schedules": {"a": np.full(5, 0.1)}}, "is the schedule of another run"),
        ([(3, 0.1, 3.0)], {"schedules": {"b": np.full(5, 0.1)}}, "expected a schedule of one of"),
        ([(3, 0.1, 3.0)], {"sizes": {"b": 5.0}}, "expected a size of one of"),
    ],
)
def test_bad_curves_are_refused(rows, more, message):
    with pytest.raises(ValueError, match=message):
        read_curves({"a": rows}, **more)


def test_no_curves():
    with pytest.raises(ValueError, match="at least one curve"):
        read_curves({})
