"""Coherence: how much the gradients of single examples help each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from towtank.estimate import Interval
from towtank.signals.noise_scale import noise_scale_from_examples
from towtank.signals.step import CannotTell


@dataclass(frozen=True, kw_only=True)
class Coherence:
    """How far the gradients of M examples point the same way.

    Args:
        biased: alpha over all pairs, an example with itself included: 1/M where gradients are orthogonal, 1 where all are equal.
        unbiased: alpha over pairs of different examples, 0 and 1 in these cases; at least -1 / (M - 1).
        examples: M.
    """

    biased: float
    unbiased: Interval
    examples: int

    @property
    def helped(self) -> float:
        """m-coherence M alpha: how many examples of the M a step on one of them helps, itself included."""
        return self.examples * self.biased


def gradient_coherence(squares: Any, inners: Any) -> Coherence:
    """Coherence alpha of the gradients g_i of M examples.

        alpha = E <g_z, g_z'> / E |g_z|^2 = |mean g_i|^2 / mean |g_i|^2 = 1 / (1 + B_simple)

    The first equality takes z' from all examples, which biases it upward by (1 - alpha) / M; the unbiased one takes z' != z,
    and is the one that is exactly 1 / (1 + B_simple) of the unbiased noise scale.

    Args:
        squares: |g_i|^2 (M,).
        inners: <g_i, mean g> (M,).

    Raises:
        CannotTell: if every gradient is 0, or there are fewer than three.

    Example:
        Three orthogonal gradients of length 1.

        >>> found = gradient_coherence([1.0] * 3, [1 / 3] * 3)
        >>> round(found.biased, 6), round(found.unbiased.value, 6), round(found.helped, 6)
        (0.333333, 0.0, 1.0)

    Source: Chatterjee and Zielinski 2022, "On the generalization mystery in deep learning".
    """
    n_M, d_M = (np.asarray(x, dtype=float) for x in (squares, inners))
    if len(n_M) < 3:
        raise CannotTell(f"expected gradients of at least 3 examples, got {len(n_M)}")
    if not n_M.sum() > 0:
        raise CannotTell("expected a gradient that is not 0, got only zeros or NaN: there is no direction to share")
    unbiased = noise_scale_from_examples(n_M, d_M).coherence()
    return Coherence(biased=float(d_M.mean() / n_M.mean()), unbiased=unbiased, examples=len(n_M))
