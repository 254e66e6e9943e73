"""Which module's second derivative is wrong or missing, found by checking every module by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from towtank.curvature.comparison import Scalar, compare
from towtank.curvature.gradient_graph import MissingDerivative
from towtank.problem import Problem
from towtank.problem.data import measured


def blame(problem: Problem) -> str:
    """The innermost module of a problem of one batch whose second derivative disagrees with differences, in words.

    Every module is run by itself on the inputs it had in the first forward pass; its outputs are summed with random weights.
    """
    with problem.measuring():
        calls = _calls(problem)
        for name, module, inputs in sorted(calls, key=lambda c: (bool(list(c[1].children())), -c[0].count("."))):
            at, native, wide = _alone(module, inputs)
            try:
                wrong = bool(at) and not compare(native, wide, at).agrees
            except MissingDerivative:
                wrong = True
            except (RuntimeError, ValueError, TypeError):  # cannot be run by itself: its parents are still to come
                continue
            if wrong:
                return f"module {name or 'at the top'} ({type(module).__name__})"
    return "the loss or the forward function"


def _calls(problem: Problem) -> list[tuple[str, nn.Module, tuple[Any, Any]]]:
    """Every module that a forward pass runs, with the inputs of its first call."""
    found: dict[nn.Module, tuple[Any, Any]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.setdefault(module, (args, kwargs))

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in problem.network.modules()]
    try:
        with torch.no_grad():
            (batch,) = problem.batches()
            problem.outputs(batch)
    finally:
        for handle in handles:
            handle.remove()
    return [(n, m, found[m]) for n, m in problem.network.named_modules() if m in found]


def _alone(module: nn.Module, inputs: tuple[Any, Any]) -> tuple[list[Tensor], Scalar, Scalar]:
    """Parameters and floating-point inputs of a module, and its outputs as a scalar of them: natively, and in float64."""
    names = [n for n, p in module.named_parameters() if p.dtype.is_floating_point]
    parameters = dict(module.named_parameters())
    flat, tree = tree_flatten(inputs)
    places = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.dtype.is_floating_point]
    at = [measured(parameters[n], None) for n in names] + [measured(flat[i], None) for i in places]

    def scalar(dtype: torch.dtype | None) -> Scalar:
        def of(leaves: Sequence[Tensor]) -> Tensor:
            tensors = {n: measured(b.clone(), dtype) for n, b in module.named_buffers()} | dict(zip(names, leaves))
            args = list(flat)
            for i, x in zip(places, leaves[len(names) :]):
                args[i] = x
            positional, keywords = tree_unflatten(args, tree)
            return _weighted(functional_call(module, tensors, positional, keywords))

        return of

    return at, scalar(None), scalar(torch.float64)


def _weighted(outputs: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    kept: Callable[[Any], bool] = lambda x: isinstance(x, Tensor) and x.dtype.is_floating_point  # noqa: E731
    parts = [(x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in tree_leaves(outputs) if kept(x)]
    return torch.stack([p.double() for p in parts]).sum()
