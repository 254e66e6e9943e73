"""Recorded gradients for golden tests, and how a rule, a torch optimizer and a formula in numpy walk along them.

Two problems: a fixed small one in float64, and a fixed network in float32 with a convolution, matrices and biases. The
gradients are recorded once from plain gradient descent, so that every implementation sees the same ones and a difference
is the rule's, not the trajectory's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

STEPS = 25
Recorded = tuple[list[Tensor], list[list[Tensor]]]  # start, and the gradients of each step


@cache
def rosenbrock() -> Recorded:
    """A Rosenbrock chain over two matrices and a vector, float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3), (3, 5), (6,)]
    start = [torch.randn(s, generator=generator, dtype=torch.float64) * 0.5 for s in shapes]

    def loss(params: Sequence[Tensor]) -> Tensor:
        x = torch.cat([p.flatten() for p in params])
        return (10 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).mean()

    return _record(start, loss, 0.01)


@cache
def network() -> Recorded:
    """A convolution, two matrices and their biases on fixed data, float32."""
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(16, 2, 6, 6, generator=generator)
    y = torch.randint(3, (16,), generator=generator)
    names = [n for n, _ in model.named_parameters()]

    def loss(params: Sequence[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, dict(zip(names, params)), (x,)), y)

    return _record([p.detach().clone() for p in model.parameters()], loss, 0.1)


def _record(start: list[Tensor], loss: Callable[[Sequence[Tensor]], Tensor], lr: float) -> Recorded:
    params, grads = [p.clone().requires_grad_() for p in start], []
    for _ in range(STEPS):
        step = torch.autograd.grad(loss(params), params)
        grads.append([g.clone() for g in step])
        params = [(p - lr * g).detach().requires_grad_() for p, g in zip(params, step, strict=True)]
    return start, grads


PROBLEMS: dict[str, Callable[[], Recorded]] = {"rosenbrock": rosenbrock, "network": network}


def walk(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    problem: Recorded,
    before: Callable[[torch.optim.Optimizer, list[nn.Parameter], list[Tensor], int], None] | None = None,
) -> list[Tensor]:
    """The parameters after all recorded gradients were fed to a torch optimizer."""
    start, grads = problem
    params = [nn.Parameter(p.clone()) for p in start]
    optimizer = make(params)
    for t, step in enumerate(grads, start=1):
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        if before is not None:
            before(optimizer, params, step, t)
        optimizer.step()
    return [p.detach() for p in params]


def formula(step: Callable[[np.ndarray, np.ndarray, dict, int], np.ndarray], problem: Recorded) -> list[np.ndarray]:
    """The same with a formula in numpy float64: `step(param, grad, state, t) -> param`, a fresh dict of state per tensor."""
    start, grads = problem
    params = [p.double().numpy().copy() for p in start]
    states: list[dict] = [{} for _ in params]
    for t, one in enumerate(grads, start=1):
        params = [step(p, g.double().numpy(), s, t) for p, g, s in zip(params, one, states, strict=True)]
    return params


def far_apart(ours: Sequence[Tensor], theirs: Sequence[Tensor] | Sequence[np.ndarray]) -> float:
    """Largest difference of two sets of parameters."""
    return max(float(np.abs(a.double().numpy() - np.asarray(b, dtype=np.float64)).max()) for a, b in zip(ours, theirs))


def tolerance(name: str) -> float:
    """What rounding may do in 25 steps: float64 noise of numbers near 1, and the 1e-6 of the facts for float32."""
    return 1e-12 if name == "rosenbrock" else 1e-6
