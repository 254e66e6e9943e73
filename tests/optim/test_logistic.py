"""Gradient descent for logistic regression against autograd, and its limits against perceptrons and Novikoff's bound."""

from __future__ import annotations

import math

import pytest
import torch

from towtank.optim.logistic import logistic_step, perceptron_step, separate


def data(n=60, dim=4, margin=0.2, seed=0):
    """Examples within the unit ball that the unit vector u separates by a margin: (inputs, labels, u)."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.nn.functional.normalize(torch.randn(dim, generator=generator, dtype=torch.float64), dim=0)
    x = torch.randn(20 * n, dim, generator=generator, dtype=torch.float64)
    x = x / x.norm(dim=1, keepdim=True) * torch.rand(20 * n, 1, generator=generator, dtype=torch.float64)
    x = x[(x @ u).abs() > margin][:n]
    assert len(x) == n
    return x, torch.sign(x @ u), u


@pytest.mark.parametrize("normalized", [True, False])
def test_a_step_is_gradient_descent_over_the_mean_weight(normalized: bool) -> None:
    x, y, _ = data()
    theta = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64, requires_grad=True)
    loss = torch.log1p(torch.exp(-y * (x @ theta))).mean()
    (grad,) = torch.autograd.grad(loss, theta)
    mean_weight = (1 / (1 + torch.exp(y * (x @ theta.detach())))).mean() if normalized else 1.0
    expected = theta.detach() - 0.7 * grad / mean_weight
    got = logistic_step(theta.detach(), x, y, 0.7, normalized=normalized)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("normalized", [True, False])
def test_large_steps_are_those_of_a_perceptron(normalized: bool) -> None:
    """theta = lr phi: the weights are within exp(-lr |margin|) of 0 and 1, so one step of phi within n times that."""
    x, y, _ = data()
    phi = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64)
    margins = y * (x @ phi)
    assert 0 < int((margins < 0).sum()) < len(y)
    limit = perceptron_step(phi, x, y, normalized=normalized)
    wrong = (y[:, None] * x)[margins < 0]
    by_hand = phi + (wrong.mean(0) if normalized else wrong.sum(0) / len(y))
    torch.testing.assert_close(limit, by_hand, rtol=1e-14, atol=1e-14)
    for lr in (10, 100, 1000, 10_000):
        apart = float((logistic_step(lr * phi, x, y, lr, normalized=normalized) / lr - limit).norm())
        bound = 2 * len(y) * math.exp(-lr * float(margins.abs().min()))
        assert apart <= bound + 1e-14
        assert apart > 1e-6 or lr > 10
    assert bound < 1e-14


@pytest.mark.parametrize("normalized", [True, False])
def test_trajectories_from_zero_follow_the_perceptrons_whose_boundary_counts_half(normalized: bool) -> None:
    x, y, _ = data(seed=1)
    lr, theta, phi = 1e7, torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for _ in range(20):
        if int((y * (x @ phi) <= 0).sum()) == 0:
            break
        phi = perceptron_step(phi, x, y, normalized=normalized)
        theta = logistic_step(theta, x, y, lr, normalized=normalized)
        torch.testing.assert_close(theta / lr, phi, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lr", [1e6, math.inf])
def test_normalized_steps_separate_within_novikoffs_bound(lr: float, seed: int) -> None:
    x, y, u = data(seed=seed)
    bound = float(x.norm(dim=1).max() / (y * (x @ u)).min()) ** 2
    found = separate(x, y, lr=lr)
    assert found.separated and 0 < found.steps <= bound
    assert bool((y * (x @ found.theta) > 0).all()) and found.errors[-1] == 0


def test_plain_steps_pay_for_the_examples_that_are_right_already() -> None:
    """399 examples at (1, 0) and one at (-1, 0.2): R^2 = 1.04, and the best margin is that of u ~ (0.2, 2)."""
    x = torch.tensor([[1.0, 0.0]] * 399 + [[-1.0, 0.2]], dtype=torch.float64)
    y = torch.ones(400, dtype=torch.float64)
    bound = 1.04 / (0.2 / math.hypot(0.2, 2)) ** 2
    assert separate(x, y).steps <= bound
    plain = separate(x, y, normalized=False, steps=10_000)
    assert plain.separated and plain.steps > bound  # the mistaken one moves theta by a 400th of itself


def test_a_separated_perceptron_stops_and_a_separated_normalized_step_goes_to_the_least_margin() -> None:
    x = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    y = torch.ones(2, dtype=torch.float64)
    phi = torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert torch.equal(perceptron_step(phi, x, y), phi)
    torch.testing.assert_close(logistic_step(1e4 * phi, x, y, 1e4) / 1e4, phi + x[1])  # weights exp(-1e4), no 0 / 0


def test_bad_input_is_refused() -> None:
    x, y = torch.ones(3, 2), torch.tensor([1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match="2 \\* labels - 1"):
        logistic_step(torch.zeros(2), x, y, 1.0)
    with pytest.raises(ValueError, match="perceptron_step"):
        logistic_step(torch.zeros(2), x, torch.ones(3), math.inf)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        perceptron_step(torch.zeros(3), x, torch.ones(3))
    for lr in (-1.0, math.nan):
        with pytest.raises(ValueError, match="finite number >= 0"):
            separate(x, torch.ones(3), lr=lr)
    assert not separate(x, torch.tensor([1.0, -1.0, 1.0]), steps=7).separated
