"""Attention written in many ways, each with its logits, queries and keys worked out by hand in float64.

Shapes: B batch, H heads, T queries, S keys, K head dimension, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.worlds import generator

B, T, H, K = 2, 7, 2, 4
D = H * K


@dataclass(frozen=True)
class Truth:
    """Statistics by brute force from logits (..., T, S), hidden entries at -inf."""

    max_logit: float
    entropy: float
    q_norm: float
    k_norm: float


def truth(logits: Tensor, q: Tensor, k: Tensor) -> Truth:
    """One query after the other, in Python."""
    rows = [[z for z in row if z > -math.inf] for row in logits.double().reshape(-1, logits.shape[-1]).tolist()]
    rows = [row for row in rows if row]
    entropies = []
    for row in rows:
        top = max(row)
        weights = [math.exp(z - top) for z in row]
        total = math.fsum(weights)
        entropies.append(-math.fsum(w / total * math.log(w / total) for w in weights if w))
    q_norm, k_norm = (float(x.double().square().sum(-1).mean().sqrt()) for x in (q, k))
    return Truth(max(map(max, rows)), math.fsum(entropies) / len(rows), q_norm, k_norm)


def causal(T: int, S: int) -> Tensor:
    return torch.ones(T, S, dtype=torch.bool).tril()


class ByHand(nn.Module):
    """Projections, then attention written as `write(q, k, v)` with heads at (B, H, T, K)."""

    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)
        self.write = write

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, H, K).permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return self.write(*self.parts(x)).transpose(1, 2).flatten(2)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(K)).softmax(-1) @ v


def masked_by(value: float) -> Callable[..., Tensor]:
    def write(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        z = torch.matmul(q, k.mT) * K**-0.5
        z = z.masked_fill(~causal(q.shape[-2], k.shape[-2]), value)
        return torch.matmul(F.dropout(F.softmax(z, dim=-1, dtype=torch.float32), 0.5).to(v.dtype), v)

    return write


def added(value: float) -> Callable[..., Tensor]:
    def write(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.zeros(q.shape[-2], k.shape[-2]).masked_fill(~causal(q.shape[-2], k.shape[-2]), value)
        z = (q * K**-0.5) @ k.mT
        z += mask
        return torch.softmax(z, -1) @ v

    return write


def chosen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = torch.where(causal(q.shape[-2], k.shape[-2]), q @ k.mT / K**0.5, torch.finfo(q.dtype).min)
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(z, dim=-1), v)


def summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = torch.einsum("b h q d, b h k d -> b h q k", q, k) / K**0.5
    return torch.einsum("...qk,...kd->...qd", z.softmax(-1), v)


def batched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    z = torch.baddbmm(torch.zeros(()), q, k.transpose(1, 2), beta=0, alpha=K**-0.5)
    return torch.bmm(z.view(B, H, T, T).softmax(-1).view(-1, T, T), v).view(B, H, T, K)


def transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Values from the left: v^T p^T."""
    return (v.mT @ (q @ k.mT / K**0.5).softmax(-1).transpose(-1, -2)).mT


def fused(**options: object) -> Callable[..., Tensor]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]


def inputs(seed: int = 0, size: float = 3.0) -> Tensor:
    return size * torch.randn(B, T, D, generator=generator(seed))


def by_hand(
    q: Tensor, k: Tensor, *, scale: float = K**-0.5, mask: Tensor | None = None, bias: Tensor | None = None
) -> Truth:
    z = torch.einsum("...td,...sd->...ts", q.double(), k.double()) * scale
    z = z if bias is None else z + bias
    z = z if mask is None else z.masked_fill(~mask, -math.inf)
    return truth(z, q, k)
