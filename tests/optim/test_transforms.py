"""What may surround a rule: against definitions, derived bounds and runs in float32."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

import towtank.optim as optim
from tests.optim.test_rules import NAMES, OPTIONS, feed, make, random_grads, run, tensors
from towtank.optim.rules import adamw, lion, sgd
from towtank.optim.transforms import orthograd, quantized
from towtank.optim.transforms.low_precision import joined, stochastically
from towtank.optim.transforms.quantized import decode, dynamic_map, encode


def _perpendicular(p: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    """The definition in double: the gradient without its part along the weights, at the gradient's length."""
    p, g = p.double().flatten(), g.double().flatten()
    left = g - (p @ g) / (p @ p) * p
    return left * g.norm() / left.norm()


@pytest.mark.parametrize("name", NAMES)
def test_orthograd_is_the_rule_on_the_perpendicular_gradient(name: str) -> None:
    ours, plain = tensors(torch.float64), tensors(torch.float64)
    wrapped, bare = make(name, ours, transforms=[orthograd]), make(name, plain)
    for t in range(3):
        grads = random_grads(ours, t)
        feed(wrapped, ours, grads)
        feed(bare, plain, grads)
        for p, g in zip(plain, grads, strict=True):
            p.grad = _perpendicular(p.detach(), g).view_as(g)
        wrapped.step()
        bare.step()
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4 if name == "Muon" else 1e-10)  # Muon iterates in bfloat16


