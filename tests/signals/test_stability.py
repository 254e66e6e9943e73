"""Sharpness and preconditioned sharpness against dense matrices, known bowls, and the optimizers themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tests.state import fingerprint
from tests.worlds import normal, quadratic_bowl
from towtank import optim
from towtank.linalg.operator import LinearOperator
from towtank.problem import Problem
from towtank.signals.stability import largest, preconditioned_sharpness, sharpness, stability_limit
from towtank.signals.step import CannotTell, Step

F64 = torch.float64
SPECTRUM = torch.tensor([-1.0, 0.1, 0.5, 1.0, 2.0, 8.0], dtype=F64)


def step_of(model: nn.Module, loss: Any, data: Any, optimizer: torch.optim.Optimizer | None, **more: Any) -> Step:
    return Step(
        number=more.pop("number", 1),
        loss=torch.zeros(()),
        model=model,
        optimizer=optimizer,
        problem_of=lambda batch: Problem(model, loss, batch),
        probe_batch=data,
        **more,
    )


def bowl(make: Any, spectrum: Tensor = SPECTRUM, **options: Any) -> tuple[Step, nn.Module]:
    world = quadratic_bowl(spectrum)
    return step_of(world.model, world.loss, world.data, make(world.model.parameters(), **options)), world.model


def dense(model: nn.Module, loss: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    """The Hessian by torch's own differentiation of the flat function."""
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in params.values()]

    def of(theta: Tensor) -> Tensor:
        parts = {n: x.view(p.shape) for (n, p), x in zip(params.items(), theta.split(sizes), strict=True)}
        return loss(functional_call(model, parts, (data[0],)), data[1])

    flat = torch.cat([p.reshape(-1) for p in params.values()])
    return torch.autograd.functional.hessian(of, flat)  # type: ignore[return-value]


def top(A: Tensor) -> float:
    return float(torch.linalg.eigvalsh(A)[-1])


