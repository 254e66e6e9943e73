"""Means of random samples with honest standard errors, and when to stop drawing."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

LEAST = 20  # samples before the first look at the scatter: fewer, and lucky agreement would stop too early too often
_TWO_SIDED = 0.975


def small_sample_factor(dof: float) -> float:
    """By how much a standard error of few samples is widened so that the normal interval covers 95 %.

    t_dof(0.975) / z(0.975): 6.5 for two samples, 1.09 for sixteen, 1 for many.

    Example:
        >>> round(small_sample_factor(1), 2), round(small_sample_factor(15), 2), round(small_sample_factor(1e9), 2)
        (6.48, 1.09, 1.0)

    Source: Student 1908.
    """
    from scipy.special import stdtrit

    return float(stdtrit(dof, _TWO_SIDED)) / NormalDist().inv_cdf(_TWO_SIDED)


def skewness_factor(skewness: float, count: int) -> float:
    """By how much a standard error is widened where samples are skewed: 1 + (x^4 + 2 x^2 - 3) / (18 n) skewness^2.

    A quadratic form dominated by one eigenvalue is skewed like a chi-squared number: a small mean then comes with a small
    scatter, and the plain interval misses low too often. This is the term of the Edgeworth expansion of the t-statistic
    that says so, at x = 1.96.

    Example:
        >>> skewness_factor(0.0, 16), round(skewness_factor(2.0, 16), 2)
        (1.0, 1.27)

    Source: Hall 1992, "The bootstrap and Edgeworth expansion", eq. 2.55 and section 3.5.
    """
    x2 = NormalDist().inv_cdf(_TWO_SIDED) ** 2
    return 1 + (x2**2 + 2 * x2 - 3) / (18 * count) * skewness**2


class Running:
    """Mean and scatter of samples of one shape, in float64.

    Example:
        >>> r = Running()
        >>> r.add(torch.tensor([1.0, 2.0, 3.0, 6.0]))
        >>> r.mean.item(), r.variance.item()
        (3.0, 4.666666666666667)
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.zeros((), dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)
        self._scalars: list[Tensor] = []

    def add(self, samples: Tensor) -> None:
        """Take in samples along the first axis, (n, ...).

        Source: Chan, Golub and LeVeque 1979, eq. 1.5.
        """
        samples = samples.double()
        n, mean = len(samples), samples.mean(dim=0)
        gap = mean - self.mean
        self._squares = self._squares + gap.square() * (self.count * n / (self.count + n))
        if n > 1:
            self._squares = self._squares + (samples - mean).square().sum(dim=0)
        self.count += n
        self.mean = self.mean + gap * (n / self.count)
        if samples.ndim == 1:
            self._scalars.append(samples)

    @property
    def variance(self) -> Tensor:
        """Variance of one sample, NaN below two samples."""
        return self._squares / (self.count - 1) if self.count > 1 else torch.full_like(self._squares, math.nan)

    @property
    def stderr(self) -> Tensor:
        """Standard error of the mean, widened for few samples and, of numbers, for skewed ones; shaped like a sample."""
        if self.count < 2:
            return self.variance
        widened = small_sample_factor(self.count - 1) * skewness_factor(self.skewness, self.count)
        return (self.variance / self.count).sqrt() * widened

    @property
    def skewness(self) -> float:
        """Third standardized moment of samples that are numbers, corrected for their count; 0 for others."""
        n = self.count
        if not self._scalars or n < 3 or not float(self._squares) > 0:
            return 0.0
        off = torch.cat(self._scalars) - self.mean
        return float(off.pow(3).mean() / off.square().mean() ** 1.5) * (n * (n - 1)) ** 0.5 / (n - 2)

    def target(self, rtol: float, atol: float) -> float:
        """Standard error asked for: max(rtol |mean|, atol), in Euclidean norm."""
        return max(rtol * float(torch.linalg.vector_norm(self.mean)), atol)

    def precise(self, rtol: float, atol: float) -> bool:
        """Whether the standard error, in Euclidean norm, meets its target."""
        return float(torch.linalg.vector_norm(self.stderr)) <= self.target(rtol, atol)

    def missing(self, rtol: float, atol: float) -> int:
        """Samples that should do, at most as many as were drawn: a wrong guess of the scatter then costs little."""
        wanted, have = self.target(rtol, atol), float(torch.linalg.vector_norm(self.stderr))
        ratio = (have / wanted) ** 2 if wanted > 0 else math.inf
        return max(1, min(self.count, math.ceil(self.count * (1.05 * ratio - 1)) if ratio < 2 else self.count))


def sample_until(
    draw: Callable[[int], Tensor],
    *,
    rtol: float,
    atol: float,
    room: Callable[[], int],
    running: Running | None = None,
    chunk: int = 2**20,
) -> tuple[Running, bool]:
    """Draw samples until their mean is known to max(rtol |mean|, atol), or there is no room for more.

    Looks are few (after `LEAST`, then where the scatter so far says it should do), since each look is a chance to stop
    on luck.

    Args:
        draw: so many independent samples, (n, ...).
        rtol: standard error asked for, as a share of the mean.
        atol: standard error asked for, in the unit of the samples.
        room: how many more samples may be drawn, asked before each draw.
        running: samples to go on from.
        chunk: most samples held at once.

    Returns:
        The samples' mean and scatter, and whether the target was met.
    """
    running = running or Running()
    wanted = LEAST - running.count
    while True:
        while wanted > 0 and (fits := min(wanted, chunk, room())) > 0:
            running.add(draw(fits))
            wanted -= fits
        if running.count > 1 and running.precise(rtol, atol) and running.count >= LEAST:
            return running, True
        if room() <= 0:
            return running, False
        wanted = running.missing(rtol, atol)


def check_tolerance(rtol: float, atol: float) -> None:
    """Refuse tolerances no sampling can meet.

    Raises:
        ValueError: if one is negative or not finite, or both are zero.
    """
    if not (0 <= rtol < math.inf and 0 <= atol < math.inf and rtol + atol > 0):
        raise ValueError(f"expected rtol and atol of at least 0, not both 0; got rtol={rtol}, atol={atol}")
