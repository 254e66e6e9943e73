"""Solutions against dense float64 ones, and what is said when there is none."""

from __future__ import annotations

import pytest
import torch

from tests.linalg.cases import MATRICES, SIZE, Poisoned, operator
from tests.worlds import matrix, normal
from towtank.linalg.eigsh import eigsh
from towtank.linalg.solve import Inverse, solve

POSITIVE = MATRICES["outliers"]
INDEFINITE = matrix(torch.cat([torch.tensor([-3.0, -1]).double(), torch.linspace(1, 10, SIZE - 2).double()]))


@pytest.mark.parametrize("method", ["cg", "minres"])
@pytest.mark.parametrize("damping", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_solutions_and_their_residuals(dtype: torch.dtype, damping: float, method: str) -> None:
    B = normal(SIZE, 2, seed=1)
    found = solve(operator(POSITIVE, dtype), B.to(dtype), damping=damping, method=method)  # type: ignore[arg-type]
    damped = POSITIVE + damping * torch.eye(SIZE).double()
    kappa = float(torch.linalg.cond(damped))
    true = torch.linalg.vector_norm(B - damped @ found.x.double(), dim=0) / B.norm(dim=0)
    assert found.converged and found.residual <= 1e-5
    assert float(true.max()) == pytest.approx(found.residual, abs=20 * kappa * torch.finfo(dtype).eps)
    exact = torch.linalg.solve(damped, B)
    assert float((found.x - exact).norm() / exact.norm()) <= kappa * 2e-5


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_preconditioners(method: str) -> None:
    scale = torch.logspace(-2, 2, SIZE).double()
    A = scale[:, None] * POSITIVE * scale
    b = normal(SIZE, seed=2)
    inverse = torch.linalg.inv(A)
    plain = solve(operator(A), b, method=method, max_products=2000)  # type: ignore[arg-type]
    for M in (1 / A.diagonal(), operator(inverse), lambda r: inverse @ r):
        helped = solve(operator(A), b, method=method, preconditioner=M)  # type: ignore[arg-type]
        assert helped.converged and helped.products < 0.5 * plain.products


def test_conjugate_gradients_report_negative_curvature() -> None:
    found = solve(operator(INDEFINITE), normal(SIZE, seed=3), method="cg")
    assert found.status == "indefinite" and not found.converged
    assert found.direction is not None and found.curvature is not None and found.curvature < 0
    v = found.direction
    assert float(v @ INDEFINITE @ v / (v @ v)) == pytest.approx(found.curvature)
    assert solve(operator(INDEFINITE), normal(SIZE, seed=3)).converged


def test_no_solution_is_said() -> None:
    singular = torch.diag(torch.tensor([1.0, 2, 0])).double()
    found = solve(operator(singular, semidefinite=True), torch.ones(3).double())
    assert found.status == "singular" and found.curvature == 0
    other = solve(operator(singular), torch.ones(3).double())
    assert other.status == "stagnated" and other.residual == pytest.approx(3**-0.5)
    few = solve(operator(POSITIVE), normal(SIZE, seed=1), max_products=6)
    assert few.status == "max_products" and few.products <= 6 and 1e-5 < few.residual < 1
    fine = solve(operator(POSITIVE, torch.float32), normal(SIZE, seed=1), tol=1e-12)
    assert fine.status == "stagnated" and fine.residual < 1e-5


def test_nothing_to_do_and_one_dimension() -> None:
    zero = solve(operator(POSITIVE), torch.zeros(SIZE))
    assert zero.converged and zero.products == 0 and not zero.x.any()
    assert solve(operator(torch.full((1, 1), 4.0)), torch.ones(1)).x.item() == pytest.approx(0.25)


def test_an_inverse_is_an_operator() -> None:
    inverse = Inverse(operator(POSITIVE, semidefinite=True), damping=0.1, tol=1e-10)
    assert torch.allclose(inverse.dense(), torch.linalg.inv(POSITIVE + 0.1 * torch.eye(SIZE)), atol=1e-8)
    smallest = float(torch.linalg.eigvalsh(POSITIVE)[0])
    assert eigsh(inverse).values[0].item() == pytest.approx(1 / (smallest + 0.1), rel=1e-3)
    assert inverse.converged and inverse.products > SIZE


@pytest.mark.parametrize(
    ("b", "kwargs", "match"),
    [
        (torch.ones(3), {}, "shape"),
        (torch.full((SIZE,), torch.nan), {}, "finite"),
        (torch.ones(SIZE), {"tol": 0.0}, "tol"),
        (torch.ones(SIZE), {"method": "lu"}, "method"),
        (torch.ones(SIZE), {"preconditioner": torch.ones(3)}, "diagonal"),
        (torch.ones(SIZE), {"preconditioner": lambda r: -r}, "positive definite"),
    ],
)
def test_bad_arguments(b: torch.Tensor, kwargs: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        solve(operator(POSITIVE), b, **kwargs)
    with pytest.raises(TypeError, match="floating"):
        solve(operator(POSITIVE), torch.ones(SIZE, dtype=torch.int64))


def test_a_product_that_is_not_finite() -> None:
    with pytest.raises(ValueError, match="finite products"):
        solve(Poisoned() + operator(torch.diag(torch.arange(30.0))), torch.ones(30), tol=1e-6)
