"""Losses of single examples, and their derivatives along one direction, without their gradients.

n: examples that hold a loss term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from towtank.problem import Batch, Problem
from towtank.problem.data import is_mapping
from towtank.problem.state import batch_coupled
from towtank.signals.example_cuts import Cut, cuts
from towtank.signals.step import CannotTell

_CHUNK = 256  # examples at once

Function = Callable[..., tuple[Tensor, ...]]  # of a cut batch, the tensors of one example, and its weight


def example_losses(problem: Problem, params: Mapping[str, Tensor] | None = None) -> Tensor:
    """Loss of every example, (examples,) float64, at the user's parameters or at `params`.

    Examples are counted through the batches in order, without batches that hold no loss term at all. An example that holds none,
    all of whose targets are ignored, is NaN. Losses that are not finite are returned as they are.

    Args:
        problem: model, loss and examples.
        params: {name: tensor} in place of the parameters that vary; missing ones stand for the user's values.

    Raises:
        CannotTell: if examples cannot be told apart.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> example_losses(Problem(model, torch.nn.functional.mse_loss, (x, x)), {"weight": torch.zeros(1, 1)})
        tensor([1., 4.], dtype=torch.float64)
    """
    place_n, every = places(problem)
    losses = torch.full((every,), math.nan, dtype=torch.float64)
    losses[place_n] = counted_losses(problem, params)
    return losses


def counted_losses(problem: Problem, params: Mapping[str, Tensor] | None = None) -> Tensor:
    """Loss of every example that holds a loss term, (n,) float64.

    Args:
        problem: model, loss and examples.
        params: as in `example_losses`.

    Raises:
        CannotTell: if examples cannot be told apart.
    """
    here = {name: p.detach() for name, p in problem.leaves().items()} | dict(params or {})

    def loss(cut: Cut, tensors: list[Tensor], weight: Tensor) -> tuple[Tensor]:
        return (_loss(problem, cut, here, tensors),)

    with torch.no_grad():
        return _each(problem, loss, loss)[0]


def places(problem: Problem) -> tuple[Tensor, int]:
    """Places of the examples that hold a loss term among all, (n,), and how many there are.

    Args:
        problem: model, loss and examples.

    Raises:
        CannotTell: if examples cannot be told apart.
    """
    found, start = [], 0
    for batch, cut in zip(problem.batches(), cuts(problem), strict=True):
        raw = dict(batch.raw) if is_mapping(batch.raw) else batch.raw
        n = min(x.shape[0] for x in tree_leaves(raw) if isinstance(x, Tensor))
        holds = [True] * n if len(cut.weights_M) == n else [_holds(problem, batch, raw, i, n) for i in range(n)]
        found.append(start + torch.tensor(holds).nonzero()[:, 0])
        start += n
    return torch.cat(found), start


def _holds(problem: Problem, batch: Batch, raw: Any, i: int, n: int) -> bool:
    one = tree_map(lambda x: x[i * (len(x) // n) : (i + 1) * (len(x) // n)] if isinstance(x, Tensor) else x, raw)
    return problem.count(one, batch.index) > 0


def derivatives(problem: Problem, unit: Tensor) -> tuple[Tensor, Tensor]:
    """<g_i, v> and v' H_i v of every example that holds a loss term, exact, (n,) float64 each.

    They are the derivatives of l_i(theta + t v) in t at 0, scaled so that their means are <grad L, v> and v' H v.

    Args:
        problem: model, loss and examples.
        unit: v (P,).

    Raises:
        CannotTell: if examples cannot be told apart, or derivatives are not finite.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> x, y = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.ones(2, 1)
        >>> slope, curve = derivatives(Problem(model, torch.nn.functional.mse_loss, (x, y)), torch.tensor([1.0, 0.0]))
        >>> slope.tolist(), curve.tolist()  # 2 (x theta - y) x, 2 x^2
        ([-2.0, -6.0], [2.0, 18.0])
    """
    v = problem.unflatten(unit)
    here = {name: p.detach() for name, p in problem.leaves().items()}
    zero = torch.zeros((), dtype=problem.dtype, device=problem.device)

    def loss(t: Tensor, cut: Cut, tensors: list[Tensor], weight: Tensor) -> Tensor:
        return weight * _loss(problem, cut, {name: p + t * v[name] for name, p in here.items()}, tensors)

    def functional(*one: Any) -> tuple[Tensor, Tensor]:
        def slope(t: Tensor) -> tuple[Tensor, Tensor]:
            found = torch.func.grad(loss)(t, *one)
            return found, found

        curve, found = torch.func.grad(slope, has_aux=True)(zero)
        return found, curve

    def plain(*one: Any) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            t = zero.clone().requires_grad_()
            (slope,) = torch.autograd.grad(loss(t, *one), t, create_graph=True, materialize_grads=True)
            if not slope.requires_grad:  # the loss is linear along the direction
                return slope, zero
            return slope, torch.autograd.grad(slope, t, materialize_grads=True)[0]

    slope_n, curve_n = _each(problem, functional, plain)
    if not bool(torch.isfinite(slope_n + curve_n).all()):
        raise CannotTell(
            "expected finite derivatives of the loss of every example, got others; mend the example or the model"
        )
    return slope_n, curve_n


def separable(problem: Problem) -> Problem:
    """The problem in which examples do not see each other: mode "eval" where normalization couples them, else itself.

    Args:
        problem: model, loss and examples.
    """
    coupled = problem.mode == "train" and batch_coupled(problem.network)
    return problem.replace(mode="eval") if coupled else problem


def _loss(problem: Problem, cut: Cut, params: Mapping[str, Tensor], tensors: list[Tensor]) -> Tensor:
    one = problem.ready(cut.rebuild(tensors), index=cut.batch.index, count=1.0, total=1.0)
    return problem.loss_of(problem.outputs(one, params), one)


def _each(problem: Problem, function: Function, plain: Function) -> tuple[Tensor, ...]:
    # what a function gives of every example, (n,) float64 each: by vmap, else by its plain twin, one by one
    coupled = batch_coupled(problem.network) if problem.mode == "train" else []
    if coupled:
        raise CannotTell(
            f"expected independent examples, got {coupled[0] or 'a model'} that couples them; use mode='eval'"
        )
    parts = []
    for cut in cuts(problem):
        for start in range(0, len(cut.weights_M), _CHUNK):
            place = slice(start, start + _CHUNK)
            tensors, weights = [t[place] for t in cut.tensors], cut.weights_M[place]
            with problem.measuring():
                parts.append(_at_once(partial(function, cut), partial(plain, cut), tensors, weights))
    if not parts:
        raise CannotTell("expected examples that hold a loss term, got none")
    return tuple(torch.cat(column).double().cpu() for column in zip(*parts, strict=True))


def _at_once(function: Function, plain: Function, tensors: list[Tensor], weights: Tensor) -> tuple[Tensor, ...]:
    try:
        return torch.func.vmap(function)(tensors, weights)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # a layer without a rule for vmap
        found = [plain([t[i] for t in tensors], weight) for i, weight in enumerate(weights)]
        return tuple(torch.stack([x.detach() for x in column]) for column in zip(*found, strict=True))
