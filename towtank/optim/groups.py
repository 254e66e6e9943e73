"""Parameter groups by role and by name."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

from torch import nn

from towtank.optim.rule import ROLES, Role


def roles(model: nn.Module) -> dict[str, Role]:
    """What each parameter is for, by its name.

    `embedding`: the weight of an `nn.Embedding`. `head`: the last matrix that no embedding shares and that maps to the
    outputs, which is the last module with a matrix. `vector`: at most one dimension. `matrix`: the rest, convolutions too.
    A head that shares its weight with an embedding counts as an embedding.

    Example:
        >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
        >>> {n: r for n, r in roles(model).items() if n.endswith("weight")}
        {'0.weight': 'embedding', '1.weight': 'matrix', '2.weight': 'head'}
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    matrices = [n for n, p in model.named_parameters() if p.ndim > 1 and id(p) not in embeddings]
    last = matrices[-1] if len(matrices) > 1 else ""

    def role(name: str, p: nn.Parameter) -> Role:
        if id(p) in embeddings:
            return "embedding"
        return "vector" if p.ndim < 2 else "head" if name == last else "matrix"

    return {name: role(name, p) for name, p in model.named_parameters()}


def param_groups(
    model: nn.Module, options: Mapping[str, Mapping[str, Any]] | None = None, *, known: Mapping[str, Role] | None = None
) -> list[dict[str, Any]]:
    """Named groups for any torch optimizer, split by role; options by role or by a glob over names, the first that fits.

    Args:
        model: whose trained parameters to group.
        options: numbers of a group by role (`vector`) or glob (`blocks.*.bias`), such as `{"vector": {"weight_decay": 0}}`.
            Globs come before roles.
        known: roles by name, where `roles(model)` would guess wrong.

    Raises:
        ValueError: if a key of the options fits no parameter, or a role is unknown.

    Example:
        >>> groups = param_groups(nn.Linear(2, 3), {"vector": {"weight_decay": 0.0}})
        >>> [(g["role"], g.get("weight_decay"), [n for n, _ in g["params"]]) for g in groups]
        [('matrix', None, ['weight']), ('vector', 0.0, ['bias'])]
    """
    options = dict(options or {})
    told = roles(model) | dict(known or {})
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    wrong = [r for r in told.values() if r not in ROLES]
    if wrong:
        raise ValueError(f"role {wrong[0]!r}: expected one of {', '.join(ROLES)}")
    globs = [k for k in options if k not in ROLES]
    idle = [k for k in globs if not any(fnmatch(n, k) for n in named)]
    idle += [k for k in options if k in ROLES and k not in told.values()]
    if idle:
        raise ValueError(
            f"{idle[0]!r} fits no parameter; expected a role ({', '.join(ROLES)}) or a glob over their names"
        )
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for name, p in named.items():
        key = next((k for k in globs if fnmatch(name, k)), told[name])
        group = groups.setdefault((key, told[name]), {"params": [], "role": told[name], **options.get(key, {})})
        group["params"].append((name, p))
    return list(groups.values())
