"""GPT-2 and Llama of Hugging Face, in both ways in which they attend, against their own attention weights and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.signals.attention_cases import causal, truth
from tests.state import fingerprint
from tests.worlds import generator
from towtank.problem import Problem
from towtank.signals.capture import Capture, capture, replay
from towtank.signals.output import output
from towtank.signals.step import Step

transformers = pytest.importorskip("transformers")
EPS = torch.finfo(torch.float32).eps
V, W, H, T = 17, 16, 4, 6


def gpt2(way: str) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=W, n_layer=2, n_head=H, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return built(transformers.GPT2LMHeadModel, config, way)


def llama(way: str) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=W,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=H,
        num_key_value_heads=2,
    )
    return built(transformers.LlamaForCausalLM, config, way)


def built(kind, config, way: str) -> nn.Module:
    config._attn_implementation = way
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config).train()
        for p in model.parameters():  # so that attention is not flat
            p.data += 0.2 * torch.randn_like(p)
        return model


def tokens() -> torch.Tensor:
    return torch.randint(V, (3, T), generator=generator(0))


def queries_and_keys(model, ids, padding) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(q, k) (B, H, T, K) of each layer, from the inputs of its attention; eager attention is asked, no hooks of ours."""
    found, inputs = [], []
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    norms = [b.ln_1 if hasattr(b, "ln_1") else b.input_layernorm for b in layers]
    handles = [n.register_forward_hook(lambda m, a, out: inputs.append(out.detach())) for n in norms]
    model(ids, attention_mask=padding)
    [h.remove() for h in handles]
    for block, x in zip(layers, inputs, strict=True):
        if hasattr(block, "attn"):
            q, k, _ = block.attn.c_attn(x).detach().split(W, dim=-1)
            q, k = (t.view(3, T, H, W // H).transpose(1, 2) for t in (q, k))
        else:
            own = block.self_attn
            q = own.q_proj(x).detach().view(3, T, H, -1).transpose(1, 2)
            k = own.k_proj(x).detach().view(3, T, 2, -1).transpose(1, 2)
            cos, sin = model.model.rotary_emb(x, torch.arange(T)[None])
            q, k = (turned(t, cos[:, None], sin[:, None]) for t in (q, k))
            k = k.repeat_interleave(2, dim=1)
        found.append((q, k))
    return found


def turned(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("way", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_attention_and_outputs(make, way, padded):
    model, ids = make(way), tokens()
    padding = torch.ones_like(ids)
    if padded:
        padding[1, -2:] = 0
    looking = Capture(model)
    looking.install()
    out = model(input_ids=ids, attention_mask=padding, labels=ids.masked_fill(padding == 0, -100))
    out.loss.backward()
    looking.remove()
    seen = looking.seen
    names = [f"transformer.h.{i}.attn" if make is gpt2 else f"model.layers.{i}.self_attn" for i in range(2)]
    assert list(seen.attention) == names and not seen.unseen
    visible = causal(T, T) & (padding[:, None, None, :] == 1)
    for name, (q, k) in zip(names, queries_and_keys(model, ids, padding), strict=True):
        z = torch.einsum("bhtd,bhsd->bhts", q.double(), k.double()) / math.sqrt(W // H)
        want, found = truth(z.masked_fill(~visible, -math.inf), q, k), seen.attention[name]
        size = want.q_norm * want.k_norm * 8  # rounding of a logit, and that of the layers before it, which run anew
        assert float(found.max_logit) == pytest.approx(want.max_logit, abs=16 * EPS * size)
        assert float(found.entropy) == pytest.approx(want.entropy, abs=64 * EPS * size)
        assert float(found.q_norm) == pytest.approx(want.q_norm, rel=64 * EPS)
    labels = torch.where(padding == 1, ids, -100)
    assert torch.equal(seen.targets.view(3, T)[:, :-1], labels[:, 1:])  # shifted and padded by the model's loss
    counted = labels[:, 1:] >= 0
    log_z = out.logits.detach()[:, :-1].double().logsumexp(-1)[counted]
    assert float(seen.output.log_z_mean) == pytest.approx(float(log_z.mean()), rel=1e-5)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_entropy_of_the_weights_that_the_model_returns(make):
    model, ids = make("eager"), tokens()
    with torch.no_grad(), capture(model) as seen:
        weights = model(ids, output_attentions=True).attentions
    for p, found in zip(weights, seen.attention.values(), strict=True):
        want = -torch.special.xlogy(p.double(), p.double()).sum(-1).mean()
        assert float(found.entropy) == pytest.approx(float(want), abs=1e-5)


def test_labels_without_the_loss_of_the_model_are_shifted():
    """Rows whose logits are sure, and right, for the next token."""
    model, ids = gpt2("sdpa"), tokens()
    with torch.no_grad():
        model.lm_head.weight.mul_(100)
    looking = Capture(model)
    looking.install()
    z = model(ids).logits.detach()
    looking.remove()
    sure = z[:, :-1].argmax(-1)
    labels = torch.cat([ids[:, :1], sure], 1)
    step = Step(
        number=1, loss=z.sum(), model=model, batch={"input_ids": ids, "labels": labels}, recorded={"seen": looking.seen}
    )
    found = output()(step)
    collapsed = (z - z.amax(-1, keepdim=True)).exp().sum(-1) == 1
    assert 0 < float(found["output/zero_losses"]) == pytest.approx(float(collapsed[:, :-1].float().mean()))


def test_replay_and_checkpointing():
    model, ids = llama("sdpa"), tokens()
    model.gradient_checkpointing_enable()
    looking = Capture(model)
    looking.install()
    model(input_ids=ids, labels=ids).loss.backward()
    looking.remove()
    model.zero_grad()
    before = fingerprint(model)
    again = replay(Problem(model, nn.functional.cross_entropy, {"input_ids": ids, "labels": ids}))
    assert fingerprint(model) == before
    for name, found in looking.seen.attention.items():
        assert float(again.attention[name].max_logit) == pytest.approx(float(found.max_logit), rel=1e-5)
        assert int(found.queries) == 3 * H * T
