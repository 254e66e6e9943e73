"""Loss curves as a law of schedules sees them: the rows of each run, and the rate of every one of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from towtank.laws.schedules import Schedule, as_schedule, from_samples
from towtank.laws.table import Floats, Ints, near

AGREE = 1e-3  # relative difference of a sampled rate and its schedule above which they are not of one run

Rows = Sequence[Sequence[float]]
Rates = Schedule | Sequence[float] | Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """Losses of one run.

    Args:
        name: name of the run.
        steps: steps at which the loss was measured, ascending, shape (R,).
        loss: the losses, nats, shape (R,).
        schedule: rate of every step up to the last measured one at least.
        size: parameters of the model; NaN where no law asks.
        rebuilt: whether the schedule was interpolated from the sampled rates.
    """

    name: str
    steps: Ints
    loss: Floats
    schedule: Schedule
    size: float = np.nan
    rebuilt: bool = False


def read_curves(
    curves: Mapping[str, Rows],
    *,
    schedules: Mapping[str, Rates] | None = None,
    sizes: Mapping[str, float] | None = None,
) -> tuple[Curve, ...]:
    """Curves from rows (step, rate, loss), each checked against its schedule.

    Args:
        curves: rows of each run by name.
        schedules: rate of every step of each run; a run that is not named is interpolated between its sampled rates.
        sizes: parameters of the model of each run.

    Raises:
        ValueError: if there are no curves, a row is not three finite numbers with a positive loss, two rows are of one
            step, a schedule is shorter than its curve or contradicts the sampled rates, or a name is unknown.

    Example:
        >>> read_curves({"a": [(2, 0.5, 3.0), (4, 0.5, 2.5)]})[0].schedule.rates
        array([0.5, 0.5, 0.5, 0.5, 0.5])
    """
    if not curves:
        raise ValueError("expected at least one curve, got none")
    for kind, named in (("schedule", schedules), ("size", sizes)):
        for name in named or {}:
            if name not in curves:
                raise ValueError(f"expected a {kind} of one of {sorted(curves)}, got {name!r}{near(name, curves)}")
    sizes = sizes or {}
    return tuple(
        _read(name, rows, (schedules or {}).get(name), sizes.get(name, np.nan)) for name, rows in curves.items()
    )


def _read(name: str, rows: Rows, rates: Rates | None, size: float) -> Curve:
    table = np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != 3 or not len(table):
        raise ValueError(f"curve {name!r}: expected rows (step, rate, loss), got an array of shape {table.shape}")
    step, rate, loss = table.T
    whole = np.isfinite(step) & (step >= 0) & (step == np.round(step))
    bad = np.flatnonzero(~(whole & np.isfinite(rate) & (rate >= 0) & np.isfinite(loss) & (loss > 0)))
    if bad.size:
        raise ValueError(
            f"curve {name!r}: expected whole steps, rates >= 0 and positive losses, got {tuple(table[bad[0]])} in row "
            f"{bad[0]} ({bad.size} such rows); leave them out"
        )
    order = np.argsort(step, kind="stable")
    steps = step[order].astype(np.int64)
    twice = np.flatnonzero(np.diff(steps) == 0)
    if twice.size:
        raise ValueError(
            f"curve {name!r}: expected one row per step, got {twice.size} repeated, first {steps[twice[0]]}"
        )
    schedule = from_samples(steps, rate[order]) if rates is None else as_schedule(rates)
    check_steps(f"curve {name!r}", steps, schedule)
    if rates is not None:
        _agree(name, steps, rate[order], schedule)
    return Curve(name=name, steps=steps, loss=loss[order], schedule=schedule, size=float(size), rebuilt=rates is None)


def check_steps(name: str, steps: Ints, schedule: Schedule) -> None:
    """That a schedule has a rate for every one of some steps, and something was learned up to the first.

    Raises:
        ValueError: if it does not.
    """
    if steps.size and not 0 <= steps.min() <= steps.max() < len(schedule):
        raise ValueError(
            f"{name}: expected steps between 0 and {len(schedule) - 1}, the steps of the schedule, "
            f"got {steps.min()} to {steps.max()}"
        )
    if steps.size and not schedule.rates[: int(steps.min()) + 1].any():
        raise ValueError(f"{name}: expected steps after the first positive rate, got step {steps.min()}; leave it out")


def _agree(name: str, steps: Ints, rate: Floats, schedule: Schedule) -> None:
    off = np.abs(schedule.rates[steps] - rate)
    worst = int(np.argmax(off))
    if off[worst] > AGREE * schedule.peak:
        raise ValueError(
            f"curve {name!r}: expected the rates of its schedule, got {rate[worst]:g} at step {steps[worst]} where the "
            f"schedule has {schedule.rates[steps[worst]]:g}; is the schedule of another run, or shifted?"
        )
