"""Attention logits of hand-written, fused and library attention, against brute force."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

from tests.signals import attention_cases as cases
from tests.signals.attention_cases import ByHand, D, H, K, T, by_hand, causal, inputs
from tests.worlds import generator
from towtank.signals.attention import attention
from towtank.signals.attention_stats import Attention
from towtank.signals.capture import capture
from towtank.signals.step import Step

EPS = torch.finfo(torch.float32).eps


def agree(found: Attention, want: cases.Truth, eps: float = EPS) -> None:
    """To the rounding of a logit, which is eps times the sum of the magnitudes of its terms."""
    size = want.q_norm * want.k_norm * 4
    assert float(found.max_logit) == pytest.approx(want.max_logit, abs=8 * eps * size)
    assert float(found.entropy) == pytest.approx(want.entropy, abs=32 * eps * size)
    assert float(found.q_norm) == pytest.approx(want.q_norm, rel=8 * eps)
    assert float(found.k_norm) == pytest.approx(want.k_norm, rel=8 * eps)


def seen_of(model: nn.Module, *args, **kwargs):
    with capture(model) as seen:
        model(*args, **kwargs)
    return seen


def only(seen) -> Attention:
    (found,) = seen.attention.values()
    return found


FREE = {
    "plain": cases.plain,
    "einsum": cases.summed,
    "bmm": cases.batched,
    "transposed": cases.transposed,
    "fused": cases.fused(),
}
CAUSAL = {
    "-inf": cases.masked_by(-math.inf),
    "-1e9": cases.masked_by(-1e9),
    "added finfo.min": cases.added(torch.finfo(torch.float32).min),
    "added -1e4": cases.added(-1e4),
    "where": cases.chosen,
    "fused causal": cases.fused(is_causal=True),
    "fused bool": cases.fused(attn_mask=causal(T, T)),
    "fused float": cases.fused(attn_mask=torch.zeros(T, T).masked_fill(~causal(T, T), -1e4)),
    "fused bias object": cases.fused(attn_mask=causal_upper_left(T, T)),
    "fused lower right": cases.fused(attn_mask=causal_lower_right(T, T)),
}


@pytest.mark.parametrize("name", [*FREE, *CAUSAL])
@pytest.mark.parametrize("graded", [True, False])
def test_attention_written_out_and_fused(name, graded):
    model = ByHand({**FREE, **CAUSAL}[name])
    x = inputs()
    with torch.set_grad_enabled(graded):
        found = only(seen_of(model, x))
    q, k, _ = model.parts(x)
    scaled = K**-0.5 if name.startswith("added") else 1.0  # there q is scaled before the product
    want = by_hand(q.detach() * scaled, k.detach(), scale=K**-0.5 / scaled, mask=None if name in FREE else causal(T, T))
    agree(found, want)


def test_a_bias_is_part_of_the_logit():
    slope = -0.5 * (torch.arange(T)[:, None] - torch.arange(T)).abs().float()  # ALiBi
    x = inputs(1)

    def write(q, k, v):
        return (q @ k.mT / K**0.5 + slope).softmax(-1) @ v

    for way in (write, cases.fused(attn_mask=slope)):
        model = ByHand(way)
        q, k, _ = model.parts(x)
        agree(only(seen_of(model, x)), by_hand(q.detach(), k.detach(), bias=slope.double()))


def test_scales_and_grouped_queries():
    q, k = (torch.randn(2, h, 5, 4, generator=generator(h)) for h in (6, 2))

    class Grouped(nn.Module):
        def forward(self, q, k):
            return F.scaled_dot_product_attention(q, k, k, scale=0.7, enable_gqa=True, is_causal=True)

    want = by_hand(q, k.repeat_interleave(3, dim=1), scale=0.7, mask=causal(5, 5))
    agree(only(seen_of(Grouped(), q, k)), want)


class Plain(nn.Module):
    """Attention of what it is given."""

    def forward(self, q, k):
        return cases.plain(q, k, k)


@pytest.mark.parametrize("factor", [1.0, 10.0, 300.0])
def test_planted_size_of_the_largest_logit(factor):
    """One query and one key are known, all others are 0."""
    q, k = torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    q[..., 2, 1], k[..., 3, 1] = factor, 2 * factor
    found = only(seen_of(Plain(), q, k))
    assert float(found.max_logit) == pytest.approx(2 * factor**2 / K**0.5, rel=4 * EPS)
    assert float(found.q_norm) == pytest.approx(factor / 2)  # RMS over four positions, one of which counts


def test_attention_outside_of_the_model_does_not_count():
    model = ByHand(cases.fused())
    with capture(model) as seen:
        cases.plain(*[inputs()] * 3)
    assert not seen.attention


def test_chunks_change_nothing(monkeypatch):
    model, x = ByHand(cases.fused(attn_mask=torch.randn(2, 1, T, T, generator=generator(0)))), inputs(2)
    whole = only(seen_of(model, x))
    for room in (1, 20, 60):
        monkeypatch.setattr("towtank.signals.attention_stats._CHUNK", {"cpu": room})
        parts = only(seen_of(model, x))
        assert float(parts.max_logit) == pytest.approx(float(whole.max_logit), rel=4 * EPS)
        assert float(parts.entropy) == pytest.approx(float(whole.entropy), rel=64 * EPS)
        assert int(parts.queries) == int(whole.queries) == 2 * H * T


def test_queries_without_a_key_count_for_nothing():
    hidden = torch.ones(T, T, dtype=torch.bool)
    hidden[3] = False  # sees nothing
    x = inputs(3)

    def write(q, k, v):
        return (q @ k.mT / K**0.5).masked_fill(~hidden, -1e9).softmax(-1) @ v

    for way in (write, cases.fused(attn_mask=hidden)):
        model = ByHand(way)
        q, k, _ = model.parts(x)
        found = only(seen_of(model, x))
        agree(found, by_hand(q.detach(), k.detach(), mask=hidden))
        assert int(found.queries) == 2 * H * (T - 1)


def test_what_is_not_finite_shows():
    x = inputs()
    x[0, 0, 0] = torch.nan
    for way in (cases.plain, cases.fused()):
        assert math.isnan(float(only(seen_of(ByHand(way), x)).max_logit))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model, x = ByHand(cases.fused(is_causal=True)).to(dtype), inputs(size=1.0).to(dtype)
    q, k, _ = model.parts(x)
    agree(only(seen_of(model, x)), by_hand(q.detach(), k.detach(), mask=causal(T, T)))  # products are in float32


def test_float64_is_measured_in_float64():
    model, x = ByHand(cases.plain).double(), inputs().double()
    q, k, _ = model.parts(x)
    agree(only(seen_of(model, x)), by_hand(q.detach(), k.detach()), torch.finfo(torch.float64).eps)


# What is no attention


class Router(nn.Module):
    """A softmax of an output, one of a gate that mixes experts, and a learned table that is looked up: no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.weight = nn.Linear(D, 3), nn.Parameter(torch.randn(D, D))

    def forward(self, x):
        mixed = torch.einsum("bte,btec->btc", self.gate(x).softmax(-1), x[..., None, :].expand(-1, -1, 3, -1))
        table = (x @ self.weight.T).softmax(-1) @ self.weight
        return ((mixed + table) @ x.mT).softmax(-1)


