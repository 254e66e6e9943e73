"""What layers see: for every layer, vectors whose outer products are the gradients of its weights.

The gradient of a weight W (m, n) by one example is sum_r rho_r kappa_r^T over the positions r at which the example uses it
(pixels, tokens, calls). For a linear layer or a convolution rho is the gradient by its output and kappa its input; for an
embedding rho is the token, one-hot, and kappa the gradient by its output; a bias has kappa = 1; the scale of a normalization
has rho = gradient * normalized input. Hooks collect inputs and outputs, and are gone when the context ends.

E examples, R positions of one example; m, n: shape of the weight.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from towtank.problem import Problem

Rest = Literal["diagonal"] | None
Part = Literal["weight", "bias", "both"]


@dataclass(frozen=True, eq=False)
class Use:
    """A module that uses a parameter, as its weight, its bias, or (weight, bias) side by side."""

    module: nn.Module
    part: Part


@dataclass(frozen=True, eq=False)
class Layer:
    """The parameters of one block and all their uses; `shape` is (m, n), and `plain` says that no factors are asked for."""

    names: tuple[str, ...]
    uses: tuple[Use, ...]
    shape: tuple[int, int]
    plain: bool = False


@dataclass(frozen=True, eq=False)
class Sides:
    """rho (E, R, m) and kappa (E, R, n) of one use; an integer rho (E, R) stands for one-hot vectors."""

    rho: Tensor
    kappa: Tensor
    gradient_is_rho: bool

    @property
    def seen(self) -> Tensor:
        """Positions (E, R) through which the loss depends on the weight at all."""
        return (self.rho if self.gradient_is_rho else self.kappa).abs().amax(-1) > 0


def layers_of(problem: Problem, rest: Rest) -> list[Layer]:
    """Every parameter of a problem in exactly one layer.

    Args:
        problem: whose parameters.
        rest: None refuses parameters of other layers than Linear, Conv2d and Embedding; "diagonal" takes scales and
            biases of normalization layers too, as diagonal blocks.

    Raises:
        NotImplementedError: naming the parameters that cannot be treated.
    """
    names = {id(p): n for n, p in zip(problem.names, problem.parameters(), strict=True)}
    uses: dict[str, list[tuple[nn.Module, str]]] = {n: [] for n in problem.names}
    plain: set[str] = set()
    for module in problem.network.modules():
        for key, p in module._parameters.items():
            name = names.get(id(p))
            if name is None or key not in ("weight", "bias"):
                continue
            if _factored(module) or (rest == "diagonal" and _scaling(module)):
                uses[name].append((module, key))
                plain |= set() if _factored(module) else {name}
    odd = [n for n, found in uses.items() if not found]
    if odd:
        raise NotImplementedError(
            f"expected parameters of Linear, Conv2d (groups=1) and Embedding layers, got {', '.join(odd)}; leave them out "
            "by Problem(..., params=...)"
            + ("" if rest else ', or take normalization layers as diagonals by rest="diagonal"')
        )
    return list(_joined(problem, uses, plain))


def _factored(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.scale_grad_by_freq
    return isinstance(module, nn.Linear)


def _scaling(module: nn.Module) -> bool:
    """Whether a module holds no more than a weight and a bias of one axis, as normalization layers do."""
    own = {k: p for k, p in module._parameters.items() if p is not None}
    return set(own) <= {"weight", "bias"} and all(p.ndim == 1 for p in own.values()) and not list(module.children())


def _joined(problem: Problem, uses: dict[str, list[tuple[nn.Module, str]]], plain: set[str]) -> Iterator[Layer]:
    """Weight and bias of a layer in one block, where neither is used elsewhere."""
    partner = {}
    for name, found in uses.items():
        if len(found) == 1 and found[0][1] == "bias" and name not in plain:
            weights = [n for n, f in uses.items() if len(f) == 1 and f[0][0] is found[0][0] and f[0][1] == "weight"]
            partner |= dict.fromkeys(weights, name)
    for name, found in uses.items():
        if name in partner.values():
            continue
        shape = problem.shapes[name]
        m = shape[0] if len(shape) else 1
        n = shape.numel() // m
        if name in partner:
            yield Layer((name, partner[name]), (Use(found[0][0], "both"),), (m, n + 1))
        else:
            yield Layer((name,), tuple(Use(f, k) for f, k in found), (m, n), name in plain)  # type: ignore[arg-type]


Calls = dict[nn.Module, list[tuple[Tensor, Tensor]]]


@contextmanager
def captured(modules: Iterable[nn.Module]) -> Generator[Calls, None, None]:
    """Collect (input, output) of every call of some modules, while the context lasts.

    The rest of the network gets a copy of each output, as it may change it in place.
    """
    calls: Calls = {module: [] for module in modules}
    handles = [m.register_forward_hook(_keep(calls[m]), with_kwargs=True) for m in calls]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _keep(kept: list[tuple[Tensor, Tensor]]) -> Any:
    busy = False

    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        nonlocal busy
        if busy or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        given = arguments[0] if arguments else next(iter(keywords.values()))
        if not _factored(module):
            busy = True
            given = _normalized(module, given, output)
            busy = False
        kept.append((given.detach(), output))
        return output.clone()

    return hook


def _normalized(module: nn.Module, given: Tensor, output: Tensor) -> Tensor:
    """The normalized input: the module's output for a weight of ones and a bias of zeros."""
    plain = {k: torch.full_like(p, float(k == "weight")) for k, p in module._parameters.items() if p is not None}
    with torch.no_grad():
        return functional_call(module, plain, (given,)).to(output.dtype)


