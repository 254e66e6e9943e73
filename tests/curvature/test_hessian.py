"""Products with the Hessian against finite differences in float64 that know nothing of the package."""

from __future__ import annotations

import pytest
import torch

from tests.curvature.cases import BY_NAME, CASES, Case
from tests.curvature.reference import doubled, in_float64, product
from tests.state import fingerprint
from towtank.curvature.hessian import Hessian
from towtank.problem import Problem


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


def directions(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(size, count, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_products_of_every_layer(case: Case):
    model, loss, batch = case.make()
    before = fingerprint(model)
    problem = Problem(model, loss, batch, **case.options)
    V = directions(problem.size)
    wanted = torch.stack([product(case, v) for v in V.T], dim=1)
    H = Hessian(problem)
    assert relative(H @ V, wanted) < 1e-5  # the gate in float32
    assert relative(H @ V[:, 0], wanted[:, 0]) < 1e-5
    assert H.checked is not None and H.checked.agrees and H.checked.decided
    assert fingerprint(model) == before

    wide = in_float64(model)
    H = Hessian(Problem(wide, loss, doubled(batch), **case.options), retain=False, check=False)
    assert relative(H @ V.double(), wanted) < 1e-10  # the gate in float64


def test_restriction_is_the_block_of_the_matrix():
    model, loss, batch = BY_NAME["layernorm"].make()
    H = Hessian(Problem(model, loss, batch))
    names = ["1.bias", "0.weight"]
    part = H.restrict(names)
    assert isinstance(part, Hessian) and part.problem.size == 36  # its graphs leave the others out
    rows = torch.cat([torch.arange(H.shape[0])[H.slices[n]] for n in ("0.weight", "1.bias")])
    assert torch.allclose(part.dense(), H.dense()[rows][:, rows], rtol=1e-5, atol=1e-7)
    assert torch.allclose(H.restrict(rows).dense(), part.dense(), rtol=1e-5, atol=1e-7)


def test_batch_hessians_add_up():
    model, loss, (x, y) = BY_NAME["tanh"].make()
    problem = Problem(model, loss, [(x[:2], y[:2]), (x[2:], y[2:])])
    first, second = (Hessian(problem.batch(i)).dense() for i in range(2))
    whole = Hessian(problem).dense()
    assert torch.allclose(whole, first / 3 + 2 * second / 3, rtol=1e-5, atol=1e-7)
    assert torch.allclose(whole, Hessian(Problem(model, loss, (x, y))).dense(), rtol=1e-5, atol=1e-7)
    assert torch.allclose(whole, whole.T, rtol=1e-5, atol=1e-7)


def test_dropout_with_fixed_masks_is_symmetric():
    model, loss, batch = BY_NAME["dropout_off"].make()
    for retain in (True, False):
        H = Hessian(Problem(model, loss, batch, dropout=True), retain=retain)
        A = H.dense()
        assert torch.allclose(A, A.T, rtol=1e-5, atol=1e-7) and torch.equal(A, H.dense())


def test_padding_rows_are_held_fixed():
    model, loss, batch = BY_NAME["embedding"].make()
    row = int(batch[0][0, 0])
    padded = torch.nn.Sequential(torch.nn.Embedding(11, 4, padding_idx=row), *list(model)[1:])
    padded[0].weight = model[0].weight
    free, fixed = (Hessian(Problem(m, loss, batch)).dense() for m in (model, padded))
    keep = torch.ones(len(free))
    keep[4 * row : 4 * row + 4] = 0
    assert free[keep == 0].abs().max() > 1e-3
    assert torch.allclose(fixed, keep[:, None] * free * keep, rtol=1e-5, atol=1e-7)


def test_finite_differences():
    for name in ("tanh", "layernorm", "gpt2"):
        case = BY_NAME[name]
        model, loss, batch = case.make()
        problem = Problem(model, loss, batch)
        (v,) = directions(problem.size, 1).T
        wanted = product(case, v)
        for scale in (1.0, 1e3, 1e-3):  # a step that is not scaled to |v| fails here (pitfall 14)
            H = Hessian(problem, method="finite_difference")
            assert H.noise is None
            # step h = eps^(1/3) of |theta|: rounding eps / h and curvature h^2, both 2e-5, times the odds of the network
            assert relative(H @ (scale * v), scale * wanted) < 5e-3
            assert 1e-7 < H.noise < 5e-3
        wide = Hessian(problem.replace(precision=torch.float64), method="finite_difference")
        assert relative(wide @ v, wanted) < 1e-7
        assert "finite differences" in wide.convention
    assert torch.equal(H @ torch.zeros_like(v), torch.zeros_like(v))
    with pytest.raises(ValueError, match="method"):
        Hessian(problem, method="guess")
