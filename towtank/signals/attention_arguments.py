"""Queries, keys and masks from the arguments of PyTorch's attention functions.

Shapes: B batch, H heads, T queries, S keys, D head dimension, E width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import CausalBias, CausalVariant

_SDPA = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


@dataclass(frozen=True, kw_only=True, eq=False)
class Query:
    """What `Attention.of` takes."""

    q: Tensor
    k: Tensor
    scale: float
    masks: tuple[Tensor, ...] = ()
    causal: int | None = None


def of_dot_product(args: Sequence[Any], kwargs: dict[str, Any]) -> Query:
    """From a call of `F.scaled_dot_product_attention`."""
    given = dict(zip(_SDPA, args)) | kwargs
    q, k, mask = given["query"], given["key"], given.get("attn_mask")
    if given.get("enable_gqa") and q.shape[-3] != k.shape[-3]:
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    scale = given.get("scale")
    causal = 0 if given.get("is_causal") else None
    if isinstance(mask, CausalBias):
        causal = k.shape[-2] - q.shape[-2] if mask.variant == CausalVariant.LOWER_RIGHT else 0
        mask = None
    masks = () if mask is None else (~mask if mask.dtype == torch.bool else mask,)
    return Query(q=q, k=k, scale=q.shape[-1] ** -0.5 if scale is None else scale, masks=masks, causal=causal)


def of_multi_head(args: Sequence[Any], kwargs: dict[str, Any]) -> Query:
    """From a call of `F.multi_head_attention_forward`, whose projections are done again."""
    given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    given.apply_defaults()
    a = given.arguments
    batched, heads = a["query"].ndim == 3, a["num_heads"]
    query, key = (x if batched else x.unsqueeze(1) for x in (a["query"], a["key"]))
    q_TBE, k_SBE = _projected(a, query, key)
    B, D = q_TBE.shape[1], q_TBE.shape[-1] // heads
    extra = int(a["bias_k"] is not None) + int(a["add_zero_attn"])
    if a["bias_k"] is not None:
        k_SBE = torch.cat([k_SBE, a["bias_k"].expand(1, B, -1)])
    q_BHTD = q_TBE.reshape(-1, B, heads, D).permute(1, 2, 0, 3)
    k_BHSD = k_SBE.reshape(-1, B, heads, D).permute(1, 2, 0, 3)
    if a["static_k"] is not None:
        k_BHSD = a["static_k"].view(B, heads, -1, D)
    if a["add_zero_attn"]:
        k_BHSD = F.pad(k_BHSD, (0, 0, 0, 1))
    masks = tuple(F.pad(m, (0, extra)) for m in _masks(a, B, heads, batched))
    return Query(q=q_BHTD, k=k_BHSD, scale=D**-0.5, masks=masks)


def _projected(a: dict[str, Any], query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (., B, E) of all heads."""
    bias = a["in_proj_bias"]
    b_q, b_k = (None, None) if bias is None else bias.chunk(3)[:2]
    if a["use_separate_proj_weight"]:
        W_q, W_k = a["q_proj_weight"], a["k_proj_weight"]
    else:
        W_q, W_k = a["in_proj_weight"].chunk(3)[:2]
    cast = [None if t is None else t.to(query.dtype) for t in (W_q, b_q, W_k, b_k)]
    return F.linear(query, cast[0], cast[1]), F.linear(key.to(query.dtype), cast[2], cast[3])  # type: ignore[arg-type]


def _masks(a: dict[str, Any], B: int, heads: int, batched: bool) -> list[Tensor]:
    """Masks that broadcast to (B, H, T, S); True hides. The causal flag only says what the mask is."""
    mask, padding = a["attn_mask"], a["key_padding_mask"]
    found = []
    if mask is not None:
        found.append(mask if mask.ndim == 2 else mask.view(B, heads, *mask.shape[-2:]))
    if padding is not None:
        found.append((padding if batched else padding[None])[:, None, None, :])
    return found
