"""State of any rule in 8 bits: blocks of numbers as indices into a fixed table, with one scale per block."""

from __future__ import annotations

import functools
from collections import namedtuple
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from towtank.optim.rule import Role, Rule

SMALL = 4096  # tensors of fewer numbers stay in 32 bit


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of dynamic tree quantization in [-1, 1] or [0, 1]: exact 0 and 1 (not -1), seven decades.

    With e = 0 ... 6 leading zeros, the decade 10^(-6+e) holds the centres of 2^e (signed) or 2^(e+1) equal parts of
    [0.1, 1].

    Source: Dettmers et al. 2022, "8-bit optimizers via block-wise quantization", section 2.2; unsigned as in section 2.3.
    """
    values = [0.0, 1.0]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (e + (not signed)) + 1, dtype=torch.float64)
        centres = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (e - 6)).tolist()
        values += [*centres, *(-c for c in centres)] if signed else centres
    values += [0.0] * (256 - len(values))
    return torch.tensor(sorted(values), dtype=torch.float32)


def encode(x: Tensor, block: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Nearest table values: codes (numel,) uint8 and scales (blocks,) float32, the largest magnitude of each block.

    Example:
        >>> codes, scales = encode(torch.tensor([0.5, 2.0, 0.0]), 2, True)
        >>> scales
        tensor([2., 0.])
        >>> decode(codes, scales, (3,), 2, True)[1:]
        tensor([2., 0.])
    """
    flat = x.detach().float().reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scales = padded.abs().amax(1)
    unit = padded / torch.where(scales > 0, scales, 1)[:, None]
    table = dynamic_map(signed).to(x.device)
    middles = (table[1:] + table[:-1]) / 2
    return torch.bucketize(unit, middles).to(torch.uint8).view(-1)[: len(flat)], scales


def decode(codes: Tensor, scales: Tensor, shape: tuple[int, ...], block: int, signed: bool) -> Tensor:
    """Inverse of `encode`, float32 of the given shape."""
    units = dynamic_map(signed).to(codes.device)[codes.int()]
    return (units * scales.repeat_interleave(block)[: len(codes)]).view(shape)


def quantized(rule: Rule, *, block: int = 256, unsigned: tuple[str, ...] = ("v", "s")) -> Rule:
    """The rule with its state in 8 bits, about 2 bytes a number for two moments.

    Embeddings, vectors and tensors of fewer than 4096 numbers stay in 32 bit, as in Dettmers et al. 2022, section 2.3
    (stable embeddings) and bitsandbytes.

    Args:
        rule: elementwise.
        block: numbers per scale.
        unsigned: fields of the state that are never negative, and use the table without signs.

    Raises:
        ValueError: if the rule is not elementwise.
    """
    if rule.reach != "element" or rule.begin is not None or rule.observe is not None:
        raise ValueError(f"{rule.name}: 8-bit state needs an elementwise rule without curvature")

    def init(param: Tensor, role: Role, hyper: Any) -> Any:
        inner = rule.init(param, role, hyper)
        if role in ("embedding", "vector") or param.numel() < SMALL or not len(inner):
            return inner
        return _packed(type(inner), inner, block, unsigned)

    def update(param: Tensor, grad: Tensor, state: Any, hyper: Any, step: Any) -> tuple[Tensor, Any]:
        kind = _INNER.get(type(state))
        if kind is None:
            return rule.update(param, grad, state, hyper, step)
        new, fresh = rule.update(param, grad, _unpacked(kind, state, param, block, unsigned), hyper, step)
        return new, _packed(kind, fresh, block, unsigned)

    def preconditioner(state: Any, hyper: Any, step: Any) -> Tensor:
        kind = _INNER.get(type(state))
        if kind is not None:
            state = _unpacked(kind, state, state[0], block, unsigned)
        return rule.preconditioner(state, hyper, step)  # pyright: ignore[reportOptionalCall]

    return replace(
        rule,
        name=f"quantized({rule.name})",
        init=init,
        update=update,
        reach="tensor",
        preconditioner=rule.preconditioner and preconditioner,
        statistics=None,
        state_bytes=rule.state_bytes / 4 * (1 + 4 / block),
    )


_INNER: dict[type, type] = {}


@functools.cache
def _outer(kind: type) -> type:
    fields: tuple[str, ...] = kind._fields  # pyright: ignore[reportAttributeAccessIssue]
    outer = namedtuple(f"{kind.__name__}In8Bits", [f + end for f in fields for end in ("_codes", "_scales")])  # noqa: PYI024
    _INNER[outer] = kind
    return outer


def _packed(kind: type, state: Any, block: int, unsigned: tuple[str, ...]) -> Any:
    columns = (encode(s, block, f not in unsigned) for f, s in zip(state._fields, state, strict=True))
    pairs = [(codes.view(s.shape), scales) for (codes, scales), s in zip(columns, state, strict=True)]
    return _outer(kind)(*(x for pair in pairs for x in pair))


def _unpacked(kind: type, state: Any, like: Tensor, block: int, unsigned: tuple[str, ...]) -> Any:
    fields: tuple[str, ...] = kind._fields  # pyright: ignore[reportAttributeAccessIssue]
    return kind(
        *(
            decode(state[2 * i].reshape(-1), state[2 * i + 1], tuple(like.shape), block, f not in unsigned)
            for i, f in enumerate(fields)
        )
    )
