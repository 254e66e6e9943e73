"""Small networks of every kind of layer, each with a loss and a batch, for tests of operators.

`case.make()` gives the same (model, loss, batch) every time, in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A network to differentiate.

    Args:
        name: of the layer it is there for.
        build: the network; called with the global generator seeded and put back.
        batch: the data, drawn likewise.
        loss: mean loss of outputs and targets.
        smooth: whether the gradient has no kinks, so that finite differences may take long steps.
        options: keyword arguments of the problem.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: Callable[..., Tensor] = F.cross_entropy
    smooth: bool = True
    options: dict[str, Any] = field(default_factory=dict)

    def make(self) -> tuple[nn.Module, Callable[..., Tensor], Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = self.build()
            for p in model.parameters():  # away from ones and zeros, where terms vanish
                p.data += 0.1 * torch.randn_like(p)
            return model.train(self.options.get("mode") == "train"), self.loss, self.batch()


def vectors(classes: int = 3, width: int = 5) -> Callable[[], Any]:
    return lambda: (torch.randn(6, width), torch.randint(classes, (6,)))


def images() -> Any:
    return torch.randn(4, 2, 6, 6), torch.randint(3, (4,))


def series() -> Any:
    return torch.randn(4, 7, 5), torch.randint(3, (4,))


def tokens() -> Any:
    return torch.randint(11, (3, 6)), torch.randint(11, (3, 6))


def per_token(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Tied(nn.Module):
    """Embedding whose weight is the head's too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(ids))))


class Attention(nn.Module):
    """One causal head, by an explicit softmax or by `scaled_dot_product_attention`."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(5, 24)
        self.head = nn.Linear(8, 3)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            y = (q @ k.transpose(-1, -2) / 2).masked_fill(later, float("-inf")).softmax(-1) @ v
        return self.head(y.transpose(1, 2).flatten(2).mean(1))


class Recurrent(nn.Module):
    """A recurrent layer and a head on its last state."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(5, 4, num_layers=2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class Multihead(nn.Module):
    """`nn.MultiheadAttention` and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True, dropout=0.1)
        self.into, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        return self.head(self.inner(x, x, x, need_weights=False)[0].mean(1))


class Residual(nn.Module):
    """Two convolutions around which the input passes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.inner = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU())
        self.last = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.last(self.inner(x))).mean((2, 3)))


def mlp(*middle: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(5, 6), *[make() for make in middle], nn.Linear(6, 3))


def conv(*middle: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), *[make() for make in middle], nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
    )


def embedded(*middle: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Embedding(11, 4), *[make() for make in middle], nn.Linear(4, 11))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = dict(vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=8)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=8)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=0))


def padded() -> dict[str, Tensor]:
    ids = torch.randint(11, (3, 6))
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def bce(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(targets, 3).to(logits.dtype))


CASES = [
    Case("linear", lambda: nn.Linear(5, 3), vectors()),
    Case("tanh", mlp(nn.Tanh), vectors()),
    Case("relu", mlp(nn.ReLU), vectors(), smooth=False),
    Case("silu", mlp(nn.SiLU), vectors(), loss=bce),
    Case("gelu", mlp(nn.GELU), vectors()),
    Case("squared", mlp(nn.Tanh), lambda: (torch.randn(6, 5), torch.randn(6, 3)), loss=F.mse_loss),
    Case("conv1d", lambda: nn.Sequential(nn.Conv1d(7, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(9, 3)), series),
    Case("conv2d", conv(), images),
    Case("embedding", embedded(nn.Tanh), tokens, loss=per_token),
    Case("tied", Tied, tokens, loss=per_token),
    Case("layernorm", mlp(lambda: nn.LayerNorm(6), nn.Tanh), vectors()),
    Case("rmsnorm", mlp(lambda: nn.RMSNorm(6), nn.SiLU), vectors()),
    Case("groupnorm", conv(lambda: nn.GroupNorm(2, 4)), images),
    Case("batchnorm_eval", conv(lambda: nn.BatchNorm2d(4)), images),
    Case("batchnorm_train", conv(lambda: nn.BatchNorm2d(4)), images, options={"mode": "train"}),
    Case("dropout_off", mlp(nn.Tanh, lambda: nn.Dropout(0.5)), vectors()),
    Case("softmax_attention", lambda: Attention(fused=False), series),
    Case("sdpa", lambda: Attention(fused=True), series),
    Case("lstm", lambda: Recurrent(nn.LSTM), series),
    Case("gru", lambda: Recurrent(nn.GRU), series),
    Case("multihead", Multihead, series),
    Case("residual", Residual, images, smooth=False),
    Case("gpt2", gpt2, padded),
    Case("llama", llama, padded),
]
BY_NAME = {case.name: case for case in CASES}
