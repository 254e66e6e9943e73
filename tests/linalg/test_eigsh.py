"""Eigenpairs against dense float64 decompositions."""

from __future__ import annotations

import pytest
import torch

from tests.linalg.cases import MATRICES, Poisoned, assert_equal_bits, operator
from tests.worlds import aligned_deep_linear, matrix, normal, spiked_wigner
from towtank.linalg.eigsh import eigsh
from towtank.linalg.operator import LinearOperator

MIXED = torch.cat([torch.tensor([20.0, 19.9, 12, -3.0, -2.9, 4], dtype=torch.float64), 0.5 * normal(194, seed=3)])


def wanted(values: torch.Tensor, which: str, k: int) -> torch.Tensor:
    up = values.sort().values
    if which == "LM":
        return values[values.abs().argsort(descending=True)][:k]
    return {"LA": up.flip(0)[:k], "SA": up[:k], "BE": torch.cat([up.flip(0)[:k], up[:k]])}[which]


@pytest.mark.parametrize("block", [1, 2])
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_are_those_of_the_dense_matrix_within_their_bounds(dtype: torch.dtype, which: str, block: int) -> None:
    A = matrix(MIXED)
    pairs = eigsh(operator(A, dtype), 3, which=which, block=block, tol=1e-4)  # type: ignore[arg-type]
    assert pairs.converged
    assert bool(((pairs.values - wanted(MIXED, which, 3)).abs() <= pairs.residuals).all())
    true = torch.linalg.vector_norm(A @ pairs.vectors.double() - pairs.vectors.double() * pairs.values, dim=0)
    assert bool((true <= 1.01 * pairs.residuals).all())
    assert pairs.vectors.dtype == dtype


def test_both_ends_come_from_one_basis() -> None:
    pairs = eigsh(operator(matrix(MIXED)), tol=1e-9)
    for end, bound, truth in zip(pairs.ends, pairs.end_residuals, (MIXED.min(), MIXED.max())):
        assert abs(end - truth) <= bound + 0.1  # the two lowest are 0.1 apart: the bound may be of the other
    restarted = eigsh(operator(matrix(MIXED)), which="SA", tol=1e-8, max_basis=8)
    assert restarted.ends[1] == pytest.approx(20, rel=1e-2)


def test_the_bound_holds_whenever_it_stops() -> None:
    """Pitfall 11: near-degenerate values; whichever of them a Ritz value approaches, it is as near as the bound says."""
    values = torch.cat([torch.tensor([10.0, 9.9, 9.8, 9.7], dtype=torch.float64), normal(96, seed=1)])
    op = operator(matrix(values), torch.float32)
    for seed in range(50):
        pair = eigsh(op, tol=3e-2, generator=seed)
        assert pair.converged and pair.residuals[0] <= 3e-2 * pair.values[0] + 1e-3
        assert float((values - pair.values[0]).abs().min()) <= pair.residuals[0]


def test_few_products_for_a_separated_eigenvalue() -> None:
    """The residual rule stops within a few steps of need, where a filled basis of twenty would be the least."""
    assert eigsh(operator(MATRICES["outliers"]), tol=1e-3).products <= 12


def test_blocks_show_multiplicity_and_single_vectors_do_not() -> None:
    A = matrix(torch.cat([torch.tensor([5.0, 5, 5, 3], dtype=torch.float64), torch.linspace(-1, 1, 40).double()]))
    assert eigsh(operator(A), 4, block=3, tol=1e-8).values == pytest.approx([5, 5, 5, 3])
    assert eigsh(operator(A), 2, tol=1e-8).values == pytest.approx([5, 3])


def test_restarts_bound_the_memory() -> None:
    values = torch.linspace(0, 1, 400).double() ** 2
    pairs = eigsh(operator(matrix(values)), 2, tol=1e-6, max_basis=12, max_products=2000, keep_state=True)
    assert pairs.converged and pairs.state is not None and pairs.state["Q"].shape[0] <= 13
    assert pairs.products > 24
    assert bool(((pairs.values - values.flip(0)[:2]).abs() <= pairs.residuals).all())


@pytest.mark.parametrize("seed", range(3))
def test_the_outlier_of_a_spiked_wigner_matrix(seed: int) -> None:
    """Fluctuations of the outlier are of order sqrt(2 (1 - 1/theta^2) / size) = 0.04: four of them."""
    A, outlier, overlap = spiked_wigner(1000, 3.0, seed=seed)
    pair = eigsh(operator(A), tol=1e-4)
    assert pair.values[0] == pytest.approx(outlier, abs=0.17)
    u = torch.nn.functional.normalize(normal(1000, seed=seed + 1), dim=0)
    assert float(u @ pair.vectors[:, 0]) ** 2 == pytest.approx(overlap, abs=0.05)


