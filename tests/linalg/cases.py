"""Operators made for the tests of the algorithms, and the bounds a coverage must meet."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from tests.worlds import generator, matrix, normal
from towtank.estimate import Estimate
from towtank.linalg.operator import LinearOperator

SIZE = 60


def spectra() -> dict[str, Tensor]:
    """Flat, with outliers above a bulk, and decaying: the shapes on which estimators differ."""
    bulk = 0.1 + 0.5 * torch.rand(SIZE - 6, generator=generator(1), dtype=torch.float64)
    return {
        "flat": normal(SIZE, seed=2) + 2,
        "outliers": torch.cat([torch.tensor([20.0, 12, 8, 5, 3, 2], dtype=torch.float64), bulk]),
        "decay": 20 * 0.8 ** torch.arange(SIZE, dtype=torch.float64) + 0.05,
    }


MATRICES = {name: matrix(values) for name, values in spectra().items()}


class Gram(LinearOperator):
    """J^T J, with |J^T e|^2 for random signs e as cheap samples of its trace, like a Gauss-Newton matrix."""

    def __init__(self, J: Tensor) -> None:
        super().__init__(J.shape[1], dtype=J.dtype, semidefinite=True, cost=0.6)
        self.J = J

    def _matmat(self, X: Tensor) -> Tensor:
        return self.J.T @ (self.J @ X)

    def trace_samples(self, count: int, generator: torch.Generator | None) -> tuple[Tensor, float]:
        e = 2 * torch.randint(0, 2, (count, len(self.J)), generator=generator).to(self.J) - 1
        return (e @ self.J).square().sum(dim=1), 0.5


class NearGram(LinearOperator):
    """J^T J + E, with J^T J as control variate, like a Hessian."""

    def __init__(self, J: Tensor, E: Tensor) -> None:
        super().__init__(J.shape[1], dtype=J.dtype)
        self.gram, self.E = Gram(J), E

    def _matmat(self, X: Tensor) -> Tensor:
        return self.gram @ X + self.E @ X

    def control(self) -> LinearOperator:
        return self.gram


class Poisoned(LinearOperator):
    """The identity, whose third product has a NaN in the block `second`."""

    def __init__(self) -> None:
        super().__init__(30, dtype=torch.float32, slices={"first": slice(0, 10), "second": slice(10, 30)})
        self.made = 0

    def _matmat(self, X: Tensor) -> Tensor:
        self.made += 1
        return X if self.made < 3 else X.clone().index_fill_(0, torch.tensor([12]), torch.nan)


def operator(A: Tensor, dtype: torch.dtype = torch.float64, **kwargs: bool) -> LinearOperator:
    return LinearOperator.from_matrix(A.to(dtype), **kwargs)


def assert_honest(estimate: Callable[[int], Estimate], truth: float, seeds: int = 200) -> None:
    """The truth lies within two standard errors in 90 to 99 % of cases, give or take what so many seeds can tell.

    With p the coverage, the count of hits is binomial(seeds, p); it must not be so small that p >= 0.90 could be refuted at
    1 in 1000, nor so large that p <= 0.99 could.
    """
    found = [estimate(seed) for seed in range(seeds)]
    hits = sum(abs(e.value - truth) <= 2 * e.stderr for e in found)
    assert binom.cdf(hits, seeds, 0.90) > 1e-3, f"{hits} of {seeds}: errors too small"
    assert binom.sf(hits - 1, seeds, 0.99) > 1e-3, f"{hits} of {seeds}: errors too large"


def assert_equal_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(a, b), (a - b).abs().max()


def approx(x: float, rel: float) -> object:
    return pytest.approx(x, rel=rel)
