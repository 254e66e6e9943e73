"""Diagonals of matrices and of inverses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.linalg.cases import MATRICES, SIZE, operator
from tests.worlds import normal
from towtank.linalg.diagonal import diagonal, inverse_diagonal
from towtank.linalg.operator import LinearOperator


class Knows(LinearOperator):
    def __init__(self, A: Tensor) -> None:
        super().__init__(len(A), dtype=A.dtype)
        self.A = A

    def _matmat(self, X: Tensor) -> Tensor:
        raise AssertionError("no product is needed")

    def exact_diagonal(self) -> tuple[Tensor, float]:
        return self.A.diagonal(), 2.5


def test_what_the_operator_knows_costs_what_it_says() -> None:
    found = diagonal(Knows(MATRICES["flat"]))
    assert torch.equal(found.values, MATRICES["flat"].diagonal()) and found.products == 2.5 and not found.stderr.any()


@pytest.mark.parametrize(("method", "name"), [("hutchinson", "flat"), ("xdiag", "flat"), ("xdiag", "outliers")])
def test_stated_errors_are_honest(method: str, name: str) -> None:
    """Entries of one run share their probes; over 12 runs the share of entries within two errors has settled to 2 %."""
    A = MATRICES[name]
    inside = []
    for seed in range(12):
        found = diagonal(operator(A), method=method, rtol=0.15, generator=seed)  # type: ignore[arg-type]
        assert found.converged and found.stderr.norm() <= 0.15 * found.values.norm()
        inside.append(((found.values - A.diagonal()).abs() <= 2 * found.stderr).double().mean())
    assert 0.88 <= float(torch.stack(inside).mean()) <= 0.995


def test_xdiag_needs_fewer_products_and_low_rank_is_exact() -> None:
    op = operator(MATRICES["outliers"])
    assert diagonal(op, method="xdiag", rtol=0.1).products < 0.3 * diagonal(op, method="hutchinson", rtol=0.1).products
    B = normal(50, 4, seed=1)
    found = diagonal(operator(B @ B.T), method="xdiag")
    assert torch.allclose(found.values, B.square().sum(dim=1), rtol=1e-9)


@pytest.mark.parametrize("method", ["auto", "exact", "xdiag"])
@pytest.mark.parametrize("size", [2, 30])
def test_exact_ways(size: int, method: str) -> None:
    A = torch.diag(torch.arange(1.0, size + 1)).double()
    found = diagonal(operator(A), method=method)  # type: ignore[arg-type]
    assert found.converged and torch.allclose(found.values, A.diagonal())


def test_a_small_budget_says_so() -> None:
    found = diagonal(operator(MATRICES["outliers"]), rtol=1e-3, max_products=25)
    assert not found.converged and found.products == 25
    with pytest.raises(ValueError, match="max_products"):
        diagonal(operator(MATRICES["flat"]), method="exact", max_products=10)


def test_inverse_diagonal() -> None:
    A = MATRICES["outliers"]
    truth = torch.linalg.inv(A + 0.5 * torch.eye(SIZE)).diagonal()
    found = inverse_diagonal(operator(A, semidefinite=True), damping=0.5, rtol=0.1)
    assert found.converged and found.products > 20
    assert float((found.values - truth).norm()) <= 3 * float(found.stderr.norm())
    assert not inverse_diagonal(operator(A, semidefinite=True), damping=0.5, rtol=1e-3, max_products=200).converged
