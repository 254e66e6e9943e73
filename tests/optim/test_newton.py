"""Gradient-regularized Newton against the published algorithm with dense Cholesky factors, and where it must stop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from towtank.curvature import GaussNewton, Hessian
from towtank.linalg import LinearOperator
from towtank.optim.newton import newton
from towtank.problem import Problem

N, P = 40, 5


def logistic():
    """Mean logistic loss with a little decay, not separable: (f, gradient, Hessian) in numpy."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(N, P)), rng.choice([-1.0, 1.0], size=N)

    def f(w):
        return np.logaddexp(0, -y * (x @ w)).mean() + 0.01 * w @ w

    def g(w):
        return -(x * (y / (1 + np.exp(y * (x @ w))))[:, None]).mean(0) + 0.02 * w

    def h(w):
        s = 1 / (1 + np.exp(-x @ w))
        return (x * (s * (1 - s))[:, None]).T @ x / N + 0.02 * np.eye(P)

    return f, g, h, np.full(P, 2.0)


def rosenbrock():
    """Not convex: the Hessian at the start is indefinite, and at the minimum f = 0."""

    def f(w):
        return 100 * (w[1] - w[0] ** 2) ** 2 + (1 - w[0]) ** 2

    def g(w):
        return np.array([-400 * w[0] * (w[1] - w[0] ** 2) - 2 * (1 - w[0]), 200 * (w[1] - w[0] ** 2)])

    def h(w):
        return np.array([[1200 * w[0] ** 2 - 400 * w[1] + 2, -400 * w[0]], [-400 * w[0], 200.0]])

    return f, g, h, np.array([0.1, 1.5])


def published(problem, steps, gamma=1.0, metric=None):
    """Semenov et al. 2025, algorithm 1, with the adaptive search of gamma; a matrix without Cholesky factor halves it."""
    f, g, h, w = problem
    b = np.ones(len(w)) if metric is None else metric
    for _ in range(steps):
        while True:
            shift = np.sqrt((g(w) ** 2 / b).sum()) / gamma
            try:
                np.linalg.cholesky(h(w) + shift * np.diag(b))
            except np.linalg.LinAlgError:
                gamma /= 2
                continue
            new = w + np.linalg.solve(h(w) + shift * np.diag(b), -g(w))
            if f(w) - f(new) >= (g(new) ** 2 / b).sum() / (8 * shift):
                break
            gamma /= 2
        w, gamma = new, 2 * gamma
    return w, gamma


def ours(problem, **options):
    f, g, h, w = problem

    def loss(x):
        return torch.tensor(f(x.numpy())), torch.from_numpy(g(x.numpy()))

    return newton(loss, lambda x: torch.from_numpy(h(x.numpy())), torch.from_numpy(w), **options)


@pytest.mark.parametrize("metric", [False, True])
@pytest.mark.parametrize("problem", [logistic, rosenbrock])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_steps_are_those_of_the_published_algorithm(problem, steps: int, metric: bool) -> None:
    """Systems are solved to a relative residual of 1e-12; the condition of the shifted matrices is below 1e3."""
    b = np.linspace(0.5, 2, len(problem()[-1])) if metric else None
    w, gamma = published(problem(), steps, metric=b)
    got = ours(problem(), steps=steps, solve_tol=1e-12, metric=None if b is None else torch.from_numpy(b))
    torch.testing.assert_close(got.point, torch.from_numpy(w), rtol=1e-8, atol=1e-8)
    assert got.gamma == gamma and got.steps == steps and got.status == "steps"


