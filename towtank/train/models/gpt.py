"""Decoder-only transformer of the small-scale-proxies recipe (Wortsman et al. 2023, section 2.1).

Pre-LayerNorm, no biases, rotary positions, GELU MLP of width 4d, untied head, fixed head dimension, optional per-head
query-key LayerNorm. Embedding N(0, 1/d); every other matrix truncated normal with standard deviation 1/sqrt(fan_in).

Shapes: B batch, T positions, D width, H heads, K head dimension, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYER_NORM_EPS = 1e-6
ROTARY_BASE = 10_000.0
# Standard deviation of a unit normal cut off at +-2, so that the cut-off draw can be scaled back to the wanted one.
TRUNCATED_STD = 0.87962566103423978


class GPT(nn.Module):
    """Next-token model: tokens (B, T) -> logits (B, T, V).

    Args:
        width: D, a multiple of `head_dim`.
        depth: number of blocks.
        head_dim: K; the number of heads is D / K.
        vocabulary: V.
        context: longest sequence.
        qk_norm: LayerNorm over each head's query and key, scale shared by the heads.

    Raises:
        ValueError: if the width is not a multiple of the head dimension, or the head dimension is odd.

    Example:
        >>> model = GPT(width=32, depth=1)
        >>> model(torch.zeros(2, 5, dtype=torch.long)).shape
        torch.Size([2, 5, 256])
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor

    def __init__(
        self,
        *,
        width: int,
        depth: int = 2,
        head_dim: int = 32,
        vocabulary: int = 256,
        context: int = 64,
        qk_norm: bool = True,
    ) -> None:
        super().__init__()
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim = {head_dim}: expected an even number (rotary positions turn pairs)")
        if width < head_dim or width % head_dim:
            raise ValueError(f"width = {width}: expected a multiple of head_dim = {head_dim}")
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, head_dim, qk_norm) for _ in range(depth))
        self.norm = nn.LayerNorm(width, LAYER_NORM_EPS, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        cos_TK, sin_TK = rotary(context, head_dim)
        self.register_buffer("cos", cos_TK, persistent=False)
        self.register_buffer("sin", sin_TK, persistent=False)
        self.register_buffer("mask", torch.full((context, context), -torch.inf).triu(1), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the recipe's initialization from torch's default generator."""
        nn.init.normal_(self.embedding.weight, std=self.embedding.embedding_dim**-0.5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5 / TRUNCATED_STD
                nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, tokens_BT: Tensor, probe: dict[str, Tensor] | None = None) -> Tensor:
        """Logits; with a `probe`, also put into it the largest attention logit of each block."""
        T = tokens_BT.shape[-1]
        positions = self.cos[:T], self.sin[:T], self.mask[:T, :T]
        x_BTD = self.embedding(tokens_BT)
        for index, block in enumerate(self.blocks):
            x_BTD, logit_max = block(x_BTD, *positions, probe is not None)
            if probe is not None:
                probe[f"attention_logit_max/block{index}"] = logit_max
        return self.head(self.norm(x_BTD))


class Block(nn.Module):
    """Attention and MLP, each on a normalized copy and added back."""

    def __init__(self, width: int, head_dim: int, qk_norm: bool) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, LAYER_NORM_EPS, bias=False)
        self.attention = Attention(width, head_dim, qk_norm)
        self.mlp_norm = nn.LayerNorm(width, LAYER_NORM_EPS, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, probing: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The block's output and, if probing, its largest attention logit."""
        attended_BTD, logit_max = self.attention(self.attention_norm(x_BTD), cos, sin, mask, probing)
        x_BTD = x_BTD + attended_BTD
        return x_BTD + self.down(F.gelu(self.up(self.mlp_norm(x_BTD)))), logit_max


class Attention(nn.Module):
    """Causal softmax attention with logits q.k / sqrt(K)."""

    def __init__(self, width: int, head_dim: int, qk_norm: bool) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.q_norm = nn.LayerNorm(head_dim, LAYER_NORM_EPS, bias=False) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(head_dim, LAYER_NORM_EPS, bias=False) if qk_norm else nn.Identity()

    def forward(
        self, x_BTD: Tensor, cos_TK: Tensor, sin_TK: Tensor, mask_TT: Tensor, probing: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The attention's output and, if probing, its largest logit."""
        B, T, D = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, 3, D // self.head_dim, self.head_dim)
        q_BHTK, k_BHTK, v_BHTK = qkv.permute(2, 0, 3, 1, 4)
        q_BHTK = rotate(self.q_norm(q_BHTK), cos_TK, sin_TK) * self.head_dim**-0.5
        k_BHTK = rotate(self.k_norm(k_BHTK), cos_TK, sin_TK)
        logits_BHTT = q_BHTK @ k_BHTK.transpose(-1, -2) + mask_TT
        logit_max = logits_BHTT.detach().amax() if probing else None
        mixed_BHTK = logits_BHTT.softmax(-1) @ v_BHTK
        return self.out(mixed_BHTK.transpose(1, 2).reshape(B, T, D)), logit_max


def rotary(context: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines, and sines with the first half negated, of the angles t * base^(-2i/K) of pairs (i, i + K/2); each (T, K).

    Source: Su et al. 2021, equation 15.
    """
    frequency = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle_TK = torch.outer(torch.arange(context, dtype=torch.float64), frequency).repeat(1, 2)
    sign_K = torch.ones(head_dim, dtype=torch.float64).index_fill(0, torch.arange(head_dim // 2), -1)
    return angle_TK.cos().to(torch.get_default_dtype()), (angle_TK.sin() * sign_K).to(torch.get_default_dtype())


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i+K/2}) by its position's angle: (a cos - b sin, b cos + a sin)."""
    first, second = x_BHTK.chunk(2, dim=-1)
    return torch.addcmul(x_BHTK * cos_TK, torch.cat((second, first), dim=-1), sin_TK)
