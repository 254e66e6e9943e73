"""Quadrature rules against dense spectra."""

from __future__ import annotations

import math

import pytest
import torch

from tests.linalg.cases import MATRICES, assert_equal_bits, assert_honest, operator, spectra
from tests.worlds import matrix, normal, spiked_wishart
from towtank.linalg.density import spectral_density
from towtank.linalg.lanczos import Krylov
from towtank.linalg.logdet import logdet

OUTLIERS = torch.cat([torch.tensor([40.0, 25, 18, 12, 9, 7, 5, 4]), 0.1 * normal(392, seed=1).float()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_ghosts(dtype: torch.dtype) -> None:
    """Pitfalls 11, 12: far outliers converge at once and would return as copies, as they do without orthogonalization."""
    op = operator(matrix(OUTLIERS), dtype)
    rule = spectral_density(op, steps=80, probes=3)
    assert (rule.nodes > 3).sum(dim=1).tolist() == [8, 8, 8]
    assert torch.allclose(rule.weights.sum(dim=1), torch.ones(3, dtype=torch.float64), atol=1e-12)
    top = rule.nodes[:, -8:] - OUTLIERS[:8].sort().values
    assert float(top.abs().max()) <= 8 * torch.finfo(dtype).eps * 40 + 4e-6  # the matrix is made of float32 values
    lax = Krylov(lambda X: op @ X, normal(1, 400, seed=2).to(dtype), capacity=80, slack=1e9)
    while lax.done < 80:
        lax.expand()
    assert (torch.linalg.eigvalsh(lax.projected()) > 3).sum() > 8


def test_drift_stays_below_its_limit_with_fewer_passes() -> None:
    op = operator(matrix(OUTLIERS), torch.float32)
    slack = torch.finfo(torch.float32).eps ** 0.5
    krylov, passed = Krylov(lambda X: op @ X, normal(1, 400, seed=2).float(), capacity=80, slack=slack), 0
    remove = krylov._remove

    def counted(w: torch.Tensor, rows: slice) -> torch.Tensor:
        nonlocal passed
        passed += rows.stop
        return remove(w, rows)

    krylov._remove = counted  # type: ignore[method-assign]
    while krylov.done < 80:
        krylov.expand()
    Q = krylov.Q.double()
    assert float((Q @ Q.T - torch.eye(80)).abs().max()) <= slack
    assert passed < 0.75 * 80 * 81 / 2


def test_a_rule_is_exact_for_polynomials_of_its_probe() -> None:
    """A rule of m nodes has degree 2 m - 1: moments of v^T A^p v / v^T v for one probe."""
    A = MATRICES["flat"]
    rule = spectral_density(operator(A), steps=4, generator=7)
    words = torch.empty(1, 1, dtype=torch.int64).random_(-(2**63), None, generator=torch.Generator().manual_seed(7))
    bits = [(int(words) >> i) & 1 for i in range(60)]
    v = 2 * torch.tensor(bits, dtype=torch.float64) - 1
    power = v
    for order in range(8):
        assert rule.moment(order).value == pytest.approx(float(v @ power) / 60, rel=1e-9)
        power = A @ power


def test_enough_steps_give_the_whole_spectrum() -> None:
    values = spectra()["flat"]
    rule = spectral_density(operator(matrix(values)), steps=500)
    assert rule.nodes.shape == (1, 60)
    assert float((rule.nodes[0] - values.sort().values).abs().max()) < 1e-10


def test_moments_trace_quantiles_and_means() -> None:
    values = spectra()["outliers"]
    rule = spectral_density(operator(matrix(values)), steps=20, probes=12)
    for found, truth in [
        (rule.trace, float(values.sum())),
        (rule.moment(2), float(values.square().mean())),
        (rule.mean(torch.exp), float(values.exp().mean())),
        (rule.quantile(0.5), float(values.median())),
    ]:
        assert abs(found.value - truth) <= 4 * found.stderr
    assert math.isnan(spectral_density(operator(matrix(values)), steps=3).trace.stderr)


def test_smoothed_densities_integrate_to_one() -> None:
    rule = spectral_density(operator(MATRICES["flat"]), steps=30, probes=4)
    grid = torch.linspace(-10, 12, 4001).double()
    line = rule.density(grid, width=0.2)
    assert torch.trapezoid(line.density, line.axis).item() == pytest.approx(1, abs=1e-6)
    log = rule.density(torch.cat([-torch.logspace(4, -8, 2000), torch.logspace(-8, 4, 2000)]), axis="signed-log")
    assert torch.trapezoid(log.density, log.axis).item() == pytest.approx(1, abs=1e-3)
    assert line.stderr.shape == grid.shape and bool((line.stderr >= 0).all())


def test_the_bulk_and_outlier_of_a_spiked_wishart_matrix() -> None:
    """Edges fluctuate by order size^(-2/3) = 0.02, the outlier by order sqrt(2 / n) spike = 0.1: four of each."""
    S, outlier, (low, high) = spiked_wishart(1600, 400, 3.0, seed=0)
    rule = spectral_density(operator(S), steps=60)
    assert rule.nodes[0, -1].item() == pytest.approx(outlier, abs=0.4)
    assert rule.nodes[0, -2].item() == pytest.approx(high, abs=0.08)
    assert rule.nodes[0, 0].item() == pytest.approx(low, abs=0.08)


def test_a_space_that_closes_early_is_padded_with_weight_zero() -> None:
    rule = spectral_density(operator(torch.diag(torch.tensor([1.0, 1, 1, 5]).double())), steps=4)
    assert rule.nodes[0].tolist() == pytest.approx([1, 5, 5, 5]) and rule.weights[0, 2:].tolist() == [0, 0]
    assert rule.quantile(0.1).value == pytest.approx(1)
    assert spectral_density(operator(torch.zeros(3, 3))).nodes.tolist() == [[0, 0, 0]]
    assert spectral_density(operator(torch.full((1, 1), 2.0))).trace.value == 2


def test_resumed_is_uninterrupted_and_an_early_stop_is_said() -> None:
    op = operator(matrix(OUTLIERS), torch.float32)
    whole = spectral_density(op, steps=20, probes=3, generator=4)
    part = spectral_density(op, steps=20, probes=3, generator=4, max_products=33, keep_state=True)
    assert not part.converged and part.nodes.shape == (1, 20) and part.products == 33
    rest = spectral_density(op, steps=20, probes=3, max_products=33, state=part.state)
    assert rest.converged
    assert_equal_bits(rest.nodes, whole.nodes)
    assert_equal_bits(rest.weights, whole.weights)
    assert not spectral_density(op, steps=20, max_products=5).converged


def test_stated_errors_are_honest() -> None:
    op = operator(MATRICES["flat"])
    truth = float(MATRICES["flat"].trace())
    assert_honest(lambda s: spectral_density(op, steps=2, probes=4, generator=s).trace, truth)


def test_logdet_within_its_error() -> None:
    A = MATRICES["outliers"]
    truth = float(torch.logdet(A + 5 * torch.eye(60)))
    op = operator(A, semidefinite=True)  # kappa = 5: four steps leave exp(-16 / sqrt 5) = 1e-3
    assert_honest(lambda s: logdet(op, damping=5.0, rtol=0.2, steps=4, generator=s), truth, seeds=12)


def test_logdet_refuses_what_has_no_logarithm() -> None:
    with pytest.raises(ValueError, match="add damping"):
        logdet(operator(MATRICES["flat"]))
    low_rank = operator(torch.ones(30, 30).double(), semidefinite=True)
    with pytest.raises(ValueError, match="add damping"):
        logdet(low_rank)
    truth = math.log(30.5) + 29 * math.log(0.5)
    found = logdet(low_rank, damping=0.5)
    assert abs(found.value - truth) <= 4 * found.stderr + 1e-6


@pytest.mark.parametrize("kwargs", [{"steps": 0}, {"probes": 0}, {"max_products": 0}])
def test_bad_arguments(kwargs: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        spectral_density(operator(MATRICES["flat"]), **kwargs)
    with pytest.raises(ValueError, match="axis"):
        spectral_density(operator(MATRICES["flat"]), steps=2).density(torch.zeros(1), axis="log")  # type: ignore[arg-type]
