"""Tests that say how large a batch must be for its gradient to be worth a step: norm, inner product and augmented."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from towtank.signals.noise_scale import noise_scale_from_examples
from towtank.signals.step import CannotTell


@dataclass(frozen=True, kw_only=True)
class BatchTests:
    """The smallest batch sizes that pass, in examples; infinite where the gradient cannot be told from its noise.

    They are the decisions of the tests on this sample, not estimates: the uncertainty is that of the noise scale.

    Args:
        norm: of the norm test.
        inner_product: of the inner-product test.
        augmented: of the inner-product and the orthogonality test together.
        examples: size of the batch that was tested.
    """

    norm: float
    inner_product: float
    augmented: float
    examples: int


def batch_growth_tests(
    squares: Any,
    inners: Any,
    *,
    eta: float = 0.5,
    theta: float = 0.9,
    nu: float = 5.84,
    unbiased: bool = False,
) -> BatchTests:
    """Batch sizes b that the variance of the gradients g_i of M examples asks for, with g their mean and all variances sample ones.

        norm            E |g_i - g|^2 / b          <= eta^2 |g|^2      descent in the mean: b >= B_simple / eta^2
        inner product   Var <g_i, g> / b           <= theta^2 |g|^4    g is a descent direction
        orthogonality   E |g_i - <g_i, g> g / |g|^2|^2 / b <= nu^2 |g|^2    and not nearly orthogonal to it

    All are over the whole gradient at once: sums over tensors of tests of single tensors are other tests. The part of the
    variance that is orthogonal to g is what the parallel one leaves, tr(Sigma) - Var <g_i, g> / |g|^2.

    Args:
        squares: |g_i|^2 (M,).
        inners: <g_i, g> (M,).
        eta: of the norm test: relative error of the gradient that is allowed.
        theta: of the inner-product test.
        nu: of the orthogonality test; tan of the allowed angle.
        unbiased: whether the noise in g is taken out of |g|^2. The published tests leave it in, so that a batch asks for at most
            M / eta^2 at once; without it, the norm test is exactly b >= B_simple / eta^2.

    Raises:
        CannotTell: if there are fewer than three examples, or the mean gradient is 0.
        ValueError: if a constant is not positive.

    Example:
        Gradients (1, 1), (1, -1), (1, 1), (1, -1): variance 4/3, all of it orthogonal to the mean (1, 0).

        >>> batch_growth_tests([2.0] * 4, [1.0] * 4, eta=0.5, theta=0.9, nu=0.5)
        BatchTests(norm=6.0, inner_product=1.0, augmented=6.0, examples=4)

    Source: Bollapragada, Byrd and Nocedal 2018, "Adaptive sampling strategies for stochastic optimization", sections 2 and 3.
    """
    if min(eta, theta, nu) <= 0:
        raise ValueError(f"expected positive eta, theta and nu, got {eta}, {theta}, {nu}")
    n_M, d_M = (np.asarray(x, dtype=float) for x in (squares, inners))
    if len(n_M) < 3:
        raise CannotTell(f"expected gradients of at least 3 examples, got {len(n_M)}")
    found = noise_scale_from_examples(n_M, d_M)
    biased = float(d_M.mean())
    if not biased > 0:
        raise CannotTell("expected a mean gradient that is not 0, got one that is: no batch size passes")
    g2 = found.signal if unbiased else biased
    along = float(d_M.var(ddof=1))
    across = max(found.noise - along / biased, 0.0)
    inner = _batch(along, theta**2 * g2 * abs(g2))
    return BatchTests(
        norm=_batch(found.noise, eta**2 * g2),
        inner_product=inner,
        augmented=max(inner, _batch(across, nu**2 * g2)),
        examples=len(n_M),
    )


def _batch(variance: float, allowed: float) -> float:
    if allowed <= 0:
        return math.inf
    # a quotient that is whole but for rounding stays whole
    return float(max(1, math.ceil(variance / allowed * (1 - 1e-12))))