def test_other_softmaxes_are_not_attention():
    seen = seen_of(Router(), inputs())
    assert not seen.attention
    assert attention()(Step(number=1, loss=torch.tensor(0.0), model=Router(), recorded={"seen": seen})) == {}


def test_attention_that_is_not_seen_is_told():
    class FlashAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(D, D)

        def forward(self, x):
            z = self.proj(x) @ x.mT
            e = (z - z.amax(-1, keepdim=True)).exp()  # a softmax of its own
            return (e / e.sum(-1, keepdim=True)) @ x

    seen = seen_of(nn.Sequential(FlashAttention()), inputs())
    assert not seen.attention and any("attention logits of 0" in text for text in seen.unseen)


# PyTorch's own


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "padding", "both", "causal"])
@pytest.mark.parametrize("kind", ["self", "cross", "bias", "zero"])
def test_multi_head_attention(weights, batch_first, masks, kind):
    own = {"cross": {"kdim": 3, "vdim": 5}, "bias": {"add_bias_kv": True}, "zero": {"add_zero_attn": True}}.get(
        kind, {}
    )
    model = nn.MultiheadAttention(D, H, batch_first=batch_first, **own)
    x = inputs()
    key = torch.randn(2, T, 3, generator=generator(1)) if kind == "cross" else x
    value = torch.randn(2, T, 5, generator=generator(2)) if kind == "cross" else x
    hidden, padding = ~causal(T, T), torch.zeros(2, T, dtype=torch.bool)
    padding[1, -2:] = True
    bias = torch.randn(T, T, generator=generator(3))
    options = {
        "none": {},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": bias},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": hidden, "key_padding_mask": padding},
        "causal": {"attn_mask": hidden, "is_causal": True},
    }[masks]
    given = [t if batch_first else t.transpose(0, 1) for t in (x, key, value)]
    found = only(seen_of(model, *given, need_weights=weights, **options))

    q, k = projections(model, x, key)
    z = torch.einsum("bthd,bshd->bhts", q, k) * K**-0.5
    z[..., :T] += bias if masks == "float" else 0
    shut = torch.zeros(2, 1, T, T, dtype=torch.bool)
    shut = shut | (hidden if masks in ("bool", "both", "causal") else False)
    shut = shut | (padding[:, None, None] if masks in ("padding", "both") else False)
    z[..., :T] = z[..., :T].masked_fill(shut, -math.inf)
    agree(found, cases.truth(z, q, k))


