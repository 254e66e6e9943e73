"""D^-1/2 A D^-1/2 against dense matrices, and D against steps that the optimizers themselves take."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.curvature import dense
from tests.curvature.cases import BY_NAME
from tests.state import fingerprint
from towtank.curvature.gauss_newton import GaussNewton
from towtank.curvature.preconditioned import Preconditioned, adam_preconditioner
from towtank.linalg.operator import LinearOperator
from towtank.problem import Problem

# Optimizers, and the step that they take with an averaged gradient of g: lr * factor * g / D.
OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.8, 0.95), weight_decay=0.0),
    "fused": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True, weight_decay=0.0),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, lr_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
}


def trained(optimizer_of, steps: int = 3, name: str = "tanh", **options):
    model, loss, batch = dense.wide(BY_NAME[name])
    optimizer = optimizer_of(model.parameters())
    for step in range(steps):
        optimizer.zero_grad()
        ((2 - step) ** 2 * loss(model(batch[0]), batch[1])).backward()  # shrinking, so that amsgrad differs
        optimizer.step()
    return model, optimizer, Problem(model, loss, batch, **options)


def numerator(optimizer, p) -> torch.Tensor:
    """The averaged gradient of the last step, from the state, as each rule defines it (the bias of the first average mended)."""
    state, group = optimizer.state[p], optimizer.param_groups[0]
    if isinstance(optimizer, torch.optim.NAdam):
        beta, t, decay = group["betas"][0], float(state["step"]), group["momentum_decay"]
        now, after = (beta * (1 - 0.5 * 0.96 ** ((t + k) * decay)) for k in (0, 1))
        product = float(state["mu_product"])
        return (1 - now) * p.grad / (1 - product) + after * state["exp_avg"] / (1 - product * after)
    if "exp_avg" in state:
        return state["exp_avg"] / (1 - group["betas"][0] ** float(state["step"]))
    return p.grad


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_what_the_step_was_divided_by(name):
    """The parameters moved by -lr (averaged gradient) / D in the last step: D is read off the optimizer's own step."""
    model, optimizer, problem = trained(OPTIMIZERS[name], steps=2)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()  # with the gradient of the second step
    D = problem.unflatten(adam_preconditioner(optimizer, problem))
    for (n, p), old in zip(model.named_parameters(), before):
        step = -0.01 * numerator(optimizer, p) / D[n]
        torch.testing.assert_close(p.detach() - old, step, rtol=1e-6, atol=1e-12)


def test_sharpness_of_adam_against_dense():
    model, optimizer, problem = trained(OPTIMIZERS["adam"])
    before = fingerprint(model, optimizer)
    G = GaussNewton(problem)
    states = [optimizer.state[p] for p in model.parameters()]
    D = torch.cat([((s["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-3).flatten() for s in states])
    wanted = torch.diag(D.rsqrt()) @ G.dense() @ torch.diag(D.rsqrt())
    P = Preconditioned(G, adam_preconditioner(optimizer, problem))
    assert (P.dense() - wanted).norm() < 1e-12 * wanted.norm()
    assert P.semidefinite and P.slices == G.slices
    torch.testing.assert_close(P.exact_diagonal()[0], wanted.diagonal())
    own = torch.linalg.eigvals(
        G.dense() / D[:, None]
    ).real.max()  # D^-1 A is not symmetric but has the same eigenvalues
    torch.testing.assert_close(torch.linalg.eigvalsh(P.dense())[-1], own)
    part = P.restrict(["2.weight"])
    at = problem.slices["2.weight"]
    assert isinstance(part, Preconditioned)
    torch.testing.assert_close(part.dense(), wanted[at, at])
    torch.testing.assert_close(P.restrict([5, 2]).dense(), wanted[[5, 2]][:, [5, 2]])
    assert fingerprint(model, optimizer) == before


def test_gradient_descent_in_adams_metric_turns_unstable_at_two_over_it():
    """On a quadratic: steps of -lr D^-1 g grow if and only if lr S > 2."""
    A = torch.tensor([[3.0, 1.0], [1.0, 0.5]], dtype=torch.float64)
    D = torch.tensor([4.0, 0.1], dtype=torch.float64)
    S = torch.linalg.eigvalsh(Preconditioned(LinearOperator.from_matrix(A), D).dense())[-1]
    for share, grows in ((0.99, False), (1.01, True)):
        x = torch.tensor([1.0, -0.3], dtype=torch.float64)
        for _ in range(2000):
            x = x - share * 2 / S * (A @ x) / D
        assert (x.norm() > 1e3) == grows


def test_averaged_gradients_turn_unstable_at_38_over_it():
    """Adam's average at beta1 = 0.9 with D frozen, on a quadratic: steps grow if and only if lr S > (2 + 2 b) / (1 - b)."""
    b, S = 0.9, 3.0
    for share, grows in ((0.99, False), (1.01, True)):
        x, m = 1.0, 0.0
        for _ in range(20_000):
            m = b * m + (1 - b) * S * x
            x -= share * (2 + 2 * b) / (1 - b) / S * m
            if abs(x) > 1e6:
                break
        assert (abs(x) > 1e6) == grows


def test_order_and_choice_of_parameters():
    model, optimizer, problem = trained(
        lambda p: torch.optim.Adam(list(p)[::-1])
    )  # the optimizer's own order is another
    whole = problem.unflatten(adam_preconditioner(optimizer, problem))
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        torch.testing.assert_close(whole[name], (state["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8)
    some = problem.replace(params=["2.bias", "0.weight"])
    torch.testing.assert_close(some.unflatten(adam_preconditioner(optimizer, some))["2.bias"], whole["2.bias"])


def test_groups_are_in_units_of_the_largest_learning_rate():
    def grouped(parameters):
        first, *rest, last = parameters
        return torch.optim.Adam(
            [{"params": [first], "lr": 0.01}, {"params": rest, "lr": 0.04}, {"params": [last], "lr": 0.0}]
        )

    model, optimizer, problem = trained(grouped)
    D = problem.unflatten(adam_preconditioner(optimizer, problem))
    roots = [(optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8 for p in model.parameters()]
    torch.testing.assert_close(D["0.weight"], 4 * roots[0])
    torch.testing.assert_close(D["2.weight"], roots[2])
    assert D["2.bias"].isinf().all()
    rest = Preconditioned(GaussNewton(problem), D).dense()[problem.slices["2.bias"]]
    assert not rest.any()  # what does not move has no say in stability


def test_what_is_missing_is_named():
    model, optimizer, problem = trained(OPTIMIZERS["adam"], steps=0)
    with pytest.raises(ValueError, match="no state for it"):
        adam_preconditioner(optimizer, problem)
    with pytest.raises(ValueError, match="step 0"):
        adam_preconditioner(torch.optim.Adagrad(model.parameters()), problem)
    with pytest.raises(ValueError, match="without 0.weight"):
        adam_preconditioner(torch.optim.Adam(nn.Linear(2, 2).parameters()), problem)
    with pytest.raises(TypeError, match="SGD"):
        adam_preconditioner(torch.optim.SGD(model.parameters()), problem)
    A = LinearOperator.from_matrix(torch.eye(2))
    for bad in (torch.tensor([1.0, 0.0]), torch.tensor([1.0, math.nan]), torch.ones(3), {"x": torch.ones(2)}):
        with pytest.raises(ValueError, match="expected"):
            Preconditioned(A, bad)
    with pytest.raises(TypeError, match="symmetric"):
        Preconditioned(LinearOperator.from_matrix(torch.tensor([[1.0, 2.0], [0.0, 1.0]])), torch.ones(2))
