"""AdamW, clipping, decay and schedules against torch's optimizer and the published formulas."""

from __future__ import annotations

import math

import pytest
import torch

from towtank.optim.descend import clip_scale, descend_, member_norms
from towtank.optim.rules import adamw
from towtank.optim.schedules import shape


def test_25_steps_equal_torch_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    param = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    theirs = torch.nn.Parameter(param.clone())
    optimizer = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.1)
    state = adamw.init(param)
    for step in range(1, 26):
        grad = torch.randn(7, 5, generator=generator, dtype=torch.float64)
        theirs.grad = grad.clone()
        optimizer.step()
        descend_(param, adamw.direction_(grad, state, adamw.Hyper(0.8, 0.97, 1e-6), step), 3e-3, 3e-3 * 0.1)
    assert (param - theirs).abs().max() < 1e-14


def test_members_with_their_own_numbers_equal_members_alone() -> None:
    betas = torch.tensor([[0.9], [0.5]], dtype=torch.float64)
    grads = torch.randn(3, 2, 4)
    together = adamw.init(grads[0])
    alone = [adamw.init(grads[0][i]) for i in range(2)]
    for step, grad in enumerate(grads, start=1):
        direction = adamw.direction_(grad.clone(), together, adamw.Hyper(betas, betas**2, 1e-8), step)
        assert direction.dtype == torch.float32
        for i in range(2):
            beta = betas[i].item()
            single = adamw.direction_(grad[i].clone(), alone[i], adamw.Hyper(beta, beta**2, 1e-8), step)
            torch.testing.assert_close(direction[i], single, rtol=3e-7, atol=0)


def test_independent_decay_by_hand() -> None:
    """p <- p - s (eta Delta + lambda p) (Wortsman et al. 2023): decay does not feel the learning rate."""
    p, delta, s, eta, lam = 2.0, 0.5, 0.25, 0.1, 0.01
    ours = descend_(torch.tensor(p), torch.tensor(delta), s * eta, s * lam)
    assert ours.item() == pytest.approx(p - s * (eta * delta + lam * p))


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
