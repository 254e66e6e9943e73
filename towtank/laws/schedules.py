"""Learning-rate schedules as the rate of every step: pieces, and the usual schedules made of them.

A piece of n steps from `start` to `end` has the rates start + (end - start) f(i / n), i = 0 .. n - 1: it begins at `start`,
and the step that follows it is the first at `end`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from towtank.laws.table import Floats, Ints

Shape = Literal["line", "cosine", "exponential"]


@dataclass(frozen=True, eq=False)
class Schedule:
    """The learning rate of every step, with what a law asks of it.

    Args:
        rates: rate used by the update of step 0, 1, ..., shape (T,), not negative; made read-only.

    Raises:
        ValueError: if there are no rates, they are not one row of finite numbers, or none is positive.

    Example:
        >>> run = cosine(peak=1e-3, steps=100, warmup=10)
        >>> len(run), run.peak, run.warmup, float(run.then(hold(1e-5, 50)).rates[-1])
        (100, 0.001, 9, 1e-05)
    """

    rates: Floats

    def __post_init__(self) -> None:
        rates = np.array(self.rates, dtype=np.float64)
        if rates.ndim != 1 or not rates.size:
            raise ValueError(f"expected the rate of every step in one row, got shape {rates.shape}")
        bad = np.flatnonzero(~(np.isfinite(rates) & (rates >= 0)))
        if bad.size:
            raise ValueError(f"expected rates >= 0, got {rates[bad[0]]} at step {bad[0]} ({bad.size} such steps)")
        if not rates.any():
            raise ValueError(f"expected a positive rate, got {rates.size} steps at rate zero")
        rates.flags.writeable = False
        object.__setattr__(self, "rates", rates)

    def __len__(self) -> int:
        return self.rates.size

    @property
    def peak(self) -> float:
        """Highest rate."""
        return float(self.rates.max())

    @property
    def warmup(self) -> int:
        """First step at the peak if the rates only rise up to there, else 0: the peak was no warm-up's end."""
        top = int(np.argmax(self.rates))
        return top if (np.diff(self.rates[: top + 1]) >= 0).all() else 0

    def then(self, *others: Schedule) -> Schedule:
        """This schedule, followed by others."""
        return Schedule(np.concatenate([self.rates, *(o.rates for o in others)]))


def as_schedule(rates: Schedule | Sequence[float] | Floats) -> Schedule:
    """A schedule as it is, or one of an array of rates."""
    return rates if isinstance(rates, Schedule) else Schedule(np.asarray(rates, dtype=np.float64))


def hold(rate: float, steps: int) -> Schedule:
    """A constant rate.

    Example:
        >>> hold(0.5, 3).rates
        array([0.5, 0.5, 0.5])
    """
    return Schedule(np.full(_count(steps), rate, dtype=np.float64))


def piece(start: float, end: float, steps: int, *, shape: Shape = "line") -> Schedule:
    """Rates from `start` towards `end`, which the next step would reach.

        line         start + (end - start) p
        cosine       start + (end - start) (1 - cos(pi p)) / 2
        exponential  start (end / start)^p,       p = 0, 1 / steps, ..., 1 - 1 / steps

    Raises:
        ValueError: for an unknown shape, or an exponential that touches zero.

    Example:
        >>> piece(1.0, 0.0, 4).rates, piece(8.0, 1.0, 3, shape="exponential").rates.round(9)
        (array([1.  , 0.75, 0.5 , 0.25]), array([8., 4., 2.]))
    """
    if shape not in _SHAPES:
        raise ValueError(f"shape = {shape!r}: expected {' | '.join(_SHAPES)}")
    if shape == "exponential" and not (start > 0 and end > 0):
        raise ValueError(f"expected positive ends of an exponential, got {start} and {end}; end a little above zero")
    return Schedule(_SHAPES[shape](start, end, np.arange(_count(steps)) / steps))


def ramp(peak: float, steps: int, *, first: float | None = None) -> Schedule:
    """Linear warm-up: rates evenly spaced from `first` to the peak, both reached.

    Args:
        peak: rate of the last step of the warm-up.
        steps: steps of the warm-up.
        first: rate of step 0; None: peak / steps, so that step s has peak (s + 1) / steps.

    Example:
        >>> ramp(1.0, 4).rates, ramp(1.0, 3, first=0.0).rates
        (array([0.25, 0.5 , 0.75, 1.  ]), array([0. , 0.5, 1. ]))
    """
    return Schedule(np.linspace(peak / _count(steps) if first is None else first, peak, steps))