def sides(use: Use, call: tuple[Tensor, Tensor], gradient: Tensor, examples: int, dtype: torch.dtype) -> Sides:
    """What one call contributes: rho and kappa.

    Args:
        use: who calls.
        call: input and output.
        gradient: by the output.
        examples: E; must divide the first axis of the input.
        dtype: of the result.
    """
    module, given = use.module, call[0]
    g = _positions(module, gradient.detach(), examples).to(dtype)
    ones = g.new_ones(*g.shape[:2], 1)
    if use.part == "bias":
        return Sides(g, ones, True)
    if isinstance(module, nn.Embedding):
        tokens = given.reshape(examples, -1)
        if module.padding_idx is not None:  # its row gets no gradient
            g = g * (tokens != module.padding_idx)[..., None]
        return Sides(tokens, g, False)
    if not _factored(module):
        return Sides(g * _positions(module, given, examples).to(dtype), ones, True)
    a = _positions(module, _patches(module, given) if isinstance(module, nn.Conv2d) else given, examples).to(dtype)
    return Sides(g, torch.cat([a, ones], -1) if use.part == "both" else a, True)


def _positions(module: nn.Module, x: Tensor, examples: int) -> Tensor:
    """(E, R, features) of an activation whose first axis runs over examples, or over their parts in order."""
    channels_first = isinstance(module, nn.Conv2d | nn.GroupNorm | nn.modules.batchnorm._BatchNorm) and x.ndim > 2
    x = x.movedim(1, -1) if channels_first else x
    if x.ndim < 2 or x.shape[0] % examples:
        raise NotImplementedError(
            f"expected the first axis of what goes through {type(module).__name__} to run over the {examples} examples of "
            f"the batch, got shape {tuple(x.shape)}; put the batch first"
        )
    return x.reshape(examples, -1, x.shape[-1])


def _patches(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The inputs of each output pixel (B, features, height, width)."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    shape = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[-2:], module.kernel_size, module.stride, module.dilation, strict=True)
    ]
    columns = F.unfold(x, module.kernel_size, dilation=module.dilation, stride=module.stride)  # type: ignore[arg-type]
    return columns.unflatten(2, shape)
