"""PyTorch's conventions: groups, closures, schedulers, state and hooks."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle

import pytest
import torch
from torch import nn

import towtank.optim as optim
from tests.optim.test_rules import NAMES, feed, make, random_grads, run, tensors
from towtank.optim.groups import param_groups
from towtank.optim.optimizer import Optimizer
from towtank.optim.rules import lion
from towtank.optim.transforms import orthograd, quantized


def _copy(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def _equal(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def _saved(optimizer: torch.optim.Optimizer) -> dict:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_groups_have_their_own_numbers() -> None:
    params = tensors()
    alone = _copy(params)
    both = optim.AdamW([{"params": params[:1], "lr": 0.1}, {"params": params[1:], "betas": (0.5, 0.6)}], lr=0.01)
    one = optim.AdamW(alone[:1], lr=0.1)
    two = optim.AdamW(alone[1:], lr=0.01, betas=(0.5, 0.6))
    for t in range(3):
        grads = random_grads(params, t)
        feed(both, params, grads)
        both.step()
        feed(one, alone, grads)
        one.step()
        two.step()
    assert _equal(params, alone)


def test_groups_by_role_and_name_of_a_model() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    groups = param_groups(model, {"vector": {"weight_decay": 0.0}, "2.*": {"lr": 0.5}})
    optimizer = optim.Lion(groups, lr=0.1, weight_decay=0.3)
    told = {g["param_names"][0]: (g["role"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert told == {
        "0.weight": ("embedding", 0.1, 0.3),
        "1.weight": ("matrix", 0.1, 0.3),
        "1.bias": ("vector", 0.1, 0.0),
        "2.weight": ("head", 0.5, 0.3),
        "2.bias": ("vector", 0.5, 0.3),
    }


def test_a_closure_is_called_once_with_gradients_enabled() -> None:
    w = nn.Parameter(torch.tensor([2.0]))
    optimizer, calls = optim.SGD([w], lr=0.25), []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert calls == [True] and w.item() == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_to_maximize_is_to_minimize_the_negative_and_gradients_are_only_read(name: str) -> None:
    up, down = tensors(), tensors()
    ups, downs = make(name, up, maximize=True, clip=0.5, clip_each=0.3), make(name, down, clip=0.5, clip_each=0.3)
    for t in range(2):
        grads = random_grads(up, t)
        feed(ups, up, [-g for g in grads])
        feed(downs, down, grads)
        kept = [(p.grad, p.grad.clone(), p.grad._version) for p in up]
        ups.step()
        downs.step()
        for p, (grad, values, version) in zip(up, kept, strict=True):
            assert p.grad is grad and torch.equal(grad, values) and grad._version == version
    if name not in ("AdaHessian", "SophiaG", "SophiaH"):  # the curvature is fed with the gradient's sign
        assert _equal(up, down)


def test_clipping_equals_torchs_and_leaves_the_gradients() -> None:
    ours, theirs = tensors(torch.float64), tensors(torch.float64)
    a, b = optim.SGD(ours, lr=0.1, clip=0.5), torch.optim.SGD(theirs, lr=0.1)
    for t in range(3):
        grads = random_grads(ours, t)
        feed(a, ours, grads)
        a.step()
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        nn.utils.clip_grad_norm_(theirs, 0.5)
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-15)  # float64: a rounding of numbers below 4


@pytest.mark.parametrize("engine_name", ["native", "eager"])
def test_tensor_learning_rates(engine_name: str) -> None:
    ours, theirs = tensors(), tensors()
    rate = torch.tensor(0.01)
    a, b = optim.AdamW(ours, lr=rate, engine=engine_name), optim.AdamW(theirs, lr=0.01, engine=engine_name)
    run(a, ours, 2)
    rate.mul_(0.5)
    run(a, ours, 1, start=2)
    run(b, theirs, 2)
    b.param_groups[0]["lr"] = 0.005
    run(b, theirs, 1, start=2)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_schedulers_and_the_decay_that_follows_the_schedule_only() -> None:
    """Independent decay by hand: p <- p - share lambda p at zero gradients, whatever the learning rate (also a group's)."""
    for lr in (0.3, 1e-4):
        p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
        optimizer = optim.Lion(
            [{"params": [p]}, {"params": [q], "lr": 7 * lr}], lr=lr, weight_decay=0.1, decay="independent"
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
        expected = 1.0
        for t in range(3):
            p.grad, q.grad = torch.zeros(2), torch.zeros(2)
            optimizer.step()
            schedule.step()
            expected *= 1 - 0.5**t * 0.1
        assert p[0].item() == pytest.approx(expected) and q[0].item() == pytest.approx(expected)


def test_without_a_scheduler_every_group_decays_at_its_own_peak() -> None:
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = optim.Lion([{"params": [p]}, {"params": [q], "lr": 0.5}], lr=0.1, weight_decay=0.1, decay="independent")
    p.grad = q.grad = torch.zeros(1)
    optimizer.step()
    assert p.item() == pytest.approx(0.9) and q.item() == pytest.approx(0.9)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=6),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
        lambda o: torch.optim.lr_scheduler.SequentialLR(
            o,
            [torch.optim.lr_scheduler.LinearLR(o, 0.5, total_iters=2), torch.optim.lr_scheduler.ExponentialLR(o, 0.5)],
            [2],
        ),
    ],
)
def test_torchs_schedulers_drive_us_as_they_drive_torch(schedule) -> None:
    ours, theirs = tensors(torch.float64), tensors(torch.float64)
    a, b = optim.AdamW(ours, weight_decay=0.1), torch.optim.AdamW(theirs, weight_decay=0.1)
    drive = [(a, schedule(a)), (b, schedule(b))]
    for t in range(5):
        for p, q, g in zip(ours, theirs, random_grads(ours, t), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        for optimizer, s in drive:
            optimizer.step()
            s.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


def test_a_group_added_after_the_start_is_saved_and_starts_at_its_own_first_step() -> None:
    params = tensors()
    optimizer = optim.AdaBelief([("a", params[0])], lr=0.01)
    run(optimizer, params[:1], 2)
    optimizer.add_param_group({"params": [("b", params[1]), ("c", params[2])], "lr": 0.5, "role": "head"})
    run(optimizer, params, 2)
    assert [float(optimizer.state[p]["step"]) for p in params] == [4, 2, 2]
    saved = _saved(optimizer)
    twins = _copy(params)
    other = optim.AdaBelief([("a", twins[0])], lr=0.9)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        other.load_state_dict(saved)
    other.add_param_group({"params": [("b", twins[1]), ("c", twins[2])]})
    other.load_state_dict(saved)
    run(optimizer, params, 2, start=9)
    run(other, twins, 2, start=9)
    assert _equal(params, twins)
    assert other.param_groups[1]["role"] == "head" and other.param_groups[1]["lr"] == 0.5


def test_a_state_is_of_tensors_and_numbers_and_hooks_see_it() -> None:
    params = tensors()
    optimizer = optim.SophiaG(params, rounding="compensated")
    run(optimizer, params, 1)
    state = _saved(optimizer)
    assert all(isinstance(x, torch.Tensor) for s in state["state"].values() for x in s.values())
    seen = []
    other = optim.SophiaG(_copy(params), rounding="compensated")
    other.register_load_state_dict_pre_hook(lambda o, s: {**s, "state": {0: s["state"][0]}})
    other.register_load_state_dict_post_hook(seen.append)
    other.load_state_dict(state)
    assert len(other.state) == 1 and seen == [other]
    with pytest.raises(ValueError, match="expected a state of m, step, got h, m, observed, step"):
        optim.Lion(_copy(params)).load_state_dict(state)


def test_a_state_is_made_lazily_and_kept_per_parameter() -> None:
    params = tensors()
    optimizer = optim.AdamW(params)
    assert not optimizer.state
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert set(optimizer.state) == {params[0]}
    optimizer.zero_grad()
    assert params[0].grad is None
    optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 1


@pytest.mark.parametrize("name", NAMES)
def test_complex_parameters_equal_the_real_problem(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(4, 3, 2, generator=generator)
    z, x = nn.Parameter(torch.view_as_complex(parts.clone())), nn.Parameter(parts.clone())
    options = {"clip": 1.0, "clip_each": 0.7, "weight_decay": 0.01}
    ours, real = make(name, [z], **options), make(name, [x], **options)
    for _ in range(3):
        g = torch.randn(4, 3, 2, generator=generator)
        z.grad, x.grad = (
            torch.view_as_complex(g).conj().resolve_conj().conj(),
            g,
        )  # a lazy conjugate, as autograd leaves
        if ours.rule.observe is not None:
            ours.observe_curvature([torch.view_as_complex(g.square())])
            real.observe_curvature([g.square()])
        ours.step()
        real.step()
    torch.testing.assert_close(torch.view_as_real(z.detach()), x.detach(), rtol=1e-6, atol=1e-6)  # norms, reordered


@pytest.mark.parametrize("variant", ["", "official"])
def test_copies_and_pickles_go_on_alike(variant: str) -> None:
    params = tensors()
    optimizer = optim.AdaBelief(params, lr=0.01, variant=variant, transforms=(orthograd,), clip=0.7)
    run(optimizer, params, 2)
    copies = [copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))]
    copies.append(pickle.loads(pickle.dumps(copies[1])))
    run(optimizer, params, 2, start=2)
    for twins, other in copies:
        assert other.rule is optimizer.rule and other.clip == 0.7
        run(other, twins, 2, start=2)
        assert _equal(params, twins)


