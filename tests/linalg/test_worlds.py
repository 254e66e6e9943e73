"""The closed-form worlds against automatic differentiation and dense decompositions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.worlds import (
    World,
    aligned_deep_linear,
    linear_regression,
    logistic_regression,
    quadratic_bowl,
    spiked_wigner,
    spiked_wishart,
    two_layer_linear,
)

DEPTH = torch.tensor([[1.5, 1.0], [1.2, 0.8], [0.7, 0.9]])
WORLDS = {
    "regression": linear_regression(),
    "logistic": logistic_regression(),
    "bowl": quadratic_bowl(torch.tensor([3.0, 1.0, -2.0, 0.0])),
    "two layers": two_layer_linear(),
    "narrow": two_layer_linear(6, 2, 5),
    "deep": aligned_deep_linear(DEPTH)[0],
}


@pytest.mark.parametrize("name", WORLDS)
def test_hessians(name: str) -> None:
    world = WORLDS[name]
    assert torch.allclose(dense(world), world.hessian, atol=1e-12)
    assert torch.allclose(torch.linalg.eigvalsh(world.hessian), world.eigenvalues, atol=1e-12)
    if world.fisher_trace is not None:
        assert world.hessian.trace().item() == pytest.approx(world.fisher_trace)


def test_the_deep_network_by_hand() -> None:
    world, by_hand = aligned_deep_linear(DEPTH)
    assert torch.allclose(world.eigenvalues, by_hand, atol=1e-12)


@pytest.mark.parametrize("theta", [0.5, 2.0])
def test_wigner(theta: float) -> None:
    A, outlier, _ = spiked_wigner(600, theta)
    assert torch.linalg.eigvalsh(A)[-1].item() == pytest.approx(outlier, abs=0.2)  # four times size^-1/2, rounded up


@pytest.mark.parametrize("spike", [1.2, 4.0])
def test_wishart(spike: float) -> None:
    S, outlier, (low, high) = spiked_wishart(1200, 300, spike)
    values = torch.linalg.eigvalsh(S)
    assert values[-1].item() == pytest.approx(outlier, abs=4 * (2 / 1200) ** 0.5 * spike)
    assert values[0].item() == pytest.approx(low, abs=0.08) and values[-2].item() == pytest.approx(high, abs=0.1)


def dense(world: World) -> Tensor:
    names, shapes = zip(*((n, p.shape) for n, p in world.model.named_parameters()))
    sizes = [s.numel() for s in shapes]

    def loss(flat: Tensor) -> Tensor:
        parts = {n: x.view(s) for n, x, s in zip(names, flat.split(sizes), shapes)}
        return world.loss(torch.func.functional_call(world.model, parts, world.data[0]), world.data[1])

    flat = torch.cat([p.detach().flatten() for p in world.model.parameters()])
    H = torch.autograd.functional.hessian(loss, flat)
    assert isinstance(H, Tensor)
    return H