def net(seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    return model, (normal(20, 4, seed=seed), torch.arange(20) % 3)


def trained(make: Any, steps: int = 5, **options: Any) -> tuple[nn.Module, Any, torch.optim.Optimizer]:
    model, data = net()
    optimizer = make(model.parameters(), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    return model, data, optimizer


@pytest.mark.parametrize("share", [0.95, 1.05])
def test_gradient_descent_on_a_known_bowl(share: float) -> None:
    """lr = 1.9 / lambda and 2.1 / lambda."""
    step, _ = bowl(torch.optim.SGD, lr=share * 2 / 8)
    said = sharpness(tol=1e-6)(step)
    assert said["curvature/sharpness"] == pytest.approx(8, rel=1e-6)
    assert said["stability/sharpness_ratio"] == pytest.approx(share, rel=1e-6)
    key = "stability/sharpness_ratio"
    assert stability_limit(tol=1e-6)(step)[key] == pytest.approx(said[key], rel=1e-6)


OPTIONS = [
    {},
    {"weight_decay": 1.5},
    {"momentum": 0.9},
    {"momentum": 0.8, "nesterov": True},
    {"momentum": 0.5, "dampening": 0.3},
    {"momentum": 0.9, "weight_decay": 2.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("make", [torch.optim.SGD, optim.SGD])
def test_descent_diverges_where_the_ratio_passes_one(make: Any, options: dict) -> None:
    """At 0.97 and 1.03 of the lr where it says 1; 100 steps outlast the transient of momentum."""
    if make is optim.SGD and "dampening" in options:
        pytest.skip("it has no dampening")
    spectrum = SPECTRUM.abs()
    at_one = 1 / sharpness(tol=1e-9)(bowl(make, spectrum, lr=1.0, **options)[0])["stability/sharpness_ratio"]
    for share, diverges in ((0.97, False), (1.03, True)):
        step, model = bowl(make, spectrum, lr=share * at_one, **options)
        sizes = descend(step, model, 150)
        assert (sizes[-1] > sizes[99]) is diverges


def descend(step: Step, model: nn.Module, count: int) -> list[float]:
    """|theta| after each step of the step's optimizer."""
    assert step.optimizer is not None
    loss, (x, y), sizes = step.problem.loss, step.probe_batch, []
    for _ in range(count):
        model.zero_grad()
        loss(model(x), y).backward()
        step.optimizer.step()
        sizes.append(float(next(model.parameters()).detach().norm()))
    return sizes


def test_groups_that_learn_at_different_rates_and_decay_differently() -> None:
    """theta <- theta - diag(lr) (H + diag(w)) theta is unstable where the largest eigenvalue of diag(lr) (H + w) passes 2."""
    model, data = net()
    head = list(model[3].parameters())  # type: ignore[index]
    rest = [p for p in model.parameters() if all(p is not q for q in head)]
    groups = [{"params": rest, "lr": 0.3, "weight_decay": 0.1}, {"params": head, "lr": 0.1}]
    said = sharpness(tol=1e-8)(step_of(model, F.cross_entropy, data, torch.optim.SGD(groups)))
    sizes = [sum(p.numel() for p in ps) for ps in (rest, head)]
    lr = torch.tensor([0.3, 0.1], dtype=F64).repeat_interleave(torch.tensor(sizes))
    w = torch.tensor([0.1, 0.0], dtype=F64).repeat_interleave(torch.tensor(sizes))
    H = dense(model, F.cross_entropy, data) + torch.diag(w)
    exact = float(torch.linalg.eigvals(lr[:, None] * H).real.max())
    assert said["stability/sharpness_ratio"] == pytest.approx(exact / 2, rel=1e-7)


def test_parameters_that_the_optimizer_leaves_alone() -> None:
    model, data = net()
    head = list(model[3].parameters())  # type: ignore[index]
    said = sharpness(tol=1e-8)(step_of(model, F.cross_entropy, data, torch.optim.SGD(head, lr=0.1)))
    count = sum(p.numel() for p in head)
    exact = top(dense(model, F.cross_entropy, data)[-count:, -count:])
    assert said["curvature/sharpness"] == pytest.approx(exact, rel=1e-7)


def test_a_network_against_its_dense_hessian_within_the_bound() -> None:
    for seed in range(5):
        model, data = net(seed)
        said = sharpness()(step_of(model, F.cross_entropy, data, None))
        values = torch.linalg.eigvalsh(dense(model, F.cross_entropy, data))
        assert said["curvature/sharpness_error"] <= 0.05 * said["curvature/sharpness"]
        assert float((values - said["curvature/sharpness"]).abs().min()) <= said["curvature/sharpness_error"] + 1e-12
        assert said["curvature/sharpness"] == pytest.approx(float(values[-1]), rel=0.05)
        assert set(said) == {"curvature/sharpness", "curvature/sharpness_error"}  # no optimizer, no ratio


ADAPTIVE = [
    (torch.optim.Adam, {}, 38.0, 0.0),
    (torch.optim.Adam, {"weight_decay": 0.5, "betas": (0.5, 0.99)}, 6.0, 0.5),
    (torch.optim.AdamW, {"weight_decay": 0.5}, 38.0, 0.0),
    (optim.AdamW, {"weight_decay": 0.5}, 38.0, 0.0),
]


@pytest.mark.parametrize(("make", "options", "factor", "w"), ADAPTIVE)
def test_adam_against_a_dense_matrix_and_moments_by_hand(make: Any, options: dict, factor: float, w: float) -> None:
    model, data = net()
    optimizer = make(model.parameters(), lr=0.01, eps=1e-3, **options)
    beta2 = options.get("betas", (0.9, 0.999))[1]
    v = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=F64)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(data[0]), data[1]).backward()
        g = torch.cat([(p.grad + w * p.detach()).reshape(-1) for p in model.parameters() if p.grad is not None])
        v = beta2 * v + (1 - beta2) * g**2
        optimizer.step()
    D = (v / (1 - beta2**5)).sqrt() + 1e-3
    A = (dense(model, F.cross_entropy, data) + w * torch.eye(len(v), dtype=F64)) / (D[:, None] * D).sqrt()
    step = step_of(model, F.cross_entropy, data, optimizer)
    said = preconditioned_sharpness(tol=1e-6)(step)
    assert said["curvature/preconditioned_sharpness"] == pytest.approx(top(A), rel=1e-6)
    assert said["stability/preconditioned_ratio"] == pytest.approx(0.01 * top(A) / factor, rel=1e-6)
    key = "stability/preconditioned_ratio"  # this call is warm: it ends at another residual
    assert stability_limit(tol=1e-6)(step)[key] == pytest.approx(said[key], rel=1e-6)
    plain = sharpness(tol=1e-6)(step)
    assert plain["curvature/sharpness"] == pytest.approx(top(dense(model, F.cross_entropy, data)), rel=1e-6)
    assert "stability/sharpness_ratio" not in plain


@pytest.mark.parametrize("share", [0.97, 1.03])
@pytest.mark.parametrize("make", [torch.optim.Adam, optim.AdamW])
def test_adam_on_a_bowl_diverges_where_the_ratio_passes_one(make: Any, share: float) -> None:
    """eps = 10 and a start at 1e-60 hold D at eps, so that S = 8 / 10 and lr = 38 / 0.8 is the limit."""
    step, model = bowl(make, SPECTRUM.abs(), lr=share * 38 / 0.8, eps=10.0, weight_decay=0.0)
    nn.init.constant_(next(model.parameters()), 1e-60)
    descend(step, model, 1)
    assert preconditioned_sharpness(tol=1e-6)(step)["stability/preconditioned_ratio"] == pytest.approx(share, rel=1e-5)
    sizes = descend(step, model, 300)
    assert (max(sizes[250:]) > max(sizes[100:150])) is (share > 1) and max(sizes) < 1e-3


def test_other_optimizers_by_their_own_diagonal() -> None:
    model, data, optimizer = trained(torch.optim.Adadelta)
    step = step_of(model, F.cross_entropy, data, optimizer)
    with pytest.raises(CannotTell, match="Adadelta"):
        preconditioned_sharpness()(step)
    given = preconditioned_sharpness(1e-6, diagonal=lambda o, p: 4 * torch.ones(p.size, dtype=F64), factor=2.0)(step)
    exact = top(dense(model, F.cross_entropy, data)) / 4
    assert given["curvature/preconditioned_sharpness"] == pytest.approx(exact, rel=1e-6)
    assert given["stability/preconditioned_ratio"] == pytest.approx(exact / 2, rel=1e-6)  # lr = 1


def test_nadam_has_a_preconditioner_and_no_limit() -> None:
    model, data, optimizer = trained(torch.optim.NAdam)
    assert set(stability_limit()(step_of(model, F.cross_entropy, data, optimizer))) == {
        "curvature/preconditioned_sharpness",
        "curvature/preconditioned_sharpness_error",
    }


@pytest.mark.parametrize("make", [optim.Lion, torch.optim.Rprop])
def test_optimizers_without_a_known_limit(make: Any) -> None:
    model, data, optimizer = trained(make)
    with pytest.raises(CannotTell, match="preconditioned_sharpness"):
        stability_limit()(step_of(model, F.cross_entropy, data, optimizer))


@pytest.mark.parametrize("make", [torch.optim.Adam, optim.AdamW])
def test_before_the_first_step(make: Any) -> None:
    model, data, optimizer = trained(make, steps=0)
    with pytest.raises(CannotTell, match="taken a step"):
        preconditioned_sharpness()(step_of(model, F.cross_entropy, data, optimizer))
    with pytest.raises(CannotTell, match="taken 0"):
        stability_limit()(step_of(model, F.cross_entropy, data, optimizer))


@pytest.mark.parametrize("make", [torch.optim.Adam, optim.AdamW])
def test_one_step_is_too_short_an_average_for_a_limit(make: Any) -> None:
    model, data, optimizer = trained(make, steps=1)
    with pytest.raises(CannotTell, match="taken 1"):
        stability_limit()(step_of(model, F.cross_entropy, data, optimizer))


def test_a_limit_is_stale_once_the_learning_rate_was_raised_beyond_it() -> None:
    """Measured at 0.6 of the limit: 1.5 times the rate is still below, twice is not."""
    step, _ = bowl(torch.optim.SGD, lr=0.6 * 2 / 8)
    probe = stability_limit(tol=1e-6)
    assert not probe.stale(step)
    probe(step)
    assert step.optimizer is not None
    for share, stale in ((0.6, False), (0.9, False), (1.2, True)):
        step.optimizer.param_groups[0]["lr"] = share * 2 / 8
        assert probe.stale(step) is stale


def test_what_cannot_be_told() -> None:
    model, data, optimizer = trained(torch.optim.SGD)
    for probe in (stability_limit(), preconditioned_sharpness()):
        with pytest.raises(CannotTell, match="got none"):
            probe(step_of(model, F.cross_entropy, data, None))
    with pytest.raises(CannotTell, match="adaptive|Adam"):
        preconditioned_sharpness()(step_of(model, F.cross_entropy, data, optimizer))
    with pytest.raises(CannotTell, match="finite"):
        sharpness()(step_of(model, F.cross_entropy, (data[0] * math.nan, data[1]), optimizer))
    with pytest.raises(CannotTell, match="loss="):
        sharpness()(Step(number=1, loss=torch.zeros(()), model=model, optimizer=optimizer, probe_batch=data))
    with pytest.raises(CannotTell, match="batch"):
        sharpness()(step_of(model, F.cross_entropy, None, optimizer))


def test_one_vector_is_kept_and_a_wrong_one_does_no_harm() -> None:
    model, data, optimizer = trained(torch.optim.AdamW)
    exact = top(dense(model, F.cross_entropy, data))
    kept: dict[str, Any] = {}
    size = sum(p.numel() for p in model.parameters())
    for number in range(3):
        step = step_of(model, F.cross_entropy, data, optimizer, number=number, kept=kept)
        sharpness()(step)
        preconditioned_sharpness()(step)
        assert sorted(t.shape for t in kept.values() if isinstance(t, Tensor)) == [(size,), (size,)]
    wrong = torch.linalg.eigh(dense(model, F.cross_entropy, data)).eigenvectors[:, 0]
    for bad in (wrong, torch.full((size,), math.nan, dtype=F64), torch.zeros(size), torch.ones(3)):
        step = step_of(model, F.cross_entropy, data, optimizer, kept={"stability/sharpness": bad})
        assert sharpness()(step)["curvature/sharpness"] == pytest.approx(exact, rel=0.05)


def test_the_hessian_of_the_step_is_shared() -> None:
    model, data, optimizer = trained(torch.optim.Adam)
    step = step_of(model, F.cross_entropy, data, optimizer)
    sharpness()(step)
    first = step.hessian
    preconditioned_sharpness()(step)
    assert step.hessian is first


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_half_precision_frozen_and_tied_parameters(make: Any, dtype: torch.dtype) -> None:
    """Measured in float32 at the rounded parameters; the dense reference is of the same rounded numbers in float64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight  # type: ignore[union-attr]
    model[0].bias.requires_grad_(False)  # type: ignore[union-attr]
    model.to(dtype)
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x, y = normal(10, 4, seed=0), normal(10, 4, seed=1)
    F.mse_loss(model(x.to(dtype)), y.to(dtype)).backward()
    optimizer.step()
    before = fingerprint(model, optimizer)
    probe = sharpness(tol=1e-4) if make is torch.optim.SGD else preconditioned_sharpness(tol=1e-4)
    said = probe(step_of(model, F.mse_loss, (x.to(dtype), y.to(dtype)), optimizer))
    assert fingerprint(model, optimizer) == before
    W, b0, b2 = (p.detach().double() for p in (model[0].weight, model[0].bias, model[2].bias))  # type: ignore[union-attr]

    def of(theta: Tensor) -> Tensor:
        V = theta[:16].view(4, 4)
        return F.mse_loss(torch.tanh(x.to(dtype).double() @ V.T + b0) @ V.T + theta[16:], y.to(dtype).double())

    H: Any = torch.autograd.functional.hessian(of, torch.cat([W.reshape(-1), b2]))
    if make is torch.optim.SGD:
        assert said["curvature/sharpness"] == pytest.approx(top(H), rel=1e-3)
        return
    v = [optimizer.state[p]["exp_avg_sq"].double() for p in (model[0].weight, model[2].bias)]  # type: ignore[union-attr]
    D = torch.cat([(x / 0.001).sqrt().reshape(-1) for x in v]) + 1e-8
    A = H / (D[:, None] * D).sqrt()
    assert said["curvature/preconditioned_sharpness"] == pytest.approx(top(A), rel=1e-3)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, optim.AdamW, optim.SGD])
def test_nothing_of_the_users_is_changed(make: Any) -> None:
    model, data, optimizer = trained(make)
    model.add_module("4", nn.Dropout(0.5))
    before = fingerprint(model, optimizer)
    step = step_of(model, F.cross_entropy, data, optimizer)
    stability_limit()(step)
    sharpness()(step)
    assert fingerprint(model, optimizer) == before


def test_one_example_and_one_parameter() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=F64)
    data = torch.full((1, 1), 3.0, dtype=F64), torch.zeros(1, 1, dtype=F64)
    said = sharpness()(step_of(model, F.mse_loss, data, torch.optim.SGD(model.parameters(), lr=0.1)))
    assert said["curvature/sharpness"] == pytest.approx(18.0) and said["stability/sharpness_ratio"] == pytest.approx(
        0.9
    )


def test_what_did_not_converge_shows_in_the_error() -> None:
    step, _ = bowl(torch.optim.SGD, torch.linspace(0.9, 1.0, 50, dtype=F64), lr=0.1)
    said = sharpness(tol=1e-9, max_products=2)(step)
    assert said["curvature/sharpness_error"] > 1e-9
    found = largest(LinearOperator.from_matrix(torch.diag(torch.linspace(0, 1, 50))), tol=1e-9, max_products=3)
    assert not found.converged and found.products == 3


def test_a_dear_probe_says_its_cost() -> None:
    step, _ = bowl(torch.optim.SGD, lr=0.1)
    assert all(probe().cost(step.problem) > 1 for probe in (sharpness, preconditioned_sharpness, stability_limit))
