"""Traces and norms: stated errors, stopping, methods."""

from __future__ import annotations

import math

import pytest
import torch

from tests.linalg.cases import MATRICES, SIZE, Gram, NearGram, Poisoned, assert_honest, operator, spectra
from tests.worlds import matrix, normal
from towtank.linalg.norm import frobenius_norm
from towtank.linalg.trace import trace

J = normal(40, SIZE, seed=5) * 0.95 ** torch.arange(SIZE)
E = matrix(0.3 * normal(SIZE, seed=6))


def scatter(A: torch.Tensor) -> float:
    """Standard deviation of v^T A v over random signs."""
    return math.sqrt(2 * float(A.square().sum() - A.diagonal().square().sum()))


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
@pytest.mark.parametrize("name", ["flat", "outliers", "decay"])
def test_stated_errors_are_honest(name: str, method: str) -> None:
    op, truth = operator(MATRICES[name]), float(spectra()[name].sum())
    seeds = 200 if (name, method) == ("flat", "hutchinson") else 50
    assert_honest(lambda s: trace(op, method=method, rtol=0.1, generator=s), truth, seeds)  # type: ignore[arg-type]


def test_stated_errors_of_own_samples_and_of_the_control_variate_are_honest() -> None:
    assert_honest(lambda s: trace(Gram(J), generator=s), float(J.square().sum()))
    truth = float(J.square().sum() + E.trace())
    assert_honest(lambda s: trace(NearGram(J, E), generator=s), truth, seeds=100)


def test_stated_errors_of_the_norm_are_honest() -> None:
    truth = float(MATRICES["outliers"].norm())
    assert_honest(lambda s: frobenius_norm(operator(MATRICES["outliers"]), rtol=0.1, generator=s), truth, seeds=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_stops_where_asked(dtype: torch.dtype) -> None:
    """Needed: (relative scatter of one probe / rtol)^2 probes, the scatter from the matrix itself."""
    A = MATRICES["outliers"]
    sd = scatter(A)
    found = trace(operator(A, dtype), rtol=0.03, method="hutchinson")
    assert found.converged and found.stderr <= 0.03 * found.value
    assert found.products == pytest.approx((sd / 0.03 / float(A.trace())) ** 2, rel=0.4)  # scatter known to 10 %


def test_the_control_variate_is_taken_where_it_pays() -> None:
    """By the prices in `cases`: a pair of products costs 1.6, a sample 0.5 * 0.6; scatters known to 10 % each."""
    op = NearGram(J, 0.1 * E)
    plain = trace(op, rtol=0.01, method="hutchinson", max_products=5000)
    near = trace(op, rtol=0.01, max_products=5000)
    whole, gap, cheap = (scatter(A) for A in (op.dense(), 0.1 * E, J @ J.T))
    assert near.converged
    assert near.products / plain.products == pytest.approx((gap * 1.6**0.5 + cheap * 0.3**0.5) ** 2 / whole**2, rel=0.3)
    far = NearGram(J[:1] * 0.01, matrix(spectra()["outliers"]))
    assert trace(far, rtol=0.05).products <= 1.3 * trace(far, rtol=0.05, method="hutchinson").products


def test_xtrace_and_hutchpp_need_fewer_products_where_eigenvalues_decay() -> None:
    op = operator(MATRICES["decay"])
    products = {m: trace(op, method=m, rtol=0.02).products for m in ("hutchinson", "hutch++", "xtrace")}  # type: ignore[arg-type]
    assert max(products["hutch++"], products["xtrace"]) < 0.5 * products["hutchinson"]


@pytest.mark.parametrize("method", ["exact", "xtrace", "hutch++"])
def test_low_rank_is_exact(method: str) -> None:
    B = normal(50, 5, seed=1)
    found = trace(operator(B @ B.T), method=method)  # type: ignore[arg-type]
    assert found.value == pytest.approx(float(B.square().sum()), rel=1e-9)


def test_a_diagonal_matrix_has_no_scatter() -> None:
    found = trace(operator(torch.arange(100.0).diag()))
    assert (found.value, found.stderr, found.converged) == (4950, 0, True)


@pytest.mark.parametrize("method", ["auto", "hutchinson", "hutch++", "xtrace", "exact"])
@pytest.mark.parametrize("size", [1, 2, 30])
def test_zero_and_tiny(size: int, method: str) -> None:
    assert trace(operator(torch.zeros(size, size)), method=method).value == 0  # type: ignore[arg-type]
    one = trace(operator(torch.eye(size)), method=method)  # type: ignore[arg-type]
    assert one.value == pytest.approx(size, abs=4 * one.stderr + 1e-5)
    assert frobenius_norm(operator(torch.eye(size))).value == pytest.approx(size**0.5)


def test_a_trace_of_zero_ends_and_says_so() -> None:
    A = MATRICES["flat"] - torch.eye(SIZE) * MATRICES["flat"].trace() / SIZE
    lost = trace(operator(A), max_products=60)
    assert not lost.converged and lost.products == 60
    assert trace(operator(A), atol=3.0).converged


@pytest.mark.parametrize("most", [1, 2, 5, 17])
@pytest.mark.parametrize("method", ["auto", "hutchinson", "hutch++", "xtrace"])
def test_a_small_budget_is_kept(method: str, most: int) -> None:
    found = trace(operator(MATRICES["outliers"]), rtol=1e-4, method=method, max_products=most)  # type: ignore[arg-type]
    assert found.products <= most and not found.converged
    assert trace(NearGram(J, E), rtol=1e-4, max_products=most).products <= most + 1e-9


def test_the_convention_is_carried() -> None:
    op = operator(torch.eye(3))
    op.convention = "mean over tokens"
    assert trace(op).convention == "mean over tokens"


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"rtol": 0.0}, "rtol"),
        ({"rtol": -1.0}, "rtol"),
        ({"rtol": math.nan}, "rtol"),
        ({"method": "best"}, "method"),
        ({"method": "samples"}, "trace samples"),
        ({"method": "control"}, "control"),
        ({"method": "exact", "max_products": 10}, "max_products"),
    ],
)
def test_bad_arguments(kwargs: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        trace(operator(MATRICES["flat"]), **kwargs)


def test_bad_generators_and_products() -> None:
    with pytest.raises(TypeError, match="generator|Generator"):
        trace(operator(MATRICES["flat"]), generator="seed")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in second"):
        trace(Poisoned())
