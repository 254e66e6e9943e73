"""What a parametrization multiplies, as a pure function of names and shapes, kept in a table keyed by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

Role = Literal["embedding", "matrix", "head", "vector"]
Shape = tuple[int, ...]
Plan = dict[str, "Multipliers"]


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """What standard parametrization is multiplied by, for one tensor: all 1 at the base size.

    Args:
        init: of the initial values.
        lr: of the learning rate.
        weight_decay: of lambda.
        forward: of the tensor wherever the forward pass uses it.
    """

    init: float = 1.0
    lr: float = 1.0
    weight_decay: float = 1.0
    forward: float = 1.0


def multipliers(kind: str, role: Role, shape: Shape, base_shape: Shape, *, decay: str = "independent") -> Multipliers:
    """Multipliers of one tensor under `sp` or `mup`, for Adam-like optimizers.

    With m the ratio of the tensor's width (fan-in of a matrix or head, fan-out of an embedding) to that of the base:

    | role      | init std | learning rate | forward |
    |-----------|----------|---------------|---------|
    | embedding | const    | const         | 1       |
    | vector    | const    | const         | 1       |
    | matrix    | m^-1/2   | 1/m           | 1       |
    | head      | const    | const         | 1/m     |

    The column `init std` is the published law; `init` below is relative to what the model drew, and the models here draw
    1/sqrt(width), so "const" becomes sqrt(m) and "m^-1/2" becomes 1. Independent decay is not scaled (lambda acts at the
    same rate at every width). Coupled decay is multiplied by m where the rate is divided by m, as in the `mup` package.

    Args:
        kind: `sp` (all ones) or `mup`.
        role: what the tensor does.
        shape: of the tensor, (fan_out, fan_in, ...) as in torch.
        base_shape: of the tensor of the same name in the base model.
        decay: `independent` or `coupled`.

    Raises:
        ValueError: for an unknown kind, shapes of different rank, or a matrix that may be a head or an embedding.

    Example:
        >>> multipliers("mup", "matrix", (128, 128), (32, 32))
        Multipliers(init=1.0, lr=0.25, weight_decay=1.0, forward=1.0)

    Source: Yang et al. 2022 (Tensor Programs V), table 8.
    """
    if kind == "sp":
        return Multipliers()
    if kind != "mup":
        raise ValueError(f"parametrization = {kind!r}: expected sp | mup")
    if len(shape) != len(base_shape):
        raise ValueError(f"expected shapes of one rank, got {shape} and base {base_shape}")
    if role == "matrix" and shape[1] != base_shape[1] and shape[0] == base_shape[0]:
        raise ValueError(
            f"expected a matrix whose fan-out grows with its fan-in, got {shape} and base {base_shape}: is it"
            " the head (name it in Task.head) or an embedding (use nn.Embedding)?"
        )
    if role == "matrix":
        m = shape[1] / base_shape[1]
        return Multipliers(lr=1 / m, weight_decay=m if decay == "coupled" else 1.0)
    if role == "head":
        m = shape[1] / base_shape[1]
        return Multipliers(init=m**0.5, forward=1 / m)
    if role == "embedding":
        return Multipliers(init=(shape[-1] / base_shape[-1]) ** 0.5)
    return Multipliers()


def plan(
    kind: str, shapes: Mapping[str, Shape], base_shapes: Mapping[str, Shape], roles: Mapping[str, Role], *, decay: str
) -> Plan:
    """The table of multipliers of a model, keyed by parameter name.

    Raises:
        ValueError: if the base model has other parameters, or a tensor's role in muP cannot be told.

    Example:
        >>> wide, narrow = {"w": (64, 64), "out": (9, 64)}, {"w": (32, 32), "out": (9, 32)}
        >>> table = plan("mup", wide, narrow, {"w": "matrix", "out": "head"}, decay="independent")
        >>> table["w"].lr, table["out"].forward
        (0.5, 0.5)
    """
    if kind != "sp" and "head" not in roles.values():
        raise ValueError(
            "expected a head, which muP divides by the width, got none: name its module in Task.head; a head"
            " tied to the embedding is not supported, use parametrization = 'sp'"
        )
    if shapes.keys() != base_shapes.keys():
        odd = sorted(shapes.keys() ^ base_shapes.keys())
        raise ValueError(
            f"expected the base model to have the same parameters, got a difference in {odd}; only widths may differ"
        )
    table = {}
    for name in shapes:
        try:
            table[name] = multipliers(kind, roles[name], shapes[name], base_shapes[name], decay=decay)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return table


def roles(model: nn.Module, *, head: str = "head") -> dict[str, Role]:
    """The role of every parameter: embeddings, the head (a module of that name), other matrices, and vectors.

    Args:
        model: any module.
        head: name of the module that makes the outputs.

    Example:
        >>> roles(nn.Linear(2, 3))
        {'weight': 'matrix', 'bias': 'vector'}
    """
    embeddings = {
        f"{name}.{p}".removeprefix(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        for p, _ in module.named_parameters(recurse=False)
    }
    table: dict[str, Role] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            table[name] = "vector"
        elif name in embeddings:
            table[name] = "embedding"
        else:
            table[name] = "head" if name.startswith(f"{head}.") else "matrix"
    return table


def shapes(model: nn.Module) -> dict[str, Shape]:
    """Shape of every parameter, by name."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def require_comparable(model: nn.Module, base: nn.Module, roles: Mapping[str, Role]) -> None:
    """Refuse a model whose initialization does not shrink as 1/sqrt(width), which the table's `init` takes for granted.

    The check compares the standard deviation of every embedding and head with that in the base model; it passes within
    15 %, the sampling error of a few hundred entries.

    Raises:
        ValueError: naming the tensor, the ratio expected and the ratio found.
    """
    small = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        if roles[name] not in ("embedding", "head") or parameter.numel() < 256 or small[name].numel() < 256:
            continue
        expected = (small[name].shape[-1] / parameter.shape[-1]) ** 0.5
        found = float(parameter.detach().std() / small[name].detach().std())
        if abs(found / expected - 1) > 0.15:
            raise ValueError(
                f"{name}: expected an initial standard deviation that falls as 1/sqrt(width), a ratio of {expected:.3f} to the"
                f" base model, got {found:.3f}; initialize it so, or use parametrization = 'sp'"
            )
