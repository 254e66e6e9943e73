"""Samples of the curvature's diagonal for all members at once, for rules that need them.

What is random depends on the member's seed and the count of the sample alone, so that a member sees in company what it
would see alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
EVERY = {"sophia-g": 10, "sophia-h": 10}  # steps from one sample to the next: k of Liu et al. 2024; else every step


def signed(
    losses: Callable[[Tensors], Tensor], params: Mapping[str, Tensor], seeds: Sequence[int], count: int
) -> Tensors:
    """The sample z * (H z) of every member with random signs z, one tensor per parameter, (E, ...).

    Args:
        losses: from parameters to the losses (E,) of the members, each of its own parameters alone; differentiable twice.
        params: by name, (E, ...).
        seeds: of the members.
        count: which sample this is.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    total = losses(leaves).sum()
    grads = torch.autograd.grad(
        total, list(leaves.values()), create_graph=True, allow_unused=True, materialize_grads=True
    )
    drawn = {seed: _generator(seed, count) for seed in dict.fromkeys(seeds)}
    signs = [_by_seed(seeds, {s: _signs(p[0], g) for s, g in drawn.items()}) for p in leaves.values()]
    inner = torch.stack([(g * z).sum() for g, z in zip(grads, signs, strict=True)]).sum()
    products = torch.autograd.grad(inner, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {name: z * h for name, z, h in zip(leaves, signs, products, strict=True)}


def labels(logits: Tensor, seeds: Sequence[int], count: int) -> Tensor:
    """Labels (E, ...) drawn from the softmax of each member's logits (E, ..., C), by inversion of its distribution.

    Args:
        logits: of the members.
        seeds: of the members.
        count: which sample this is.

    Example:
        >>> labels(torch.tensor([[[0.0, 100.0], [100.0, 0.0]]]), [0], 0)
        tensor([[1, 0]])
    """
    uniform = {s: _uniform(logits[0, ..., 0], _generator(s, count)) for s in dict.fromkeys(seeds)}
    cumulative = logits.double().softmax(-1).cumsum(-1)
    return (cumulative[..., :-1] <= _by_seed(seeds, uniform).unsqueeze(-1)).sum(-1)


def _by_seed(seeds: Sequence[int], drawn: Mapping[int, Tensor]) -> Tensor:
    return torch.stack([drawn[seed] for seed in seeds])


def _generator(seed: int, count: int) -> torch.Generator:
    """A generator of its own for every seed and sample; on the CPU, so that every device draws the same."""
    return torch.Generator().manual_seed((seed * 1_000_003 + count) % 2**63)


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (2 * torch.randint(0, 2, like.shape, generator=generator) - 1).to(like.device, like.dtype)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=torch.float64).to(like.device)