@pytest.mark.parametrize("problem", [logistic, rosenbrock])
def test_it_converges_to_the_minimum_and_never_ascends(problem) -> None:
    f, g, h, w = problem()
    found = ours(problem(), tol=1e-12)
    assert found.status == "converged" and found.gradient_norm <= 1e-12
    assert np.linalg.norm(g(found.point.numpy())) <= 1e-12
    assert all(a >= b for a, b in zip(found.losses, found.losses[1:]))
    assert found.solves >= found.steps and found.products >= found.solves
    if problem is rosenbrock:
        torch.testing.assert_close(found.point, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("tol", [0.0, 1e-20])
def test_it_stops_at_rounding_without_losing_the_radius(tol: float) -> None:
    """The published test asks a decrease that f cannot show; without a stop gamma falls below 1e-40."""
    found = ours(logistic(), tol=tol, steps=1000)
    assert found.status in ("rounding", "converged")
    assert found.gradient_norm < 1e-14 and found.gamma > 1e-3 and found.solves < 60


def test_a_gradient_of_another_function_stalls_where_it_stands() -> None:
    """Steps uphill pass no test: the radius is halved down to the precision of x, or for `tries`, and x stays."""
    f, g, h, w = logistic()
    for tries in (40, 1000):
        found = ours((f, lambda w: -g(w), h, w), tries=tries)
        assert found.status == "stalled" and found.steps == 0
        assert found.solves <= min(tries, 60)  # 2^-53 of |x| from 1
        assert np.array_equal(found.point.numpy(), w)


def test_an_operator_known_by_products_serves_as_well_as_a_matrix() -> None:
    f, g, h, w = logistic()
    wrapped = newton(
        lambda x: (torch.tensor(f(x.numpy())), torch.from_numpy(g(x.numpy()))),
        lambda x: LinearOperator.from_matrix(torch.from_numpy(h(x.numpy()))),
        torch.from_numpy(w),
        steps=4,
    )
    torch.testing.assert_close(wrapped.point, ours(logistic(), steps=4).point, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_curvature_operators_train_a_network(kind) -> None:
    """Tanh network on three classes: the Hessian is indefinite on the way, Gauss-Newton is not the Hessian."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = draw(30, 3), torch.randint(3, (30,), generator=generator)
    start = draw(sum(p.numel() for p in model.parameters()))
    problem = Problem(model, nn.functional.cross_entropy, [(x, y)])

    def loss(point):
        nn.utils.vector_to_parameters(point, model.parameters())
        model.zero_grad()
        value = nn.functional.cross_entropy(model(x), y) + 1e-3 * sum((p**2).sum() for p in model.parameters())
        grads = torch.autograd.grad(value, list(model.parameters()))
        return value.detach(), torch.cat([g.flatten() for g in grads])

    # an operator follows the parameters of its model
    operator = kind(problem) + 2e-3 * LinearOperator.from_matrix(torch.eye(len(start), dtype=torch.float64))

    def matrix(point):
        nn.utils.vector_to_parameters(point, model.parameters())
        return operator

    found = newton(loss, matrix, start, tol=1e-2, steps=40, solve_tol=1e-2)
    assert found.status == "converged" and found.losses[-1] < found.losses[0] / 2
    assert float(loss(found.point)[1].norm()) <= 1e-2


def test_float32_stops_too() -> None:
    A = torch.diag(torch.tensor([1.0, 100.0]))
    found = newton(lambda x: (1 + x @ A @ x / 2, A @ x), lambda x: A, torch.ones(2), tol=0.0, solve_tol=1e-5)
    assert found.status in ("rounding", "converged") and found.point.abs().max() < 1e-3


def test_bad_input_is_refused() -> None:
    one = torch.ones(2)
    loss = lambda x: (x @ x / 2, x)  # noqa: E731
    for options in ({"gamma": 0.0}, {"tol": -1.0}, {"tries": 0}, {"solve_tol": 1.0}, {"gamma": float("nan")}):
        with pytest.raises(ValueError, match="expected gamma > 0"):
            newton(loss, lambda x: torch.eye(2), one, **options)
    for metric in (torch.tensor([1.0, 0.0]), torch.ones(3)):
        with pytest.raises(ValueError, match="positive metric of shape"):
            newton(loss, lambda x: torch.eye(2), one, metric=metric)
    with pytest.raises(ValueError, match="at the start; expected finite"):
        newton(loss, lambda x: torch.eye(2), torch.tensor([torch.nan, 1.0]))
    assert newton(loss, lambda x: torch.eye(2), torch.zeros(2)).status == "converged"
    assert newton(loss, lambda x: torch.eye(2), one, steps=0).losses == (1.0,)
