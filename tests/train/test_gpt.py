"""The proxy decoder against an independent functional implementation with torch's own attention and complex rotations."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from towtank.losses import z_loss
from towtank.train.models.gpt import GPT


def reference(
    state: dict[str, torch.Tensor], tokens: torch.Tensor, *, depth: int, K: int, qk_norm: bool
) -> torch.Tensor:
    x = F.embedding(tokens, state["embedding.weight"])
    B, T, D = x.shape
    angle = torch.outer(torch.arange(T, dtype=x.dtype), 10_000.0 ** (-torch.arange(0, K, 2, dtype=x.dtype) / K))
    turn = torch.polar(torch.ones_like(angle), angle)

    def rope(z: torch.Tensor) -> torch.Tensor:
        turned = torch.complex(z[..., : K // 2].contiguous(), z[..., K // 2 :].contiguous()) * turn
        return torch.cat((turned.real, turned.imag), -1)

    def norm(z: torch.Tensor, name: str) -> torch.Tensor:
        centred = z - z.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * state[name]

    for i in range(depth):
        p = f"blocks.{i}."
        qkv = norm(x, p + "attention_norm.weight") @ state[p + "attention.qkv.weight"].T
        q, k, v = (part.reshape(B, T, D // K, K).transpose(1, 2) for part in qkv.chunk(3, -1))
        if qk_norm:
            q, k = norm(q, p + "attention.q_norm.weight"), norm(k, p + "attention.k_norm.weight")
        mixed = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True)
        x = x + mixed.transpose(1, 2).reshape(B, T, D) @ state[p + "attention.out.weight"].T
        hidden = norm(x, p + "mlp_norm.weight") @ state[p + "up.weight"].T
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + hidden @ state[p + "down.weight"].T
    return norm(x, "norm.weight") @ state["head.weight"].T


@pytest.mark.parametrize("qk_norm", [True, False])
def test_logits_equal_the_reference(qk_norm: bool) -> None:
    torch.manual_seed(0)
    model = GPT(width=24, depth=3, head_dim=8, vocabulary=50, context=16, qk_norm=qk_norm).double()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(torch.randn_like(p) * 0.3)  # scales other than 1
    tokens = torch.randint(50, (3, 11))
    expected = reference(model.state_dict(), tokens, depth=3, K=8, qk_norm=qk_norm)
    # The rotary table is made in float64 and stored in float32: angles agree to its rounding.
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-5)


def test_no_biases_and_the_scale_of_query_norms_is_shared_by_heads() -> None:
    model = GPT(width=64, head_dim=16)
    names = [n for n, _ in model.named_parameters()]
    assert not [n for n in names if n.endswith("bias")]
    assert model.blocks[0].attention.q_norm.weight.shape == (16,)
    assert sum(p.numel() for p in GPT(width=64, head_dim=16, qk_norm=False).parameters()) == (
        2 * 256 * 64 + 2 * (12 * 64**2 + 2 * 64) + 64
    )


def test_a_token_sees_only_the_past() -> None:
    torch.manual_seed(1)
    model = GPT(width=32, context=10)
    tokens = torch.randint(256, (1, 10))
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 256
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert (difference[:6] == 0).all() and (difference[6:] > 0).all()


def test_initial_standard_deviations() -> None:
    """Embedding N(0, 1/d); matrices truncated at two standard deviations with 1/sqrt(fan_in): sampling error 1/sqrt(2n)."""
    torch.manual_seed(2)
    model = GPT(width=256, depth=1)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            fan_in = 256 if name != "blocks.0.down.weight" else 1024
            assert p.std().item() * fan_in**0.5 == pytest.approx(1, abs=5 / (2 * p.numel()) ** 0.5), name
            if name != "embedding.weight":
                assert p.abs().max().item() * fan_in**0.5 <= 2 / 0.8796 + 1e-4
                assert p.abs().max().item() * fan_in**0.5 > 2.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"width": 48}, "multiple of head_dim"), ({"width": 0}, "multiple"), ({"width": 9, "head_dim": 3}, "even")],
)
def test_impossible_widths_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT(**arguments)


def test_probe_reports_the_largest_logit_and_changes_nothing() -> None:
    torch.manual_seed(3)
    model = GPT(width=32)
    tokens = torch.randint(256, (2, 9))
    probe: dict[str, torch.Tensor] = {}
    assert torch.equal(model(tokens, probe=probe), model(tokens))
    assert sorted(probe) == ["attention_logit_max/block0", "attention_logit_max/block1"]


def test_z_loss_restores_log_z_that_cross_entropy_cannot_see() -> None:
    """Adding a constant to all logits leaves cross-entropy as it is; the penalty's gradient pulls the constant back."""
    logits = torch.randn(5, 7, dtype=torch.float64)
    targets = torch.randint(7, (5,))
    shift = torch.tensor(-20.0, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(F.cross_entropy(logits + shift, targets), F.cross_entropy(logits, targets))
    (slope,) = torch.autograd.grad(z_loss((logits + shift).logsumexp(-1)), shift)
    expected = 2 * torch.logsumexp(logits + shift.detach(), -1).mean()
    torch.testing.assert_close(slope, expected)
    assert slope < 0