def test_orthograd_runs_natively_and_gives_zero_where_nothing_is_left() -> None:
    w, v = nn.Parameter(torch.randn(5, 4, generator=torch.Generator().manual_seed(0))), nn.Parameter(torch.zeros(3))
    u, x = nn.Parameter(w.detach().clone()), nn.Parameter(torch.zeros(3))
    native = optim.AdamW([w, v], lr=0.1, weight_decay=0.0, transforms=[orthograd], engine="native")
    eager = optim.AdamW([u, x], lr=0.1, weight_decay=0.0, transforms=[orthograd], engine="eager")
    run(native, [w, v], 3)
    run(eager, [u, x], 3)
    torch.testing.assert_close(w, u, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(v, x, rtol=1e-5, atol=1e-6)
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = optim.SGD([p], lr=1.0, transforms=[orthograd])
    feed(optimizer, [p], [3 * p.detach()])
    optimizer.step()
    assert p.tolist() == [1.0, 2.0, 3.0]  # rounding noise is not blown up to the gradient's length


def test_orthograd_under_sgd_keeps_the_norm_to_second_order() -> None:
    p = nn.Parameter(torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    before, g = p.detach().square().sum(), torch.randn(20, generator=torch.Generator().manual_seed(1)).double()
    optimizer = optim.SGD([p], lr=0.1, transforms=[orthograd])
    feed(optimizer, [p], [g])
    optimizer.step()
    assert p.detach().square().sum().item() == pytest.approx((before + 0.01 * g.square().sum()).item(), rel=1e-12)


@pytest.mark.parametrize("signed", [True, False])
def test_8_bit_error_is_within_half_a_gap_of_the_map(signed: bool) -> None:
    table = dynamic_map(signed).double()
    assert len(table) == 256 and table.max() == 1 and (table == 0).any() and (table.diff() >= 0).all()
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    x = x * 10 ** (-6 * torch.rand(5000, generator=torch.Generator().manual_seed(1)))  # over the map's decades
    x = x if signed else x.abs()
    block = 96  # does not divide 5000
    codes, scales = encode(x, block, signed)
    back = decode(codes, scales, (5000,), block, signed)
    absmax = torch.stack([b.abs().max() for b in x.split(block)])
    assert torch.equal(scales, absmax)
    unit = (x / absmax.repeat_interleave(block)[:5000]).double()
    above = torch.searchsorted(table, unit).clamp(1, 255)
    # nearest entry: within half the gap it falls into, and below the least entry (signed: no -1) within the rest
    bound = torch.maximum((table[above] - table[above - 1]) / 2, table[0] - unit)
    error = (back.double() / absmax.double().repeat_interleave(block)[:5000] - unit).abs()
    assert (error <= bound + 3e-7).all()  # three float32 roundings of numbers up to 1
    # decade e of 7: 2^e or 2^(e + 1) values over 0.9 of it, so at worst half of 0.9 / 64 (signed) or 0.9 / 128
    assert error.max() <= 0.5 * 0.9 / (64 if signed else 128) + 3e-7


def test_the_map_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        theirs = functional.create_dynamic_map(signed=signed)
        assert (dynamic_map(signed) - theirs).abs().max() <= 2**-24  # theirs is computed in float32


def test_large_matrices_are_kept_in_8_bit_and_the_rest_in_32() -> None:
    big, small, table, bias = (torch.zeros(s) for s in ((64, 65), (63, 65), (128, 64), (5000,)))
    params = {"matrix": [big, small], "embedding": [table], "vector": [bias]}
    rule = quantized(adamw.RULE, block=256)
    kept = [rule.init(p, role, adamw.Hyper()) for role, ps in params.items() for p in ps]
    assert [isinstance(s, adamw.State) for s in kept] == [False, True, True, True]
    packed = kept[0]
    assert packed.m_codes.dtype == packed.v_codes.dtype == torch.uint8 and packed.m_codes.shape == big.shape
    assert packed.m_scales.shape == (17,)  # ceil(4160 / 256)
    stored = sum(t.numel() * t.element_size() for t in packed)
    assert stored / big.numel() == pytest.approx(2 * (1 + 4 / 256), rel=0.01)
    with pytest.raises(ValueError, match="sophia-g: 8-bit state needs an elementwise rule"):
        quantized(optim.rule_of("SophiaG"))


def test_8_bit_adamw_follows_adamw() -> None:
    """Moments are 8 bit, so a step is off by the map's relative gap at most; over steps of fresh noise that averages."""
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(80, 64, generator=generator))
    v, target = nn.Parameter(w.detach().clone()), torch.randn(80, 64, generator=generator)
    exact = optim.AdamW([w], lr=0.05, weight_decay=0.0)
    short = optim.AdamW([v], lr=0.05, weight_decay=0.0, transforms=[quantized])
    first = (w.detach() - target).square().mean().item()
    for _ in range(150):
        for p, optimizer in ((w, exact), (v, short)):
            p.grad = p.detach() - target
            optimizer.step()
    ends = [(p.detach() - target).square().mean().item() for p in (w, v)]
    assert ends[1] < 0.01 * first and abs(ends[1] - ends[0]) < 0.01 * first


def test_stochastic_rounding_is_unbiased_and_takes_neighbours_only() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, generator=generator)
    draws = torch.stack([stochastically(x, generator).float() for _ in range(2000)])
    bits = x.view(torch.int32) & -65536
    low = bits.view(torch.float32)
    high = (bits + 65536).view(torch.float32)  # the next bfloat16 away from zero
    assert ((draws == low) | (draws == high)).all()
    share = ((x - low) / (high - low)).double()  # the probability of the far neighbour
    seen = (draws == high).double().mean(0)
    assert ((seen - share).abs() <= 5 * (share * (1 - share) / 2000).sqrt() + 1e-9).all()  # 200 draws at 5 sigma: 1e-4
    exact = torch.tensor([0.0, 1.0, -2.5, float("inf"), -float("inf")])
    assert torch.equal(stochastically(exact, generator).float(), exact)
    assert stochastically(torch.tensor([float("nan")]), generator).isnan().all()


def test_steps_too_small_for_bfloat16_move_it_on_average_and_exactly_with_a_low_word() -> None:
    """A hundred steps of 1e-5 from 1.0, whose neighbours are 2^-8 below and 2^-7 above."""
    ends = {}
    for rounding in ("nearest", "stochastic", "compensated"):
        p = nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
        optimizer = optim.Lion([p], lr=1e-5, rounding=rounding)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends[rounding] = p.detach(), optimizer.state[p].get("low")
    assert (ends["nearest"][0] == 1).all()
    # each number has taken about a quarter of a jump of 2^-8: variance of the mean below 100 * 1e-5 * 2^-8 / 4000
    error = (100 * 1e-5 * 2**-8 / 4000) ** 0.5
    assert abs(ends["stochastic"][0].double().mean().item() - (1 - 1e-3)) < 5 * error
    exact = joined(*ends["compensated"])
    assert (exact.double() - (1 - 1e-3)).abs().max() < 100 * 2**-24  # a hundred roundings of float32 below 1