def test_a_deep_linear_network() -> None:
    world, by_hand = aligned_deep_linear(torch.tensor([[1.5, 1.0, 0.5], [1.2, 0.8, 0.6], [1.1, 0.9, 0.3]]))
    assert eigsh(operator(world.hessian), 3, tol=1e-10).values == pytest.approx(by_hand.flip(0)[:3])


@pytest.mark.parametrize(
    ("A", "k", "values"),
    [
        (torch.full((1, 1), -2.0), 1, [-2]),
        (torch.zeros(5, 5), 2, [0, 0]),
        (torch.eye(6), 6, [1] * 6),
        (torch.diag(torch.tensor([1.0, 2, 2, 3])), 4, [3, 2, 2, 1]),
        (torch.ones(40, 40), 2, [40, 0]),
    ],
)
def test_small_zero_and_invariant(A: torch.Tensor, k: int, values: list[float]) -> None:
    pairs = eigsh(operator(A), k)
    assert pairs.converged and pairs.values == pytest.approx(values, abs=1e-12 * 40)


def test_resumed_is_uninterrupted() -> None:
    op = operator(matrix(MIXED), torch.float32)
    whole = eigsh(op, 4, tol=1e-5, max_basis=12, generator=5)
    parts, state = 0, None
    while True:
        pairs = eigsh(op, 4, tol=1e-5, max_basis=12, generator=5, max_products=7, state=state, keep_state=True)
        state, parts = pairs.state, parts + 1
        if pairs.converged:
            break
    assert parts > 1
    assert_equal_bits(pairs.values, whole.values)
    assert_equal_bits(pairs.vectors, whole.vectors)


def test_seeds_and_the_global_generator() -> None:
    op, before = operator(matrix(MIXED)), torch.get_rng_state()
    assert_equal_bits(eigsh(op, generator=3).vectors, eigsh(op, generator=torch.Generator().manual_seed(3)).vectors)
    assert_equal_bits(torch.get_rng_state(), before)


def test_what_did_not_converge_says_so() -> None:
    pairs = eigsh(operator(matrix(torch.linspace(0, 1, 100))), tol=1e-8, max_products=5)
    assert not pairs.converged and pairs.products == 5 and "not converged" in str(pairs)


def test_an_absolute_tolerance_for_values_near_zero() -> None:
    op = operator(matrix(torch.cat([torch.linspace(0, 1, 50), torch.tensor([30.0])])))
    assert not eigsh(op, which="SA", max_products=25).converged
    assert eigsh(op, which="SA", atol=0.03, max_products=25).converged


def test_a_product_that_is_not_finite_names_the_block() -> None:
    with pytest.raises(ValueError, match=r"product 3 of Poisoned, in second"):
        eigsh(Poisoned(), 5)


@pytest.mark.parametrize("tol", [0.05, 1e-3])
@pytest.mark.parametrize("place", [0, 100, -3])
def test_a_start_at_another_eigenvector_still_finds_the_largest(place: int, tol: float) -> None:
    """The eigenvectors of -3, -0.07 and 12; which of 20 and 19.9 a single vector finds first is chance, as without a start."""
    A = matrix(MIXED)
    wrong = torch.linalg.eigh(A).eigenvectors[:, place]
    for seed in range(20):
        pair = eigsh(operator(A), tol=tol, start=wrong, generator=seed)
        assert pair.converged and pair.values[0] == pytest.approx(20, rel=max(tol, 0.006))


@pytest.mark.parametrize("bulk", [0.3, 0.1, 0.005])
def test_a_start_at_an_outlier_that_was_overtaken(bulk: float) -> None:
    """4000 values between -bulk and bulk and outliers at 1.2, 1, 0.5, 0.3: the start at 1 has no part of the one at 1.2."""
    values = bulk * normal(4000, seed=1).clamp(-3, 3) / 3
    values[:4] = torch.tensor([1.2, 1.0, 0.5, 0.3])
    second = torch.zeros(4000, dtype=torch.float64)
    second[1] = 1.0
    for seed in range(10):
        pair = eigsh(Diagonal(values), tol=0.05, start=second, generator=seed)
        assert pair.values[0] == pytest.approx(1.2, rel=0.05)


