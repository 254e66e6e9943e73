"""Robust nonlinear regression of many problems at once: starts x bootstraps in one damped Newton iteration.

Capitals in names of arrays: M problems, R rows, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from towtank.laws.table import Floats, Ints

Model = Callable[[Floats], tuple[Floats, Floats]]
CACHE = 1 << 17  # numbers of one Jacobian: as many problems are worked on at once, to stay in the fast cache
SHRINK = 6.0  # the corner of the Huber function is sharpened by this factor from stage to stage
STAGE = 1e-1  # relative gain of the next step below which a stage that is not the last ends
EASY, LEAST, STALLED = 1e-2, 1e-9, 1e10  # damping at the start, at least, and where no step in float64 gains anything
FINER, COARSER, WORSE = 1 / 6, 3.0, 8.0  # how the damping moves after a good, a poor and a failed step


@dataclass(frozen=True, kw_only=True)
class Solution:
    """The minima found, one per start.

    Args:
        theta: parameters at the minimum, shape (M, P).
        objective: the objective there, shape (M,); infinite where the start itself could not be evaluated.
        converged: whether the next step would gain less than the tolerance, shape (M,).
        iterations: steps tried, shape (M,).
    """

    theta: Floats
    objective: Floats
    converged: NDArray[np.bool_]
    iterations: NDArray[np.int64]


def solve(
    model: Model,
    starts: Floats,
    *,
    weights: Floats | None = None,
    lower: Floats,
    upper: Floats,
    delta: float = 1e-3,
    tol: float = 1e-13,
    max_iter: int = 300,
) -> Solution:
    """Minimise sum_r w_r huber(residual_r) for many problems at once, inside a box.

        huber(u) = u^2 / 2 for |u| <= delta, else delta (|u| - delta / 2)

    Each problem takes damped Newton steps (J' W J over the rows inside the corner, damped by the matrix of reweighted least
    squares, Levenberg-Marquardt) down a ladder of sharpening corners that ends at `delta`; problems that are done leave
    the batch. Nothing is random.

    Huber 1964, "Robust estimation of a location parameter"; the ladder: Madsen and Nielsen 1993, "A finite smoothing
    algorithm for linear l1 estimation".

    Args:
        model: from parameters (m, P) to residuals (m, R) and their derivatives (m, R, P), for any m.
        starts: where each problem starts, shape (M, P); moved into the box.
        weights: weight of each row, shape (R,) or (M, R); None: 1.
        lower: least parameters, shape (P,) or (M, P); equal to `upper` where a parameter is held.
        upper: largest parameters.
        delta: corner of the Huber function, in units of the residual; `numpy.inf` is least squares.
        tol: relative gain of the next step at which a problem is done.
        max_iter: steps after which it is given up.

    Raises:
        ValueError: if the starts are no matrix, or a lower bound lies above its upper bound.

    Example:
        >>> y = np.array([1.0, 2.0, 9.0])  # the robust mean of three numbers is next to their median
        >>> found = solve(lambda t: (t - y, np.ones((len(t), 3, 1))), np.zeros((1, 1)),
        ...               lower=np.array([-99.0]), upper=np.array([99.0]))
        >>> found.theta.round(9)
        array([[2.]])
    """
    starts = np.array(starts, dtype=np.float64)
    if starts.ndim != 2 or not len(starts):
        raise ValueError(f"expected starts of shape (problems, parameters), got {starts.shape}")
    low, high = (np.broadcast_to(np.asarray(b, dtype=np.float64), starts.shape) for b in (lower, upper))
    if (low > high).any():
        raise ValueError("expected lower <= upper, got a lower bound above its upper bound")
    rows = model(starts[:1])[0].shape[1]
    weight = np.broadcast_to(
        np.ones(1) if weights is None else np.asarray(weights, dtype=np.float64), (len(starts), rows)
    )
    todo = _Problems(model, np.clip(starts, low, high), weight, low, high, delta)
    return todo.solve(max(1, CACHE // max(rows * starts.shape[1], 1)), tol, max_iter)


@dataclass
class _State:
    """Problems being worked on; all arrays have them along the first axis."""

    index: Ints
    theta: Floats
    damping: Floats
    delta: Floats
    tried: Ints
    value: Floats
    slope: Floats
    hess: Floats
    metric: Floats

    def __len__(self) -> int:
        return len(self.index)

    def keep(self, mask: NDArray[np.bool_]) -> _State:
        return self if mask.all() else _State(*(getattr(self, f.name)[mask] for f in fields(self)))

    def join(self, other: _State) -> _State:
        return _State(*(np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))


@dataclass(frozen=True)
class _Problems:
    """What does not change while problems are solved."""

    model: Model
    start: Floats
    weight: Floats
    low: Floats
    high: Floats
    delta: float

    def solve(self, size: int, tol: float, max_iter: int) -> Solution:
        """Work on `size` problems at once; one that is done makes room for the next."""
        total = len(self.start)
        theta, objective = self.start.copy(), np.full(total, np.inf)
        converged, iterations = np.zeros(total, dtype=bool), np.zeros(total, dtype=np.int64)
        state, begun = self._begin(0, min(size, total)), min(size, total)
        while len(state) or begun < total:
            if 2 * len(state) <= size and begun < total:
                end = min(begun + size - len(state), total)
                state, begun = state.join(self._begin(begun, end)), end
                continue
            gain = self._step(state)
            last = state.delta <= self.delta
            small = gain <= np.where(last, tol, STAGE) * state.value
            ready = small | (state.damping > STALLED)
            ended = (last & ready) | (state.tried >= max_iter)
            if ended.any():
                at = state.index[ended]
                theta[at], objective[at], iterations[at] = state.theta[ended], state.value[ended], state.tried[ended]
                converged[at] = (small & last)[ended]
            self._sharpen(state, ~last & ready & ~ended)
            state = state.keep(~ended)
        return Solution(theta=theta, objective=objective, converged=converged, iterations=iterations)

    def _begin(self, begin: int, end: int) -> _State:
        """Problems that can be evaluated at their start, with the corner as wide as their typical residual."""
        index, theta = np.arange(begin, end), self.start[begin:end]
        delta = np.full(len(index), self.delta)
        if np.isfinite(self.delta):
            spread = np.median(np.abs(self.model(theta)[0]), axis=1)
            delta = np.maximum(delta, np.where(np.isfinite(spread), spread, 0.0))
        local = self._local(theta, index, delta)
        damping, tried = np.full(len(index), EASY), np.zeros(len(index), dtype=np.int64)
        state = _State(index, theta, damping, delta, tried, *local)
        return state.keep(np.isfinite(state.value))

    def _step(self, state: _State) -> Floats:
        """Try one step; the gain that the quadratic model promised."""
        low, high = self.low[state.index], self.high[state.index]
        step = _newton(state.hess + state.damping[:, None, None] * state.metric, state.slope, state.theta, low, high)
        gain = -np.einsum("mp,mp->m", step, state.slope + 0.5 * np.einsum("mpq,mq->mp", state.hess, step))
        theta = np.clip(state.theta + step, low, high)
        new = self._local(theta, state.index, state.delta)
        better = new[0] < state.value
        share = np.where(better, (state.value - new[0]) / np.where(gain > 0, gain, np.inf), 0.0)
        for old, fresh in zip(
            (state.theta, state.value, state.slope, state.hess, state.metric), (theta, *new), strict=True
        ):
            old[better] = fresh[better]
        moved = np.where(share > 0.7, FINER, np.where(share < 0.25, COARSER, 1.0))
        state.damping = np.where(
            better, np.maximum(state.damping * moved, LEAST), np.maximum(state.damping, 1e-4) * WORSE
        )
        state.tried += 1
        return gain

    def _sharpen(self, state: _State, mask: NDArray[np.bool_]) -> None:
        if not mask.any():
            return
        state.delta[mask] = np.maximum(state.delta[mask] / SHRINK, self.delta)
        state.damping[mask] = np.minimum(state.damping[mask], EASY)
        new = self._local(state.theta[mask], state.index[mask], state.delta[mask])
        for old, fresh in zip((state.value, state.slope, state.hess, state.metric), new, strict=True):
            old[mask] = fresh

    def _local(self, theta: Floats, index: Ints, delta: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """Objective (infinite where it cannot be evaluated), gradient, Newton matrix and damping matrix."""
        residual, jacobian = self.model(theta)
        weight, corner = self.weight[index], delta[:, None]
        with np.errstate(invalid="ignore", over="ignore"):
            bent = np.clip(residual, -corner, corner)  # the derivative of the Huber function
            pull = weight * bent
            value = np.einsum("mr,mr->m", pull, residual - 0.5 * bent)
            slope = np.matmul(pull[:, None, :], jacobian)[:, 0]
            across = jacobian.swapaxes(1, 2)
            hess = np.matmul(across * (weight * (bent == residual))[:, None, :], jacobian)
            metric = hess
            if np.isfinite(self.delta):
                slack = weight * corner / np.maximum(np.abs(residual), corner)
                metric = np.matmul(across * slack[:, None, :], jacobian)
        usable = np.isfinite(value) & np.isfinite(slope).all(axis=1)
        return np.where(usable, value, np.inf), slope, hess, metric


def _newton(matrix: Floats, slope: Floats, theta: Floats, low: Floats, high: Floats) -> Floats:
    """Step of the damped quadratic model, up to the first bound; parameters that press against a bound stay there."""
    p = theta.shape[1]
    held = (low >= high) | ((theta <= low) & (slope > 0)) | ((theta >= high) & (slope < 0))
    diagonal = np.einsum("mpp->mp", matrix)
    step = np.zeros_like(theta)
    for _ in range(p + 1):
        free = ~held
        system = np.where(free[:, :, None] & free[:, None, :], matrix, 0.0)
        system[:, range(p), range(p)] += np.where(free, 1e-14 * diagonal + 1e-300, 1.0)
        step = -np.linalg.solve(system, np.where(free, slope, 0.0)[..., None])[..., 0]
        out = free & (((theta <= low) & (step < 0)) | ((theta >= high) & (step > 0)))
        if not out.any():
            break
        held |= out
    with np.errstate(divide="ignore", invalid="ignore"):
        room = np.where(step < 0, (low - theta) / step, np.where(step > 0, (high - theta) / step, np.inf))
    return step * np.minimum(1.0, room.min(axis=1, keepdims=True))