@pytest.mark.parametrize("decay", ["decoupled", "coupled", "independent"])
@pytest.mark.parametrize("name", ["AdamW", "Lion", "SGD", "SGDSaI", "Nero", "AdaHessian"])
def test_a_compensated_pair_is_a_float32_run_bit_by_bit(name: str, decay: str) -> None:
    pair = tensors(torch.bfloat16)
    master = [nn.Parameter(p.detach().float()) for p in pair]
    options = {"lr": 1e-3, "weight_decay": 0.1, "decay": decay, "clip_each": 1.0, "engine": "eager"}
    ours, exact = make(name, pair, rounding="compensated", **options), make(name, master, **options)
    with torch.no_grad():  # Nero prepares weights in their own precision
        for p, q in zip(pair, master, strict=True):
            q.copy_(p)
    for t in range(6):
        grads = random_grads(pair, t)
        feed(ours, pair, grads)
        feed(exact, master, [g.float() for g in grads])
        ours.step()
        exact.step()
    for p, q in zip(pair, master, strict=True):
        assert torch.equal(joined(p.detach(), ours.state[p]["low"]), q)
        assert p.dtype == torch.bfloat16 and ours.state[p]["low"].dtype == torch.int16


def test_decay_in_nearest_rounding_is_part_of_the_float32_step() -> None:
    """The step is rounded once: 1 - 2^-9 - 2^-9 is a bfloat16, each part of it alone is lost."""
    p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    optimizer = optim.Lion([p], lr=2**-9, weight_decay=1.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p.item() == 1 - 2**-8


def test_float16_pairs_hold_what_a_float16_cannot() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = optim.Lion([p], lr=1e-5, rounding="compensated")
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    exact = joined(p.detach(), optimizer.state[p]["low"])
    assert (exact.double() - (1 - 1e-3)).abs().max() < 100 * 2**-23  # the pair has 22 bits


def test_stochastic_rounding_refuses_other_types_than_bfloat16() -> None:
    p = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = optim.Lion([p], rounding="stochastic")
    p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match="expected bfloat16 parameters, got torch.float16; use compensated"):
        optimizer.step()


def test_transforms_compose_the_first_innermost() -> None:
    start = torch.randn(70, 64, generator=torch.Generator().manual_seed(0))
    p, q = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    chain = [functools.partial(quantized, block=128), orthograd]
    both = optim.AdamW([p], lr=0.01, weight_decay=0.0, transforms=chain)
    inner = optim.AdamW([q], lr=0.01, weight_decay=0.0, transforms=chain[:1])
    for t in range(3):
        (g,) = random_grads([p], t)
        feed(both, [p], [g])
        feed(inner, [q], [_perpendicular(q.detach(), g).view_as(q).float()])
        both.step()
        inner.step()
    assert both.state[p]["m_codes"].dtype == torch.uint8
    # the same gradients up to float32 rounding, which may turn a code by one gap of the map, 2% of a step
    assert (p - q).abs().max() < 0.02 * 0.01 * 3 * 2
    with pytest.raises(ValueError, match="8-bit state needs an elementwise rule"):
        optim.AdamW([q], transforms=chain[::-1])


def test_transforms_leave_the_rule_alone() -> None:
    before = copy.copy(lion.RULE.__dict__)
    assert orthograd(lion.RULE) is orthograd(lion.RULE) and orthograd(lion.RULE) is not lion.RULE
    assert lion.RULE.__dict__ == before and orthograd(sgd.RULE).name == "orthograd(sgd)"
    assert set(OPTIONS) <= set(NAMES)
