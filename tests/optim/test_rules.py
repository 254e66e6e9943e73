"""One table for all rules: every public optimizer on the same problems, types, shapes and interruptions."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

import towtank.optim as optim
from towtank.optim.engine import Surround, Work, advance
from towtank.optim.members import Members

# learning rates that descend the quadratic below; options some rules need
LR = {"SGD": 0.05, "SGDP": 0.05, "AdaHessian": 0.1, "SGDSaI": 0.003, "Muon": 0.02, "MFAC": 0.3, "SNTASGD": 0.05}
OPTIONS: dict[str, dict] = {
    "SophiaG": {"rho": 0.1},
    "SophiaH": {"rho": 0.1},
    "GaLore": {"rank": 2, "scale": 1.0},
    "Fira": {"rank": 2},
    "MFAC": {"damp": 1.0},
}
NAMES = sorted(optim.OPTIMIZERS)
CONSTRAINED = {
    "Nero"
}  # its matrices have unit rows: the minimum of the quadratic is out of reach, its direction is not


def make(name: str, params, **options) -> torch.optim.Optimizer:
    return getattr(optim, name)(
        params, **{"lr": LR.get(name, 0.03), "weight_decay": 0.0} | OPTIONS.get(name, {}) | options
    )


def feed(optimizer, params, grads) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else g.clone()
    if optimizer.rule.observe is not None:
        optimizer.observe_curvature(
            [torch.ones_like(p) if g is None else 1 + 0 * g for p, g in zip(params, grads, strict=True)]
        )


def tensors(dtype=torch.float32, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in ((6, 5), (5,), (3, 2, 2, 2))]


def random_grads(params, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]


def run(optimizer, params, steps, start: int = 0) -> None:
    for t in range(start, start + steps):
        feed(optimizer, params, random_grads(params, t))
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_descends_a_quadratic(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(4, 6, generator=generator)
    if name in CONSTRAINED:
        target = target - target.mean(1, keepdim=True)
        target = target / target.norm(dim=1, keepdim=True)
    w = nn.Parameter(torch.randn(4, 6, generator=generator))
    optimizer = make(name, [w])
    first = (w.detach() - target).square().sum().item()
    for _ in range(300):
        feed(optimizer, [w], [2 * (w.detach() - target)])
        optimizer.step()
    assert (w.detach() - target).square().sum().item() < 0.05 * first


@pytest.mark.parametrize("name", sorted(set(NAMES) - CONSTRAINED))
def test_descends_rosenbrock(name: str) -> None:
    w = nn.Parameter(torch.tensor([[-0.5, 0.5], [0.5, 0.0]], dtype=torch.float64))

    def loss() -> torch.Tensor:
        x = w.flatten()
        return (10 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).mean()

    optimizer = make(name, [w], lr=LR.get(name, 0.03) / 5)
    first = loss().item()
    for _ in range(300):
        (g,) = torch.autograd.grad(loss(), [w])
        feed(optimizer, [w], [g])
        optimizer.step()
    assert loss().item() < 0.8 * first  # a narrow valley: plain gradient descent crawls


@pytest.mark.parametrize("name", NAMES)
def test_a_state_round_trip_in_mid_training_changes_no_bit(name: str) -> None:
    whole, halves = tensors(), tensors()
    straight, before = make(name, whole), make(name, halves)
    run(straight, whole, 6)
    run(before, halves, 3)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = make(name, tensors(seed=1))
    moved = after.param_groups[0]["params"]
    with torch.no_grad():
        for p, q in zip(moved, halves, strict=True):
            p.copy_(q)
    after.load_state_dict(torch.load(file, weights_only=True))
    run(after, moved, 3, start=3)
    for p, q in zip(whole, moved, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", NAMES)
def test_engines_agree(name: str) -> None:
    walks = {}
    for engine in ("auto", "eager"):
        params = tensors()
        run(make(name, params, engine=engine, weight_decay=0.01), params, 5)
        walks[engine] = params
    for p, q in zip(walks["auto"], walks["eager"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=2e-6)  # reordered sums of float32 over five steps


@pytest.mark.parametrize("name", NAMES)
def test_missing_and_zero_gradients(name: str) -> None:
    params = tensors()
    optimizer = make(name, params)
    untouched = params[1].detach().clone()
    for t in range(3):
        grads = random_grads(params, t)
        feed(optimizer, params, [grads[0], None, torch.zeros_like(grads[2])])
        optimizer.step()
    assert torch.equal(params[1], untouched)
    assert all(torch.isfinite(p).all() for p in params)
    feed(optimizer, params, random_grads(params, 3))
    optimizer.step()  # a parameter whose gradient comes late starts at its own first step
    assert float(optimizer.state[params[1]]["step"]) == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(name: str, dtype: torch.dtype) -> None:
    exact, params = tensors(torch.float64), tensors(dtype)
    with torch.no_grad():
        for p, q in zip(exact, params, strict=True):
            p.copy_(q)
    for these in (exact, params):
        optimizer = make(name, these)
        for t in range(3):
            feed(optimizer, these, [g.to(dtype).to(these[0].dtype) for g in random_grads(exact, t)])
            optimizer.step()
    assert all(p.dtype == dtype for p in params)
    for p, q in zip(exact, params, strict=True):
        # three roundings of a parameter of size up to 4, and Muon's bfloat16 iteration
        slack = 0.02 if name == "Muon" else 3 * 4 * torch.finfo(dtype).eps
        assert (p - q.double()).abs().max() <= slack + 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_odd_shapes(name: str) -> None:
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    params = [
        nn.Parameter(torch.tensor(1.5)),
        nn.Parameter(torch.empty(0, 3)),
        nn.Parameter(torch.zeros(3, 4)),
        nn.Parameter(base.clone().t()),  # not contiguous
        nn.Parameter(torch.randn(1)),
    ]
    straight = nn.Parameter(base.t().contiguous())
    optimizer, other = make(name, params), make(name, [straight])
    for t in range(3):
        grads = random_grads(params, t)
        feed(optimizer, params, grads)
        feed(other, [straight], [grads[3]])
        optimizer.step()
        other.step()
    assert all(torch.isfinite(p).all() for p in params)
    torch.testing.assert_close(params[3].detach(), straight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lr", [0.0, 1e-12, 1e3])
def test_extreme_learning_rates_give_numbers(name: str, lr: float) -> None:
    params = tensors()
    optimizer = make(name, params, lr=lr)
    before = [p.detach().clone() for p in params]
    run(optimizer, params, 3)
    assert all(torch.isfinite(p).all() for p in params)
    if lr == 0 and name not in CONSTRAINED:
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_member_of_an_ensemble_is_a_solo_run(name: str) -> None:
    rule = optim.rule_of(name)
    defaults = rule.hyper(**{k: v for k, v in OPTIONS.get(name, {}).items() if k in rule.hyper._fields})
    rates = (0.01, 0.003)
    columns = type(defaults)(*(torch.full((2,), float(x), dtype=torch.float64) for x in defaults))
    columns = columns._replace(lr=torch.tensor(rates, dtype=torch.float64))
    start = {"w": torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}
    roles = {"w": "matrix"}
    if rule.prepare is not None:
        start["w"] = torch.stack([rule.prepare(p, "matrix") for p in start["w"]])
    for native in (True, False):
        together = {"w": start["w"].clone()}
        members = Members(rule, together, roles, columns)
        members._native = members._native and native
        solo = [start["w"][e].clone() for e in range(2)]
        hypers = [defaults._replace(lr=r) for r in rates]
        states = [rule.init(p, "matrix", h) for p, h in zip(solo, hypers, strict=True)]
        for t in range(1, 5):
            grads = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
            members.advance({"w": grads}, lambda n, h: (h, Surround()), torch.ones(2) > 0)
            for e in range(2):
                if t == 1 and rule.begin is not None:
                    states[e] = rule.begin(states[e], grads[e], hypers[e])
                advance(rule, [Work(solo[e], grads[e], states[e])], hypers[e], t, Surround(), engine="eager")
        for e in range(2):
            tolerance = 0.03 if name == "Muon" else 1e-9  # bfloat16 inside
            assert (together["w"][e] - solo[e]).abs().max() < tolerance


@pytest.mark.parametrize("name", NAMES)
def test_nan_gradients_are_named_and_poison_nothing(name: str) -> None:
    params = tensors()
    optimizer = make(name, [(f"layer{i}", p) for i, p in enumerate(params)])
    run(optimizer, params, 2)
    grads = random_grads(params, 5)
    grads[0][2, 1] = math.nan
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    with pytest.raises(FloatingPointError, match=r"layer0 \(1 numbers\)"):
        optimizer.step()
    state = [t for p in params for t in optimizer.state[p].values()]
    assert all(torch.isfinite(t.float()).all() for t in (*state, *params))
    other = tensors()
    skipping = make(name, other, nonfinite="skip")
    run(skipping, other, 2)
    before = [p.detach().clone() for p in other]
    for p, g in zip(other, grads, strict=True):
        p.grad = g
    skipping.step()
    assert skipping.skipped == 1 and all(torch.equal(p, q) for p, q in zip(other, before, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_statistics_move_nothing_and_preconditioner_has_the_parameters_shape(name: str) -> None:
    params = tensors()
    optimizer = make(name, [(f"layer{i}", p) for i, p in enumerate(params)])
    run(optimizer, params, 2)
    feed(optimizer, params, random_grads(params, 9))
    before = [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]
    told = optimizer.statistics()
    after = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert set(told) == {"layer0", "layer1", "layer2"}
    old = [p.detach().clone() for p in params]
    optimizer.step()
    for i, (p, o) in enumerate(zip(params, old, strict=True)):
        rms = (p.detach() - o).square().mean().sqrt().item()
        assert told[f"layer{i}"]["update_rms"] == pytest.approx(rms, rel=1e-3, abs=1e-7)
        assert all(math.isfinite(x) for x in told[f"layer{i}"].values())
    if optimizer.rule.preconditioner is not None:
        for i, p in enumerate(params):
            diagonal = optimizer.preconditioner().get(f"layer{i}")
            assert diagonal is None or torch.broadcast_shapes(diagonal.shape, p.shape) == p.shape


@pytest.mark.parametrize("name", NAMES)
def test_every_rule_says_what_it_is(name: str) -> None:
    rule = optim.rule_of(name)
    assert rule.summary and rule.source and rule.state_bytes >= 0
    assert rule.lr_vs_adamw[0] <= rule.lr_vs_adamw[1]
    assert rule.hyper._fields[0] == "lr"
