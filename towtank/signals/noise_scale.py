"""The gradient noise scale of a step, and its streaming estimate over steps, with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from towtank.estimate import Interval
from towtank.signals.step import CannotTell

Floats = np.ndarray


@dataclass(frozen=True, kw_only=True)
class NoiseScale:
    """|G|^2 and tr(Sigma), both estimated without bias, and what follows from them.

        B_simple = tr(Sigma) / |G|^2,   coherence = |G|^2 / (|G|^2 + tr(Sigma)) = 1 / (1 + B_simple)

    with G the mean and Sigma the covariance of the gradient of one example. B_simple estimates the critical batch size: a
    batch well below it trains in fewer steps when it grows, in proportion; one well above does not.

    Args:
        signal: |G|^2, negative where noise hides it.
        noise: tr(Sigma), of one example.
        covariance: of (signal, noise) as estimates, (2, 2); None where one step cannot tell.
        freedom: degrees of freedom of the covariance.
        tensors: {parameter: (signal, noise)}, the parts of the sums above.

    Example:
        >>> found = NoiseScale(signal=1.0, noise=20.0, covariance=np.diag([0.01, 1.0]), freedom=100)
        >>> print(found.scale())
        20 [16.2, 25.4]
        >>> NoiseScale(signal=-0.1, noise=20.0).scale().high
        inf

    Source: McCandlish et al. 2018, "An empirical model of large-batch training", equations 2.9 and A.1 to A.3; Fieller 1954
    for the interval of the ratio.
    """

    signal: float
    noise: float
    covariance: Floats | None = field(default=None, repr=False)
    freedom: float = 0.0
    tensors: Mapping[str, tuple[float, float]] = field(default_factory=dict, repr=False)

    def scale(self, level: float = 0.95) -> Interval:
        """B_simple in examples; without an upper end where the signal cannot be told from 0.

        Args:
            level: coverage of the interval, of Fieller's kind.

        Raises:
            CannotTell: if there is neither signal nor noise.
        """
        value = ratio(self.noise, self.signal)
        if math.isnan(value):
            raise CannotTell("expected a gradient that is not 0, got neither signal nor noise")
        low, high = fieller(self.noise, self.signal, _swapped(self.covariance), self.freedom, level)
        return Interval(value, min(max(low, 0.0), value), max(high, value), level)

    def coherence(self, level: float = 0.95) -> Interval:
        """Share of the mean squared gradient of one example that all examples have in common, without bias.

        Args:
            level: coverage of the interval, of Fieller's kind.

        Raises:
            CannotTell: if there is neither signal nor noise.
        """
        A = np.array([[1.0, 0.0], [1.0, 1.0]])  # (signal, signal + noise)
        covariance = None if self.covariance is None else A @ self.covariance @ A.T
        square = self.signal + self.noise
        if not square > 0:
            raise CannotTell("expected a gradient that is not 0, got neither signal nor noise")
        value = self.signal / square
        low, high = fieller(self.signal, square, covariance, self.freedom, level)
        return Interval(value, min(low, value), max(high, value), level)

    @property
    def snr(self) -> dict[str, float]:
        """{parameter: |G|^2 / tr(Sigma)}: squared signal over the variance of one example; NaN where there is neither."""
        return {n: s / v if v > 0 else (math.inf if s > 0 else math.nan) for n, (s, v) in self.tensors.items()}


def noise_scale_from_parts(
    squares: Sequence[Mapping[str, Any]],
    sizes: Sequence[int] | None,
    total: Mapping[str, Any],
    *,
    parts: Literal["means", "sums"] = "means",
) -> NoiseScale:
    """Noise scale of one step from squared norms of the gradients of its parts and of their sum.

    A part of b examples has mean a G and covariance v Sigma, with a = 1, v = 1/b for means over its examples and a = v = b
    for sums; T is the squared norm of the sum of all parts and Q = sum_k l_k |g_k|^2, with l = 1 for means and 1/b for sums.
    Then |G|^2 and tr(Sigma) solve

        E T = (sum a)^2 |G|^2 + (sum v) tr(Sigma),   E Q = (sum l a^2) |G|^2 + (sum l v) tr(Sigma)

    For K parts of equal size b: |G|^2 = (T - Q) / (K (K - 1)), the mean inner product of two parts, and tr(Sigma) =
    b (K Q - T) / (K (K - 1)). A common factor of all parts (accumulation count, loss scale) cancels in the noise scale.

    Args:
        squares: of each part, {parameter: squared norm of its gradient}; a parameter that is missing has none.
        sizes: examples of each part; None where unknown: then they are taken as equal, and the noise scale counts parts.
        total: {parameter: squared norm of the sum over parts}.
        parts: whether parts were means over their examples times one factor, or sums over them times one factor.

    Raises:
        ValueError: if there are fewer than two parts, sizes do not belong to them, or are not positive.

    Example:
        Two examples with gradients (1, 1) and (1, -1): G = (1, 0), and the variance is 2.

        >>> found = noise_scale_from_parts([{"w": 2.0}, {"w": 2.0}], [1, 1], {"w": 4.0})
        >>> found.signal, found.noise
        (0.0, 2.0)

    Source: McCandlish et al. 2018, equations A.2 and A.3, for two batch sizes.
    """
    if len(squares) < 2:
        raise ValueError(f"expected at least 2 parts, got {len(squares)}; accumulate gradients over more micro-batches")
    if sizes is not None and (len(sizes) != len(squares) or min(sizes) <= 0):
        raise ValueError(f"expected {len(squares)} positive sizes, one a part, got {list(sizes)}")
    names = list(dict.fromkeys(n for part in (total, *squares) for n in part))
    total_N, *square_KN = _table((total, *squares), names)
    b_K = np.ones(len(squares)) if sizes is None else np.array(sizes, dtype=float)
    a_K, v_K, l_K = (np.ones_like(b_K), 1 / b_K, np.ones_like(b_K)) if parts == "means" else (b_K, b_K, 1 / b_K)
    system = np.array([[a_K.sum() ** 2, v_K.sum()], [(l_K * a_K**2).sum(), (l_K * v_K).sum()]])
    signal_N, noise_N = np.linalg.solve(system, np.stack([total_N, l_K @ np.stack(square_KN)]))
    return NoiseScale(
        signal=float(signal_N.sum()), noise=float(noise_N.sum()), tensors=_by_name(names, signal_N, noise_N)
    )


def noise_scale_from_examples(
    squares: Any, inners: Any, *, tensors: Mapping[str, tuple[float, float]] | None = None
) -> NoiseScale:
    """Noise scale from the gradients g_i of M examples: U-statistics, with the jackknife over examples in closed form.

        |G|^2 = (M^2 |g|^2 - sum |g_i|^2) / (M (M - 1)),   tr(Sigma) = (sum |g_i|^2 - M |g|^2) / (M - 1),   g = mean g_i

    With example i left out, sum |g_j|^2 loses |g_i|^2 and |sum g_j|^2 becomes M^2 |g|^2 - 2 M <g_i, g> + |g_i|^2. Products
    in the metric of a symmetric matrix H, g_i^T H g_i and g_i^T H g, give G^T H G and tr(H Sigma) instead.

    Args:
        squares: |g_i|^2 (M,).
        inners: <g_i, g> (M,).
        tensors: {parameter: (sum_i |g_i|^2, |mean_i g_i|^2)}.

    Raises:
        ValueError: if there are fewer than three examples, or not as many products as examples.

    Example:
        Gradients (2, 1), (2, -1), (2, 1), (2, -1): G = (2, 0), the sample variance of the second entry is 4/3.

        >>> found = noise_scale_from_examples([5.0] * 4, [4.0] * 4)
        >>> round(found.signal, 6), round(found.noise, 6)
        (3.666667, 1.333333)
    """
    n_M, d_M = (np.asarray(x, dtype=float) for x in (squares, inners))
    M = len(n_M)
    if M < 3 or n_M.shape != d_M.shape or n_M.ndim != 1:
        raise ValueError(f"expected products of at least 3 examples, got shapes {n_M.shape} and {d_M.shape}")
    Q, g2 = n_M.sum(), d_M.mean()
    signal, noise = _unbiased(Q, M**2 * g2, M)
    left_2M = np.stack(_unbiased(Q - n_M, M**2 * g2 - 2 * M * d_M + n_M, M - 1))
    names = list(tensors or {})
    table = np.array(list((tensors or {}).values()), dtype=float).reshape(-1, 2)
    return NoiseScale(
        signal=float(signal),
        noise=max(float(noise), 0.0)
        if (n_M >= 0).all()
        else float(noise),  # rounding only, unless the metric is signed
        covariance=np.cov(left_2M, bias=True) * (M - 1),
        freedom=M - 1,
        tensors=_by_name(names, *_unbiased(table[:, 0], M**2 * table[:, 1], M)),
    )


@dataclass(frozen=True, kw_only=True)
class NoiseStream:
    """Means of |G|^2 and tr(Sigma) over steps, with weights that decay: the ratio is taken after averaging.

    Where a step brings no covariance of its own, the scatter over steps gives that of the means. So drift within the window
    widens the interval.

    Args:
        steps: number of steps that the means are worth: weights decay by (steps - 1) / (steps + 1); inf for plain means.

    Example:
        >>> stream = NoiseStream()
        >>> for signal, noise in [(1.0, 9.0), (3.0, 11.0), (2.0, 10.0)]:
        ...     stream = stream.add(NoiseScale(signal=signal, noise=noise))
        >>> round(stream.estimate().scale().value, 6)
        5.0
    """

    steps: float = math.inf
    weight: float = 0.0
    weight2: float = 0.0
    mean: Floats = field(default_factory=lambda: np.zeros(2))
    scatter: Floats = field(default_factory=lambda: np.zeros((2, 2)))
    known: Floats | None = field(default_factory=lambda: np.zeros((2, 2)))
    freedom: float = 0.0
    tensors: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, found: NoiseScale) -> NoiseStream:
        """The stream with one more step; the same stream if the step is not finite, as one that overflowed.

        Args:
            found: of the step.
        """
        new = np.array([found.signal, found.noise])
        if not np.isfinite(new).all():
            return self
        decay = 1.0 if math.isinf(self.steps) else (self.steps - 1) / (self.steps + 1)
        weight = decay * self.weight + 1
        gap = new - self.mean
        known = None
        if found.covariance is not None and self.known is not None:
            known = decay**2 * self.known + found.covariance
        blend = partial(_blended, share=1 / weight)
        same = set(found.tensors) == set(self.tensors)
        return NoiseStream(
            steps=self.steps,
            weight=weight,
            weight2=decay**2 * self.weight2 + 1,
            mean=self.mean + gap / weight,
            scatter=decay * self.scatter + np.outer(gap, gap) * (weight - 1) / weight,
            known=known,
            freedom=decay * self.freedom + found.freedom,
            tensors={n: blend(self.tensors[n], x) for n, x in found.tensors.items()} if same else found.tensors,
        )

    def estimate(self) -> NoiseScale:
        """What the steps so far say together.

        Raises:
            ValueError: if there was none.
        """
        if not self.weight:
            raise ValueError("expected at least one step, got none that was finite")
        effective = self.weight**2 / self.weight2
        covariance, freedom = None, effective - 1
        if self.known is not None:
            covariance, freedom = self.known / self.weight**2, self.freedom
        elif effective > 1.5:
            covariance = self.scatter / (self.weight - self.weight2 / self.weight) / effective
        return NoiseScale(
            signal=float(self.mean[0]),
            noise=float(self.mean[1]),
            covariance=covariance,
            freedom=freedom,
            tensors=self.tensors,
        )


def ratio(numerator: float, denominator: float) -> float:
    """A ratio of two quantities that are known not to be negative: infinite where the denominator was estimated as one."""
    if denominator > 0:
        return max(numerator, 0.0) / denominator
    return math.inf if numerator > 0 else math.nan


def fieller(
    numerator: float, denominator: float, covariance: Floats | None, freedom: float, level: float
) -> tuple[float, float]:
    """Ends of the confidence set of a ratio of two means, the denominator being positive in truth.

        {r : (numerator - r denominator)^2 <= t^2 (C_nn - 2 r C_nd + r^2 C_dd)}

    Where the denominator cannot be told from 0 there is no upper end, and a lower one only if the numerator can be.

    Args:
        numerator: mean.
        denominator: mean, of the same data.
        covariance: C of (numerator, denominator) as means, (2, 2), or None: then nothing is known.
        freedom: degrees of freedom of C.
        level: of confidence.

    Example:
        >>> low, high = fieller(4.0, 2.0, np.zeros((2, 2)), 10, 0.95)
        >>> low, high
        (2.0, 2.0)

    Source: Fieller 1954, "Some problems in interval estimation".
    """
    if covariance is None or freedom <= 0 or not np.isfinite(covariance).all():
        return -math.inf, math.inf
    from scipy.special import stdtrit

    t2 = float(stdtrit(freedom, (1 + level) / 2)) ** 2
    a = denominator**2 - t2 * covariance[1, 1]
    b = numerator * denominator - t2 * covariance[0, 1]
    c = numerator**2 - t2 * covariance[0, 0]
    root = math.sqrt(max(b**2 - a * c, 0.0))
    if a > 0 and denominator > 0:
        return float((b - root) / a), float((b + root) / a)
    if a < 0 and c > 0 and numerator > 0:
        return float((b - root) / a), math.inf
    return -math.inf, math.inf


def _unbiased(Q: Any, square_of_sum: Any, M: int) -> tuple[Any, Any]:
    return (square_of_sum - Q) / (M * (M - 1)), (Q - square_of_sum / M) / (M - 1)


def _table(rows: Sequence[Mapping[str, Any]], names: list[str]) -> Floats:
    """Numbers (rows, names) from {name: tensor ()}, 0 where missing; one transfer for each device."""
    table = np.zeros((len(rows), len(names)))
    column = {n: j for j, n in enumerate(names)}
    by_device: dict[Any, list[tuple[int, int, Tensor]]] = {}
    for i, row in enumerate(rows):
        for n, x in row.items():
            if isinstance(x, Tensor):
                by_device.setdefault((x.device, x.dtype), []).append((i, column[n], x.detach().reshape(())))
            else:
                table[i, column[n]] = x
    for found in by_device.values():
        at_row, at_column, values = zip(*found)
        table[at_row, at_column] = torch.stack(values).double().cpu().numpy()
    return table


def _swapped(covariance: Floats | None) -> Floats | None:
    return None if covariance is None else covariance[::-1, ::-1]


def _by_name(names: list[str], signal_N: Floats, noise_N: Floats) -> dict[str, tuple[float, float]]:
    return {n: (float(s), float(v)) for n, s, v in zip(names, signal_N, noise_N)}


def _blended(old: tuple[float, float], new: tuple[float, float], *, share: float) -> tuple[float, float]:
    return old[0] + share * (new[0] - old[0]), old[1] + share * (new[1] - old[1])
