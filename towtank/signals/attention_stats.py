"""What attention logits tell: the largest, the entropy of the weights, the norms of queries and keys.

Logits are made again from queries and keys a chunk at a time, so that fused kernels can be looked into in bounded memory.

Shapes: N batch and heads, T queries, S keys, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from towtank.signals.moments import aside

HIDDEN = -5e3  # masks are written as -inf, the least float, -1e9 or -1e4; biases such as ALiBi's stay above
_CHUNK = {"cpu": 1 << 18}  # logits at a time
_CHUNK_ELSEWHERE = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class Attention:
    """Statistics of the attention of one module; every property is a tensor ().

    A logit is what enters the softmax: scaled, with biases, without masked entries. Masked are entries whose mask is False
    or at most -5,000 (in attention written out by hand, whose mask is no argument: whose logit is at most -5,000). Queries
    that may see no key count for nothing.

    Args:
        max_logit: the largest logit over batch, heads and positions.
        entropy_sum: sum over queries of the entropy of their weights, nats.
        queries: number of queries with a key.
        q_square: sum of the squared norms of the query vectors, as they enter the product with the keys.
        k_square: the same of the key vectors.
        q_count: number of query vectors.
        k_count: number of key vectors.

    Example:
        >>> q = k = 2 * torch.eye(2)[None]
        >>> a = Attention.of(q, k, scale=1.0)
        >>> [round(float(v), 3) for v in (a.max_logit, a.q_norm, a.k_norm)]
        [4.0, 2.0, 2.0]
        >>> p = 1 / (1 + math.exp(-4))
        >>> round(float(a.entropy), 3) == round(-p * math.log(p) - (1 - p) * math.log(1 - p), 3)
        True

    Source: Wortsman et al. 2023, section 3.1.1.
    """

    max_logit: Tensor
    entropy_sum: Tensor
    queries: Tensor
    q_square: Tensor
    k_square: Tensor
    q_count: int
    k_count: int

    @property
    def entropy(self) -> Tensor:
        """Mean over queries of -sum_j p_j log p_j, nats; NaN where no query sees a key."""
        return self.entropy_sum / self.queries

    @property
    def q_norm(self) -> Tensor:
        """RMS over positions and heads of the norm of a query vector."""
        return (self.q_square / self.q_count).sqrt()

    @property
    def k_norm(self) -> Tensor:
        """RMS over positions and heads of the norm of a key vector."""
        return (self.k_square / self.k_count).sqrt()

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, *, scale: float, masks: Sequence[Tensor] = (), causal: int | None = None
    ) -> Attention:
        """Of queries and keys.

        Args:
            q: queries (..., T, D).
            k: keys (..., S, D).
            scale: of the products.
            masks: each broadcasts to (..., T, S): True, or a number of at most -5,000, hides an entry; other numbers are added.
            causal: query t sees keys up to t + causal; None for all.
        """
        with aside():
            lead = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2])
            squares, counts = [_square(q), _square(k)], [q.numel() // q.shape[-1], k.numel() // k.shape[-1]]
            q_NTD, k_NSD = (x.detach().expand(*lead, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (q, k))
            whole = [m.detach().expand(*lead, q.shape[-2], k.shape[-2]) for m in masks]
            parts = [
                _reduced(_logits(q_NTD, k_NSD, n, t, scale, whole, causal), -math.inf)
                for n, t in _chunks(len(q_NTD), q.shape[-2], k.shape[-2], q.device)
            ]
            return cls._joined(parts, squares, counts)

    @classmethod
    def of_logits(cls, logits: Tensor, dim: int, squares: Sequence[Tensor], counts: Sequence[int]) -> Attention:
        """Of logits just before the softmax over `dim`, with the squared norms and the numbers of queries and keys."""
        with aside():
            rows = logits.detach().movedim(dim, -1)
            rows_1RS = rows.reshape(1, -1, rows.shape[-1])
            cuts = _chunks(1, rows_1RS.shape[1], rows_1RS.shape[2], logits.device)
            return cls._joined([_reduced(_wide(rows_1RS[:, t]), HIDDEN) for _, t in cuts], squares, counts)

    @classmethod
    def _joined(
        cls, parts: Sequence[tuple[Tensor, ...]], squares: Sequence[Tensor], counts: Sequence[int]
    ) -> Attention:
        largest, entropy, queries = (torch.stack(column) for column in zip(*parts))
        return cls(
            max_logit=largest.amax(),
            entropy_sum=entropy.sum(),
            queries=queries.sum(),
            q_square=squares[0],
            k_square=squares[1],
            q_count=counts[0],
            k_count=counts[1],
        )

    @classmethod
    def pooled(cls, parts: Iterable[Attention]) -> Attention:
        """Of all of them together."""
        every = list(parts)
        sums = {
            key: torch.stack([getattr(a, key) for a in every]).sum()
            for key in ("entropy_sum", "queries", "q_square", "k_square")
        }
        return cls(
            max_logit=torch.stack([a.max_logit for a in every]).amax(),
            q_count=sum(a.q_count for a in every),
            k_count=sum(a.k_count for a in every),
            **sums,
        )


def square(x: Tensor) -> Tensor:
    """Sum of the squares of all entries (), in at least float32."""
    with aside():
        return _square(x)


def _square(x: Tensor) -> Tensor:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return torch.linalg.vector_norm(x.detach(), dtype=wide).square()


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _chunks(N: int, T: int, S: int, device: torch.device) -> Iterable[tuple[slice, slice]]:
    """Slices of (N, T) with at most a chunk of logits each, and at least one query."""
    room = _CHUNK.get(device.type, _CHUNK_ELSEWHERE)
    t = max(1, min(T, room // max(S, 1)))
    n = max(1, room // max(t * S, 1)) if t == T else 1
    return [(slice(i, i + n), slice(j, j + t)) for i in range(0, N, n) for j in range(0, T, t)]


def _logits(
    q: Tensor, k: Tensor, n: slice, t: slice, scale: float, masks: Sequence[Tensor], causal: int | None
) -> Tensor:
    """Logits of a chunk, masked entries at -inf."""
    q_ntD, k_nSD = _wide(q[n, t]), _wide(k[n])
    z = torch.baddbmm(q_ntD.new_zeros(()), q_ntD, k_nSD.mT, beta=0, alpha=scale)
    for mask in masks:
        part = _rows(mask, n, t)
        if part.dtype == torch.bool:
            z.masked_fill_(part, -math.inf)
        else:
            z.add_(part).masked_fill_(part <= HIDDEN, -math.inf)
    if causal is not None:
        first = t.start + causal
        seen = torch.ones(z.shape[-2:], dtype=torch.bool, device=z.device).tril_(first)
        z.masked_fill_(~seen, -math.inf)
    return z


def _rows(mask: Tensor, n: slice, t: slice) -> Tensor:
    """Rows of an expanded mask (..., T, S) by the flat index of its leading dimensions, without making it whole."""
    lead = mask.shape[:-2]
    if not any(mask.stride()[:-2]):  # the same for all
        return mask[(0,) * len(lead)][t][None]
    flat = torch.arange(n.start, min(n.stop, math.prod(lead)), device=mask.device)
    return mask[tuple(torch.unravel_index(flat, lead))][:, t]


def _reduced(z: Tensor, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logit, sum of entropies and number of queries of logits (..., S); a row whose best is at `floor` is empty."""
    best = z.amax(dim=-1, keepdim=True)
    empty = (best <= floor)[..., 0]  # NaN is not empty: it has to show
    d = (z - best).clamp_min_(-80)  # 2e-35 of the largest: nothing, but no denormal, which is slow, and no 0 * inf
    e = d.exp()
    total = e.sum(dim=-1)
    entropy = total.log() - d.mul_(e).sum(dim=-1) / total
    largest = best[..., 0].masked_fill(empty, -math.inf)
    return largest.amax(), entropy.masked_fill(empty, 0).sum(), (~empty).sum().to(entropy.dtype)
