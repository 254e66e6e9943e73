"""OrthoGrad: only the part of the gradient that turns the weights, none that lengthens them."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from towtank.optim.rowwise import row_sum, total
from towtank.optim.rule import Rule

PARALLEL = 1e-5  # below this share of the gradient what is left over is rounding noise, and is not blown up


@functools.cache
def orthograd(rule: Rule) -> Rule:
    """The rule on g_perp ||g|| / ||g_perp||, with g_perp = g - (p . g) / (p . p) p over the whole tensor.

    The rescaling is in the authors' code, not in the paper's definition. Where the gradient is parallel to the weights
    nothing is left but rounding, and the rule is given zeros.

    Example:
        >>> from towtank.optim.rules import sgd
        >>> rule = orthograd(sgd.RULE)
        >>> p, g = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])
        >>> new, _ = rule.update(p, g, sgd.State(torch.zeros(2)), sgd.Hyper(lr=1.0), 1)
        >>> p - new
        tensor([0., 5.])

    Source: Prieto et al. 2025, "Grokking at the edge of numerical stability", section 5 (perpendicular gradient descent).
    """

    def update(param: Tensor, grad: Tensor, state: Any, hyper: Any, step: Any) -> tuple[Tensor, Any]:
        return rule.update(param, _perpendicular(param, grad), state, hyper, step)

    def statistics(param: Tensor, grad: Tensor, state: Any, hyper: Any, step: Any) -> dict[str, Tensor]:
        return rule.statistics(param, _perpendicular(param, grad), state, hyper, step)  # pyright: ignore[reportOptionalCall]

    def begins_with(param: Tensor, grad: Tensor) -> Tensor:
        grad = _perpendicular(param, grad)
        return grad if rule.begins_with is None else rule.begins_with(param, grad)

    return replace(
        rule,
        name=f"orthograd({rule.name})",
        update=update,
        reach="tensor",
        statistics=rule.statistics and statistics,
        begins_with=begins_with,
    )


def _perpendicular(param: Tensor, grad: Tensor) -> Tensor:
    pg, pp, gg = (total(row_sum(x)) for x in (param * grad, param * param, grad * grad))
    left = grad - pg / (pp + 1e-30) * param
    squares = total(row_sum(torch.square(left)))
    factor = torch.where(squares > PARALLEL**2 * gg, torch.sqrt(gg / torch.clamp(squares, min=1e-38)), 0 * gg)
    return left * factor