def test_a_start_in_an_invariant_space_without_the_largest() -> None:
    """12, 4 and 0 to -3: ten products of a start among these see nothing else, so it is the random half that finds 20."""
    A = matrix(MIXED)
    start = torch.linalg.eigh(A).eigenvectors[:, [0, 1, 2, 30, 60, 90, -5, -4, -3]].sum(dim=1)
    for seed in range(20):
        assert eigsh(operator(A), tol=0.05, start=start, generator=seed).values[0] == pytest.approx(20, rel=0.05)


class Diagonal(LinearOperator):
    def __init__(self, values: torch.Tensor) -> None:
        super().__init__(len(values), dtype=torch.float64, device=torch.device("cpu"))
        self.values = values

    def _matmat(self, X: torch.Tensor) -> torch.Tensor:
        return self.values[:, None] * X


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_starts_near_the_eigenvectors(dtype: torch.dtype, which: str) -> None:
    A = matrix(MIXED)
    cold = eigsh(operator(A, dtype), 2, which=which, tol=1e-4)  # type: ignore[arg-type]
    near = cold.vectors + 1e-3 * normal(*cold.vectors.shape, seed=9).to(dtype)
    warm = eigsh(operator(A, dtype), 2, which=which, tol=1e-4, start=near, generator=1)  # type: ignore[arg-type]
    assert warm.converged
    assert bool(((warm.values - wanted(MIXED, which, 2)).abs() <= warm.residuals).all())


def test_a_start_near_the_eigenvector_saves_products() -> None:
    op = operator(matrix(torch.cat([torch.tensor([3.0, 2.5], dtype=torch.float64), 0.5 * normal(300, seed=1)])))
    cold = [eigsh(op, tol=1e-4, generator=seed) for seed in range(10)]
    warm = [eigsh(op, tol=1e-4, generator=seed, start=cold[0].vectors) for seed in range(10)]
    assert max(w.products for w in warm) < min(c.products for c in cold)
    assert all(w.values[0] == pytest.approx(3.0, abs=3e-4) for w in warm)


@pytest.mark.parametrize(
    ("A", "values"), [(torch.full((1, 1), -2.0), [-2]), (torch.zeros(5, 5), [0]), (torch.eye(6), [1])]
)
def test_a_start_in_small_and_invariant_spaces(A: torch.Tensor, values: list[float]) -> None:
    pairs = eigsh(operator(A), start=torch.eye(len(A))[0])
    assert pairs.converged and pairs.values == pytest.approx(values, abs=1e-11)


def test_a_start_is_read_only_and_repeats() -> None:
    op, start = operator(matrix(MIXED), torch.float32), normal(200, seed=2)
    kept = start.clone()
    assert eigsh(op, start=start).values == pytest.approx(eigsh(op, start=7 * start).values)
    assert_equal_bits(eigsh(op, start=start, generator=3).vectors, eigsh(op, start=start, generator=3).vectors)
    assert_equal_bits(start, kept)


@pytest.mark.parametrize(
    ("start", "match"),
    [
        (torch.zeros(200), "not zero"),
        (torch.full((200,), torch.nan), "finite"),
        (torch.ones(199), "shape"),
        (torch.ones(200, 0), "shape"),
        (torch.ones(1, 200, 1), "shape"),
    ],
)
def test_bad_starts(start: torch.Tensor, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        eigsh(operator(matrix(MIXED)), start=start)


def test_a_start_or_a_state() -> None:
    op = operator(matrix(MIXED))
    state = eigsh(op, keep_state=True, max_products=3).state
    with pytest.raises(ValueError, match="both"):
        eigsh(op, state=state, start=torch.ones(200))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"k": 0}, "k from 1"),
        ({"k": 61}, "k from 1"),
        ({"which": "XX"}, "which"),
        ({"block": 0}, "block"),
        ({"max_basis": 2}, "max_basis"),
        ({"max_products": 0}, "max_products"),
    ],
)
def test_bad_arguments(kwargs: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        eigsh(operator(MATRICES["flat"]), **kwargs)


def test_needs_a_symmetric_operator() -> None:
    with pytest.raises(TypeError, match="symmetric"):
        eigsh(LinearOperator.from_matrix(torch.tensor([[1.0, 2.0], [0.0, 1.0]])))
    with pytest.raises(TypeError, match="from_matrix"):
        eigsh(torch.eye(3))  # type: ignore[arg-type]