def test_an_optimizer_of_a_users_own_rule_can_be_copied() -> None:
    params = tensors()
    optimizer = Optimizer(params, orthograd(lion.RULE), {"lr": 0.1, "betas": (0.9, 0.99)})
    run(optimizer, params, 1)
    twins, other = copy.deepcopy(copy.deepcopy((params, optimizer)))
    run(optimizer, params, 1, start=1)
    run(other, twins, 1, start=1)
    assert _equal(params, twins)


def test_older_groups_get_the_numbers_they_lack() -> None:
    params = tensors()
    optimizer = optim.AdamW(params, lr=0.25)
    state = optimizer.state_dict()
    for name in ("decay", "first_lr", "eps"):
        del state["param_groups"][0][name]
    optimizer.load_state_dict(state)
    run(optimizer, params, 1)
    assert optimizer.param_groups[0]["eps"] == 1e-8 and optimizer.param_groups[0]["first_lr"] == 0.25


def test_step_hooks_and_grad_scaler() -> None:
    w, plain = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    ours, theirs, calls = optim.SGD([w], lr=0.125), torch.optim.SGD([plain], lr=0.125), []
    ours.register_step_pre_hook(lambda *a: calls.append("before"))
    ours.register_step_post_hook(lambda *a: calls.append("after"))
    for p, optimizer in ((w, ours), (plain, theirs)):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for factor in (1.0, math.inf, 3.0):  # the second step overflows and is left out
            optimizer.zero_grad()
            scaler.scale((factor * p).sum()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p], 1.0, error_if_nonfinite=False)
            scaler.step(optimizer)
            scaler.update()
    assert torch.equal(w, plain) and calls == ["before", "after"] * 2