def constant(*, peak: float, steps: int, warmup: int = 0, first: float | None = None) -> Schedule:
    """Warm-up, then the peak; `steps` counts both.

    Example:
        >>> constant(peak=1.0, steps=5, warmup=2).rates
        array([0.5, 1. , 1. , 1. , 1. ])
    """
    return _after_warmup(lambda n: hold(peak, n), peak, steps, warmup, first)


def cosine(*, peak: float, steps: int, warmup: int = 0, final: float = 0.0, first: float | None = None) -> Schedule:
    """Warm-up, then half a cosine from the peak to `final`, which step `steps` would reach.

    Example:
        >>> cosine(peak=1.0, steps=4, final=0.5).rates.round(6)
        array([1.      , 0.926777, 0.75    , 0.573223])
    """
    return _after_warmup(lambda n: piece(peak, final, n, shape="cosine"), peak, steps, warmup, first)


def linear(*, peak: float, steps: int, warmup: int = 0, final: float = 0.0, first: float | None = None) -> Schedule:
    """Warm-up, then a line from the peak to `final`, which step `steps` would reach.

    Example:
        >>> linear(peak=1.0, steps=4).rates
        array([1.  , 0.75, 0.5 , 0.25])
    """
    return _after_warmup(lambda n: piece(peak, final, n), peak, steps, warmup, first)


def wsd(
    *, peak: float, steps: int, decay: int, warmup: int = 0, final: float = 0.0, shape: Shape = "line",
    first: float | None = None,
) -> Schedule:  # fmt: skip
    """Warm-up, stable, decay: the peak held until the last `decay` steps, which fall to `final`.

    Hu et al. 2024, "MiniCPM", section 4.

    Raises:
        ValueError: if the decay does not fit after the warm-up.

    Example:
        >>> wsd(peak=1.0, steps=5, decay=2).rates
        array([1. , 1. , 1. , 1. , 0.5])
        >>> wsd(peak=4.0, steps=5, decay=2, final=1.0, shape="exponential").rates
        array([4., 4., 4., 4., 2.])
    """
    if not 0 < decay <= steps - warmup:
        raise ValueError(f"expected 0 < decay <= steps - warmup, got decay {decay}, steps {steps}, warmup {warmup}")
    fall = piece(peak, final, decay, shape=shape)

    def stable_decay(n: int) -> Schedule:
        return hold(peak, n - decay).then(fall) if n > decay else fall

    return _after_warmup(stable_decay, peak, steps, warmup, first)


def staircase(
    *, peak: float, steps: int, drops: Mapping[int, float], warmup: int = 0, first: float | None = None
) -> Schedule:
    """Warm-up, the peak, and from each step named in `drops` on the rate given there.

    Raises:
        ValueError: if a drop lies outside the run or inside its warm-up.

    Example:
        >>> staircase(peak=1.0, steps=5, drops={2: 0.5, 4: 0.1}).rates
        array([1. , 1. , 0.5, 0.5, 0.1])
    """
    rates = np.array(constant(peak=peak, steps=steps, warmup=warmup, first=first).rates)
    for step, rate in sorted(drops.items()):
        if not warmup <= step < steps:
            raise ValueError(f"expected drops between steps {warmup} and {steps - 1}, got one at {step}")
        rates[step:] = rate
    return Schedule(rates)


def from_samples(steps: Sequence[int] | Ints, rates: Sequence[float] | Floats) -> Schedule:
    """The schedule through sampled rates: straight lines between the samples, the first rate before the first of them.

    A warm-up that ended before the first sample is not known here: it counts as steps at the first sampled rate.

    Example:
        >>> from_samples([1, 3], [1.0, 0.5]).rates
        array([1.  , 1.  , 0.75, 0.5 ])
    """
    at = np.asarray(steps)
    return Schedule(np.interp(np.arange(int(at[-1]) + 1), at, np.asarray(rates, dtype=np.float64)))


def _after_warmup(
    rest: Callable[[int], Schedule], peak: float, steps: int, warmup: int, first: float | None
) -> Schedule:
    if not 0 <= warmup < steps:
        raise ValueError(f"expected 0 <= warmup < steps, got warmup {warmup}, steps {steps}")
    body = rest(steps - warmup)
    return ramp(peak, warmup, first=first).then(body) if warmup else body


def _count(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"expected at least one step, got {steps}")
    return steps


_SHAPES: dict[str, Callable[[float, float, Floats], Floats]] = {
    "line": lambda start, end, p: start + (end - start) * p,
    "cosine": lambda start, end, p: start + (end - start) * (1 - np.cos(np.pi * p)) / 2,
    "exponential": lambda start, end, p: start * (end / start) ** p,
}
