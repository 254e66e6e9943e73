"""AdamW, clipping, decay and schedules against torch's optimizer and the published formulas."""

from __future__ import annotations

import math

import pytest
import torch

from towtank.optim.clip import clip_scale, member_norms
from towtank.optim.engine import Surround, Work, advance
from towtank.optim.members import Members
from towtank.optim.rules import adamw
from towtank.optim.schedules import shape

ENGINES = ("native", "eager")


@pytest.mark.parametrize("engine", ENGINES)
def test_25_steps_equal_torch_in_float64(engine: str) -> None:
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    theirs = torch.nn.Parameter(param.clone())
    optimizer = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.1)
    hyper = adamw.Hyper(3e-3, 0.8, 0.97, 1e-6)
    state = adamw.init(param, "matrix", hyper)
    for step in range(1, 26):
        grad = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        theirs.grad = grad.clone()
        optimizer.step()
        around = Surround.of("decoupled", 0.1, 3e-3, 1.0, 1.0)
        advance(adamw.RULE, [Work(param, grad, state)], hyper, step, around, engine=engine)
    assert (param - theirs).abs().max() < 1e-14


@pytest.mark.parametrize("native", [True, False])
def test_members_with_their_own_numbers_equal_members_alone(native: bool) -> None:
    columns = adamw.Hyper(*torch.tensor([[0.1, 0.01], [0.9, 0.5], [0.81, 0.25], [1e-8, 1e-6]], dtype=torch.float64))
    grads = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    start = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    together = {"w": start.clone()}
    members = Members(adamw.RULE, together, {"w": "vector"}, columns)
    members._native = members._native and native
    alone = [start[e].clone() for e in range(2)]
    states = [adamw.init(p, "vector", columns) for p in alone]
    for step, grad in enumerate(grads, start=1):
        members.advance({"w": grad}, lambda name, hyper: (hyper, Surround(shrink=0.01)), torch.ones(2) > 0)
        for e in range(2):
            hyper = adamw.Hyper(*(c[e].item() for c in columns))
            work = Work(alone[e], grad[e], states[e])
            advance(adamw.RULE, [work], hyper, step, Surround(shrink=0.01), engine="eager")
            torch.testing.assert_close(together["w"][e], alone[e], rtol=1e-6, atol=1e-7)  # a few roundings of float32


def test_a_member_that_does_not_move_keeps_parameter_and_state() -> None:
    for native in (True, False):
        params = {"w": torch.ones(2, 3)}
        members = Members(adamw.RULE, params, {"w": "vector"}, adamw.Hyper(*torch.full((4, 2), 0.5).double()))
        members._native = members._native and native
        grads = {"w": torch.tensor([[1.0, 2.0, 3.0], [math.nan, 1.0, 1.0]])}
        members.advance(grads, lambda name, hyper: (hyper, Surround()), torch.tensor([True, False]))
        assert (params["w"][0] < 1).all() and (params["w"][1] == 1).all()
        assert (members.state["w"].m[1] == 0).all()


def test_independent_decay_by_hand() -> None:
    """p <- p - s (eta Delta + lambda p) (Wortsman et al. 2023): decay does not feel the learning rate."""
    s, eta, lam = 0.25, 0.1, 0.01
    for engine in ENGINES:
        param, hyper = torch.tensor([2.0]), adamw.Hyper(s * eta, 0.9, 0.99, 0.0)
        around = Surround.of("independent", lam, s * eta, s, 1.0)
        work = Work(param, torch.tensor([0.3]), adamw.init(param, "vector", hyper))
        advance(adamw.RULE, [work], hyper, 1, around, engine=engine)
        assert param.item() == pytest.approx(2.0 - s * (eta * 1.0 + lam * 2.0))


def test_clipping_equals_torchs() -> None:
    grads = [torch.randn(3, 4, 5), torch.randn(3, 6) * 4]
    scale = clip_scale(member_norms(grads), torch.tensor([1.0, 0.1, 1e9]))
    for member, largest in enumerate((1.0, 0.1, 1e9)):
        params = [torch.nn.Parameter(torch.zeros_like(g[member])) for g in grads]
        for p, g in zip(params, grads, strict=True):
            p.grad = g[member].clone()
        torch.nn.utils.clip_grad_norm_(params, largest)
        for p, g in zip(params, grads, strict=True):
            torch.testing.assert_close(g[member] * scale[member], p.grad)


def test_infinite_clip_is_no_clip() -> None:
    assert clip_scale(torch.tensor([1e30]), torch.tensor([math.inf])).item() == 1


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 10, 97])
def test_schedules_stay_in_range_rise_then_never_rise(kind: str, steps: int) -> None:
    values = [shape(s, steps, kind=kind, warmup=0.2, final=0.1) for s in range(steps)]
    rise = round(0.2 * steps)
    assert all(0 < v <= 1 for v in values)
    assert values[:rise] == pytest.approx([(i + 1) / rise for i in range(rise)])
    assert all(a >= b - 1e-12 for a, b in zip(values[rise:], values[rise + 1 :], strict=False))


def test_schedule_values_by_hand() -> None:
    assert [shape(s, 4, kind="linear", warmup=0) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [shape(s, 4, kind="cosine", warmup=0, final=0.5) for s in range(4)] == pytest.approx(
        [1, 0.5 + 0.5 * (1 + 0.5**0.5) / 2, 0.75, 0.5 + 0.5 * (1 - 0.5**0.5) / 2]
    )
    assert [shape(s, 10, kind="wsd", warmup=0.1, decay_share=0.5) for s in range(10)] == pytest.approx(
        [1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]
    )
    # torch's own scheduler, without warm-up
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for step in range(8):
        assert shape(step, 8, warmup=0) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_bad_schedules_are_refused() -> None:
    with pytest.raises(ValueError, match="cosine"):
        shape(0, 10, kind="square", warmup=0)
    with pytest.raises(ValueError, match="0 <= step < 10"):
        shape(10, 10)