def test_a_parameter_given_twice_is_torchs_matter() -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optim.Lion([w, w])
    with pytest.raises(ValueError, match="more than one parameter group"):
        optim.Lion([{"params": [w]}, {"params": [w]}])
    with pytest.raises(TypeError, match="should be an iterable"):
        optim.Lion(w)
    with pytest.raises(ValueError, match="empty parameter list"):
        optim.Lion([])


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Nero", "Lion"])
def test_accumulated_gradients_equal_the_merged_batch(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(12, 4, generator=generator).double(), torch.randn(12, 3, generator=generator).double()
    merged = nn.Linear(4, 3).double()
    parted = copy.deepcopy(merged)
    one, other = (make(name, m.parameters(), clip=0.5) for m in (merged, parted))
    for _ in range(3):
        one.zero_grad()
        other.zero_grad()
        nn.functional.mse_loss(merged(x), y).backward()
        for part in range(3):
            rows = slice(4 * part, 4 * part + 4)
            (nn.functional.mse_loss(parted(x[rows]), y[rows]) / 3).backward()
        one.step()
        other.step()
    for p, q in zip(merged.parameters(), parted.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)  # float64 sums in another order


def test_a_tied_weight_is_one_parameter() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    optimizer = optim.Lion(model.parameters(), lr=0.5)
    before = model[0].weight.detach().clone()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert len(optimizer.param_groups[0]["params"]) == 1 and model[1].weight is model[0].weight
    torch.testing.assert_close((before - model[0].weight.detach()).abs(), torch.full((3, 3), 0.5))  # moved once


def test_transforms_with_options_pickle() -> None:
    w = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    optimizer = optim.Lion([w], lr=0.01, transforms=[functools.partial(quantized, block=64)])
    run(optimizer, [w], 1)
    (twin,), other = pickle.loads(pickle.dumps(([w], optimizer)))
    run(optimizer, [w], 2, start=1)
    run(other, [twin], 2, start=1)
    assert torch.equal(w, twin)


def test_the_effective_learning_rate_of_scale_invariant_weights_is_that_of_the_paper() -> None:
    """Plain gradient descent on f(w / |w|): the gradient is across w, and a step turns it by lr |g| / |w|."""
    w = nn.Parameter(torch.tensor([[3.0, 4.0], [1.0, 2.0]], dtype=torch.float64))
    target = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    ((w / w.norm() - target) ** 2).sum().backward()
    assert w.grad is not None
    told = optim.SGD([("w", w)], lr=0.1).statistics()["w"]["effective_lr"]
    assert told == pytest.approx(0.1 * (w.grad.norm() / w.norm()).item(), rel=1e-12)
    # and at twice the length: the gradient halves, so lr |g| / |w| falls by four, as lr / |w|^2 does
    longer = nn.Parameter(2 * w.detach())
    ((longer / longer.norm() - target) ** 2).sum().backward()
    assert optim.SGD([("w", longer)], lr=0.1).statistics()["w"]["effective_lr"] == pytest.approx(told / 4, rel=1e-12)
