"""How much larger the curvature of a small batch is than that of all data, and whether it shrinks as 1/b or as 1/sqrt(b).

b: batch size, examples; N: examples there are; b' = b / (1 - b / N); lambda(b): largest Hessian eigenvalue of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from towtank.estimate import Interval, Verdict
from towtank.linalg.operator import LinearOperator
from towtank.signals.history import Floats

if TYPE_CHECKING:
    from towtank.laws.batch import Exponent
    from towtank.problem import Problem

LEAST_SIZES = 4
LEAST_BATCHES = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Inflation:
    """The largest curvature of batches against their size.

    Args:
        exponent: "1/b": an eigenvalue that stands out of the noise; "1/sqrt(b)": the edge of the noise itself; "neither" or
            "cannot tell".
        p: exponent of b in the fitted law, 95 %; None where the fit is refused.
        limit: lambda of infinitely large batches, 95 %; it reaches 0 where no batch is large enough to show it.
        critical: b* at which the noise adds as much as the limit, lambda(b*) = 2 limit; without an upper end where the
            limit is not seen.
        verdict: `ok` where the data decide.
        batch: batch size of each row; curvature: lambda of each row.
    """

    exponent: Exponent
    p: Interval | None
    limit: Interval | None
    critical: Interval | None
    verdict: Verdict
    batch: Floats
    curvature: Floats

    def readings(self) -> dict[str, float]:
        """Mean curvature by batch size, as numbers by key."""
        sizes = np.unique(self.batch)
        return {f"curvature/batch/{int(b)}": float(self.curvature[self.batch == b].mean()) for b in sizes}


def inflation(
    batch: Sequence[float] | Floats,
    curvature: Sequence[float] | Floats,
    *,
    population: int | None = None,
    seed: int = 0,
) -> Inflation:
    """Fit lambda(b) = u + s / b'^p to the curvature of batches, and tell p = 1 from p = 1/2.

    Noise of variance sigma^2 / b' in each of P^2 matrix elements moves an eigenvalue lambda_1 that stands out of it to
    lambda_1 + P sigma^2 / (b' lambda_1); below b* = P sigma^2 / lambda_1^2 none stands out, and the largest is the edge of the
    noise, 2 sigma sqrt(P / b'). Learning rates below the limit 2 / lambda(b) then scale with b, or with sqrt(b). The fit,
    its interval and the decision are those of `towtank.laws.batch.BatchRateLaw` and `regime`, with the rates 2 / lambda.

    Args:
        batch: batch size of each row, (n,).
        curvature: largest eigenvalue of the Hessian of that batch, (n,), positive.
        population: N, examples from which batches were drawn without replacement; None: many.
        seed: of the bootstrap.

    Raises:
        ValueError: if lengths differ, a number is not positive, or batches are as large as the population.

    Example:
        >>> b = np.repeat([16.0, 64.0, 256.0, 1024.0], 3)
        >>> wobble = 1 + 0.01 * np.tile([1.0, 0.0, -1.0], 4)
        >>> found = inflation(b, 2 * (1 + 16 / b) * wobble)
        >>> found.exponent, 2.0 in found.limit, 16.0 in found.critical
        ('1/b', True, True)

    Source: Granziol, Zohren and Roberts 2022, "Learning rates as a function of batch size: a random matrix theory approach".
    """
    from towtank.laws.batch import BatchRateLaw, regime

    b, y = np.asarray(batch, float), np.asarray(curvature, float)
    if b.shape != y.shape or b.ndim != 1:
        raise ValueError(f"expected one curvature for each of {b.size} batches, got {y.size}")
    if not (np.isfinite(b).all() and (b > 0).all() and np.isfinite(y).all() and (y > 0).all()):
        raise ValueError("expected positive batch sizes and curvatures; leave out batches without positive curvature")
    if population is not None and (b >= population).any():
        raise ValueError(f"expected batches below the {population} examples there are, got {b.max():g}; leave it out")
    counts = np.unique(b, return_counts=True)[1]
    if len(counts) < LEAST_SIZES or counts.min() < LEAST_BATCHES:
        verdict = Verdict(
            "refuse", f"expected {LEAST_SIZES} batch sizes of {LEAST_BATCHES} batches or more, got {len(counts)} sizes"
        )
        return Inflation(
            exponent="cannot tell", p=None, limit=None, critical=None, verdict=verdict, batch=b, curvature=y
        )
    corrected = b if population is None else b / (1 - b / population)
    fit = BatchRateLaw().fit({"batch": corrected.tolist(), "lr": (2 / y).tolist()}, x="batch", y="lr", seed=seed)
    found = regime(fit)
    known = fit.draws.size > 0
    return Inflation(
        exponent=found.exponent,
        p=found.p,
        limit=_inverse(fit.coefficients["lr_max"]) if known else None,
        critical=fit.coefficients["B"] if known else None,
        verdict=found.verdict,
        batch=b,
        curvature=y,
    )


def _inverse(rate: Interval) -> Interval:
    """2 / lr of an interval of rates."""
    value, low, high = (2 / x if x > 0 else math.inf for x in (rate.value, rate.high, rate.low))
    return Interval(value, low, high, rate.level)


def batch_curvature(
    problem_of_batch: Callable[[Any], Problem | LinearOperator],
    batches_by_size: Mapping[int, Sequence[Any]],
    *,
    population: int | None = None,
    tol: float = 0.02,
    max_products: int = 200,
    seed: int = 0,
) -> Inflation:
    """Measure the largest Hessian eigenvalue of batches of several sizes, and fit how it depends on the size.

    It costs one `towtank.eigsh` for each batch: for 4 sizes of 4 batches some 16 times 10 Hessian products.

    Args:
        problem_of_batch: the `Problem` of a batch, or its Hessian as an operator.
        batches_by_size: {b: batches of b examples}, 4 sizes or more with 2 batches or more each; see `drawn`.
        population: see `inflation`.
        tol: residual allowed to an eigenvalue, as a share of it.
        max_products: where an eigenvalue stops at the latest.
        seed: of the start vectors and the bootstrap.

    Raises:
        ValueError: if a product is not finite, or a batch has no positive curvature.

    Example:
        Matrices with one eigenvalue 1 + 8 / b and zeros.

        >>> of = lambda x: LinearOperator.from_matrix(torch.diag(torch.tensor([x, 0.0, 0.0], dtype=torch.float64)))
        >>> wobble = (0.99, 1.0, 1.01)
        >>> found = batch_curvature(of, {b: [(1 + 8 / b) * w for w in wobble] for b in (8, 16, 32, 64, 128, 256)})
        >>> found.exponent
        '1/b'

    Source: Granziol, Zohren and Roberts 2022.
    """
    from towtank.linalg.eigsh import eigsh

    sizes, values = [], []
    for b, batches in sorted(batches_by_size.items()):
        for i, batch in enumerate(batches):
            op = _operator(problem_of_batch(batch))
            pair = eigsh(op, tol=tol, generator=seed + i, max_products=max_products, progress=False)
            sizes.append(float(b))
            values.append(float(pair.values[0]))
    return inflation(sizes, values, population=population, seed=seed)


def _operator(made: Problem | LinearOperator) -> LinearOperator:
    from towtank.curvature.hessian import Hessian

    return made if isinstance(made, LinearOperator) else Hessian(made)


def drawn(examples: Any, sizes: Sequence[int], count: int, *, seed: int = 0) -> dict[int, list[Any]]:
    """Batches drawn from given examples, without replacement within a batch.

    Args:
        examples: tensor, or tuple, list or mapping of tensors, whose first axes run over the examples.
        sizes: batch sizes.
        count: batches of each size.
        seed: of the draws.

    Raises:
        ValueError: if a size is not between 1 and the number of examples.

    Example:
        >>> found = drawn((torch.arange(10), torch.arange(10) * 2), [2, 5], 3)
        >>> len(found[5]), found[5][0][0].shape, bool((found[5][0][1] == 2 * found[5][0][0]).all())
        (3, torch.Size([5]), True)
    """
    from torch.utils._pytree import tree_leaves, tree_map

    leaves = [x for x in tree_leaves(examples) if isinstance(x, torch.Tensor)]
    N = len(leaves[0]) if leaves else 0
    if any(not 1 <= b <= N for b in sizes) or any(len(x) != N for x in leaves):
        raise ValueError(f"expected batch sizes from 1 to the {N} examples that all tensors have, got {list(sizes)}")
    generator = torch.Generator().manual_seed(seed)
    found: dict[int, list[Any]] = {}
    for b in sizes:
        places = [torch.randperm(N, generator=generator)[:b] for _ in range(count)]
        found[b] = [
            tree_map(lambda x, at=at: x[at.to(x.device)] if isinstance(x, torch.Tensor) else x, examples)
            for at in places
        ]
    return found
