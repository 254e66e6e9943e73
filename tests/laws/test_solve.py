"""The solver against closed forms, an independent linear program and scipy."""

import numpy as np
import pytest
from scipy.optimize import linprog, minimize

from towtank.laws.solve import solve

FAR = 1e6


def huber(residual, delta):
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def line(x, y):
    design = np.stack([np.ones_like(x), x], axis=1)
    return lambda theta: (y - theta @ design.T, np.broadcast_to(-design, (len(theta), *design.shape)))


def decay(x, y):
    """y = a exp(-b x) + c, with its derivatives."""

    def model(theta):
        a, b, c = (theta[:, i, None] for i in range(3))
        e = np.exp(-b * x)
        return y - (a * e + c), -np.stack([e, -a * x * e, np.ones_like(e)], axis=-1)

    return model


def world(seed, rows=40):
    rng = np.random.default_rng(seed)
    x = np.linspace(0.1, 5, rows)
    return x, 2 * np.exp(-0.8 * x) + 0.5 + 0.02 * rng.standard_t(2, rows)


def test_least_squares_is_the_normal_equations():
    x, y = world(0)
    found = solve(line(x, y), np.zeros((1, 2)), lower=[-FAR] * 2, upper=[FAR] * 2, delta=np.inf)
    expected = np.linalg.lstsq(np.stack([np.ones_like(x), x], axis=1), y, rcond=None)[0]
    np.testing.assert_allclose(found.theta[0], expected, rtol=1e-10)


def test_a_small_corner_is_the_linear_program_of_least_absolute_deviations():
    """With corner delta the objective / delta lies within R delta / 2 of the sum of absolute deviations."""
    x, y = world(1, rows=21)
    delta, rows = 1e-7, x.size
    design = np.stack([np.ones_like(x), x], axis=1)
    cost = np.r_[np.zeros(2), np.ones(2 * rows)]  # y = design t + up - down
    program = linprog(
        cost,
        A_eq=np.hstack([design, np.eye(rows), -np.eye(rows)]),
        b_eq=y,
        bounds=[(None, None)] * 2 + [(0, None)] * 2 * rows,
    )
    found = solve(line(x, y), np.zeros((1, 2)), lower=[-FAR] * 2, upper=[FAR] * 2, delta=delta)
    assert found.converged.all()
    assert found.objective[0] / delta == pytest.approx(program.fun, abs=rows * delta / 2 + 1e-9)


@pytest.mark.parametrize("delta", [1e-3, 0.05])
def test_no_better_minimum_is_found_by_scipy(delta):
    """Weighted resamples solved together, each against BFGS from our answer and from the start."""
    x, y = world(2)
    model = decay(x, y)
    weights = np.random.default_rng(3).multinomial(x.size, np.full(x.size, 1 / x.size), size=4).astype(float)
    start = np.array([1.5, 0.5, 0.3])
    found = solve(
        model,
        np.repeat(start[None], 4, axis=0),
        weights=weights,
        lower=[1e-3, 1e-3, -9],
        upper=[99, 99, 9],
        delta=delta,
    )
    assert found.converged.all()
    for w, theta, objective in zip(weights, found.theta, found.objective, strict=True):
        at = lambda t, w=w: float(w @ huber(model(t[None])[0][0], delta))  # noqa: E731
        assert objective == pytest.approx(at(theta), rel=1e-12)
        for begin in (theta, start):
            assert objective <= minimize(at, begin, method="Nelder-Mead", options={"maxiter": 400}).fun * (1 + 1e-9)


def test_problems_solved_together_are_the_problems_solved_alone():
    x, y = world(4)
    rng = np.random.default_rng(5)
    weights = rng.exponential(size=(30, x.size))
    starts = np.array([1.5, 0.5, 0.3]) * rng.uniform(0.7, 1.3, (30, 3))
    box = {"lower": [1e-3, 1e-3, -9], "upper": [99, 99, 9]}
    together = solve(decay(x, y), starts, weights=weights, **box)
    for i in (0, 7, 29):
        alone = solve(decay(x, y), starts[i : i + 1], weights=weights[i], **box)
        assert together.objective[i] == pytest.approx(alone.objective[0], rel=1e-10)


def test_bounds_hold_and_the_rest_is_optimal_there():
    """Slope at most 1 where 2 fits best: the intercept is then the mean of y - x, for least squares."""
    x = np.linspace(0, 1, 9)
    y = 3 + 2 * x
    found = solve(line(x, y), np.zeros((1, 2)), lower=[-FAR, -FAR], upper=[FAR, 1.0], delta=np.inf)
    np.testing.assert_allclose(found.theta[0], [np.mean(y - x), 1.0], rtol=1e-10)
    held = solve(line(x, y), np.zeros((1, 2)), lower=[-FAR, 0.5], upper=[FAR, 0.5], delta=np.inf)
    np.testing.assert_allclose(held.theta[0], [np.mean(y - 0.5 * x), 0.5], rtol=1e-10)


def test_bounds_may_differ_from_problem_to_problem():
    x = np.linspace(0, 1, 9)
    y = 3 + 2 * x
    slopes = np.array([0.0, 1.0, 2.0])
    low, high = np.tile([-FAR, 0.0], (3, 1)), np.tile([FAR, 0.0], (3, 1))
    low[:, 1] = high[:, 1] = slopes
    found = solve(line(x, y), np.zeros((3, 2)), lower=low, upper=high, delta=np.inf)
    np.testing.assert_allclose(found.theta, np.stack([3 + (2 - slopes) / 2, slopes], axis=1), rtol=1e-10)


def test_a_start_that_cannot_be_evaluated_is_said():
    def model(theta):
        with np.errstate(all="ignore"):
            return np.log(theta), 1 / theta[..., None]

    found = solve(model, np.array([[-1.0], [2.0]]), lower=[-9.0], upper=[9.0], delta=np.inf)
    assert np.isinf(found.objective[0]) and not found.converged[0]
    assert found.theta[1, 0] == pytest.approx(1.0, rel=1e-9)


def test_wrong_arguments_are_refused():
    x, y = world(0)
    with pytest.raises(ValueError, match="lower <= upper"):
        solve(line(x, y), np.zeros((1, 2)), lower=[1.0, 0.0], upper=[0.0, 1.0])
    with pytest.raises(ValueError, match=r"\(problems, parameters\)"):
        solve(line(x, y), np.zeros(2), lower=[0.0], upper=[1.0])