def projections(model: nn.MultiheadAttention, x, key):
    """q and k (B, T, H, K) in float64 from the weights."""
    if model.in_proj_weight is None:
        W_q, W_k = model.q_proj_weight, model.k_proj_weight
    else:
        W_q, W_k = model.in_proj_weight[:D], model.in_proj_weight[D : 2 * D]
    b_q, b_k = model.in_proj_bias[:D], model.in_proj_bias[D : 2 * D]
    q = x.double() @ W_q.detach().double().T + b_q.detach().double()
    k = key.double() @ W_k.detach().double().T + b_k.detach().double()
    if model.bias_k is not None:
        k = torch.cat([k, model.bias_k.detach().double().expand(2, 1, D)], 1)
    if model.add_zero_attn:
        k = torch.cat([k, torch.zeros(2, 1, D, dtype=torch.float64)], 1)
    return q.view(2, T, H, K), k.view(2, -1, H, K)


def test_multi_head_attention_without_a_batch():
    model, x = nn.MultiheadAttention(D, H), inputs()[0]
    q, k = projections(model, x[None].expand(2, T, D), x[None].expand(2, T, D))
    mask = torch.zeros(T, dtype=torch.bool)
    mask[0] = True
    z = torch.einsum("bthd,bshd->bhts", q, k)[:1] * K**-0.5
    z[..., 0] = -math.inf
    agree(only(seen_of(model, x, x, x, key_padding_mask=mask)), cases.truth(z, q, k))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_layer(training, norm_first):
    """In evaluation PyTorch would take its fused path; under hooks it takes the plain one, and attention is seen."""
    layer = nn.TransformerEncoderLayer(D, H, 16, dropout=0.0, batch_first=True, norm_first=norm_first).train(training)
    x = inputs()
    with torch.no_grad():
        plain = layer(x)
        with capture(layer) as seen:
            watched = layer(x)
        source = layer.norm1(x) if norm_first else x
    assert torch.allclose(plain, watched, atol=1e-5)
    q, k = projections(layer.self_attn, source, source)
    agree(seen.attention["self_attn"], cases.truth(torch.einsum("bthd,bshd->bhts", q, k) * K**-0.5, q, k))
    assert not seen.unseen


# The probe


def test_readings():
    model = nn.Sequential(ByHand(cases.plain), ByHand(cases.fused()))
    a, b = inputs(0), inputs(1)
    with capture(model) as seen:
        model(a), model(b)
    found = attention()(Step(number=1, loss=torch.tensor(0.0), model=model, recorded={"seen": seen}))
    names = {f"attention/{what}/{i}" for what in ("max_logit", "entropy", "q_norm", "k_norm") for i in "01"}
    assert set(found) == names | {"attention/max_logit"}
    want = [by_hand(*(t.detach() for t in model[0].parts(x)[:2])) for x in (a, b)]
    assert float(found["attention/max_logit/0"]) == pytest.approx(max(w.max_logit for w in want), rel=1e-5)
    assert float(found["attention/entropy/0"]) == pytest.approx(sum(w.entropy for w in want) / 2, rel=1e-5)
    assert float(found["attention/max_logit"]) == max(float(found[f"attention/max_logit/{i}"]) for i in "01")
