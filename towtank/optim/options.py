"""What users pass to an optimizer, checked; and the numbers of a step that follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from towtank.optim.clip import clip_scale
from towtank.optim.rule import Decay, Role, Rule
from towtank.optim.sharded import whole

LOW = (torch.bfloat16, torch.float16)
NOT_NEGATIVE = ("lr", "weight_decay", "eps", "betas", "momentum", "rho")


def check_group(group: Mapping[str, Any], rule: Rule) -> None:
    """Refuse a parameter group whose numbers, role or kind of decay are wrong.

    Raises:
        ValueError: with the name of what is wrong.
    """
    numbers = {n for n, x in group.items() if isinstance(x, int | float | Tensor)}
    for name in numbers | {n for n in NOT_NEGATIVE if n in group}:
        value = group[name]
        for x in value if isinstance(value, tuple | list) else (value,):
            x = float(x)
            if not math.isfinite(x) or (x < 0 and name in NOT_NEGATIVE):
                raise ValueError(f"{name} = {value}: expected a finite number{' >= 0' * (name in NOT_NEGATIVE)}")
            if name == "betas" and x >= 1:
                raise ValueError(f"betas = {value}: expected numbers in [0, 1)")
    if rule.again and float(group[rule.again]) < 1:
        raise ValueError(f"{rule.again} = {group[rule.again]}: expected a number of steps >= 1")
    if group.get("role") is not None:
        one_of("role", group["role"], Role)
    one_of("decay", group["decay"], Decay)
    if rule.decays and group["decay"] != rule.decay:
        raise ValueError(f"decay = {group['decay']!r}: {rule.name} decays by itself, {rule.decay}; leave decay out")


def one_of(name: str, value: Any, kind: Any) -> None:
    """Refuse what is none of a Literal's values.

    Raises:
        ValueError: with those values.
    """
    if value not in get_args(kind):
        raise ValueError(f"{name} = {value!r}: expected one of {', '.join(get_args(kind))}")


def positive(name: str, value: float | None) -> float | None:
    """The value, if it is a positive number or None.

    Raises:
        ValueError: if it is neither.
    """
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} = {value}: expected a positive number, or None")
    return value


def refuse_sparse(param: Tensor, name_of: Callable[[Tensor], str]) -> None:
    """Refuse a parameter whose gradient is sparse.

    Raises:
        TypeError: with its name and the remedy.
    """
    if param.grad is not None and param.grad.layout != torch.strided:
        raise TypeError(
            f"{name_of(param)}: expected a dense gradient, got a sparse one; use Embedding(sparse=False), or "
            "p.grad = p.grad.to_dense()"
        )


def complain(lost: Mapping[str, int]) -> None:
    """Name the parameters that lost numbers to a gradient that is not finite.

    Raises:
        FloatingPointError: if there are any.
    """
    bad = [f"{name} ({n} numbers)" for name, n in lost.items() if n]
    if bad:
        raise FloatingPointError(
            f"the gradient is not finite in {', '.join(bad)}; those elements have not moved. Lower the learning rate, or "
            "pass nonfinite='skip' to leave such steps out"
        )


def at_least_single(t: Tensor) -> Tensor:
    """A tensor in single precision if its own is lower."""
    return t.float() if t.dtype in LOW else t


def global_scale(grads: Sequence[Tensor], largest: float) -> float | Tensor:
    """Factor of gradients whose global norm is clipped: a number on a CPU, a tensor where reading one would wait.

    1 for a norm that is not finite: which elements are bad is found, and said, later.

    Example:
        >>> round(global_scale([torch.tensor([3.0]), torch.tensor([4.0])], 1.0), 4)
        0.2
    """
    if not grads:
        return 1.0
    norms = [whole(torch.linalg.vector_norm(at_least_single(g))) for g in grads]
    norm = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    scale = torch.where(torch.isfinite(norm), clip_scale(norm, torch.as_tensor(largest)), 1.0)
    return float(scale) if scale.device.type == "cpu" else scale


def share_of_peak(group: Mapping[str, Any]) -> float | Tensor:
    """The learning rate of a group over its peak, as its scheduler knows it, else over the group's first one.

    Example:
        >>> share_of_peak({"lr": 0.05, "initial_lr": 0.2, "first_lr": 0.2})
        0.25
    """
    peak = next(group[k] for k in ("max_lr", "initial_lr", "first_lr") if k in group)
    if isinstance(peak, Tensor):
        return torch.where(peak > 0, group["lr"] / peak, 0.0)
    return group["lr"] / peak if peak else 0.0


def as_real(t: Tensor) -> Tensor:
    """A complex tensor as its real and imaginary parts, on one more axis."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def sizes(param: Tensor, step: Tensor) -> dict[str, Tensor]:
    """Root mean square of a step, and how far it turns a tensor of two dimensions or more.

    Example:
        >>> told = sizes(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.3, 0.4]]))
        >>> round(float(told["update_rms"]), 4), round(float(told["effective_lr"]), 4)
        (0.3536, 0.2)
    """
    told = {"update_rms": step.square().mean().sqrt()}
    square = param.square().sum()
    if param.ndim > 1 and bool(square > 0):
        across = step - (step * param).sum() / square * param
        told["effective_lr"] = (across.square().sum() / square).sqrt()
    return told
