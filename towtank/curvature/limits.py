"""Learning rates beyond which an optimizer's step is unstable on the quadratic approximation of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from towtank.estimate import Estimate

MOMENTUM = 0.9  # where no optimizer says


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A largest stable learning rate.

    Args:
        name: of the optimizer it holds for.
        rate: the rate and its error; infinite without positive curvature, None if it cannot be told.
        kind: what the error is.
        note: the formula, and how the optimizer's own rate compares.
    """

    name: str
    rate: Estimate | None
    kind: Literal["bound", "standard error"]
    note: str


def stability_limits(optimizer: torch.optim.Optimizer | None, found: Mapping[str, Estimate]) -> Iterator[Limit]:
    """The limits that follow from measured curvature.

    Gradient descent with step lr on a quadratic of curvature S is stable for lr S < 2; with heavy-ball momentum mu for
    lr S < 2 (1 + mu); with Nesterov's for lr S < 2 (1 + mu) / (1 + 2 mu); Adam for lr S < 2 (1 + beta1) / (1 - beta1), S its
    preconditioned sharpness. Stochastic gradient descent on single terms needs lr tr(G) < 2.

    Args:
        optimizer: whose momentum and learning rate are taken; None for plain descent and for momentum 0.9.
        found: "sharpness", "preconditioned sharpness", "Fisher trace", as far as they were measured.

    Example:
        >>> for limit in stability_limits(None, {"sharpness": Estimate(4.0), "Fisher trace": Estimate(10.0)}):
        ...     print(limit.name, limit.rate.value)
        gradient descent 0.5
        momentum 0.9 0.95
        SGD, batch of 1 0.2

    Source: Cohen et al. 2021, appendix B; Cohen et al. 2022, equation 4; Wu, Ma, E 2018, theorem 1 (G of rank-one terms).
    """
    group = optimizer.param_groups[0] if optimizer else {}
    sgd = optimizer is None or isinstance(optimizer, torch.optim.SGD)
    lr = max((float(g["lr"]) for g in optimizer.param_groups), default=math.nan) if optimizer else math.nan
    mu = float(group.get("momentum", 0.0)) if optimizer and sgd else MOMENTUM
    plain = sgd and not mu
    yield _limit(
        "gradient descent", 2.0, "2 / sharpness", found.get("sharpness"), lr if plain and optimizer else math.nan
    )
    if mu:
        own = group if sgd else {}
        factor = descent_factor({**own, "momentum": mu})
        name = f"{'Nesterov ' if own.get('nesterov') else ''}momentum {mu:g}"
        yield _limit(name, factor, f"{factor:.4g} / sharpness", found.get("sharpness"), lr if sgd else math.nan)
    kind, factor = _adaptive(type(optimizer), group)
    if factor:
        S = found.get("preconditioned sharpness")
        yield _limit(kind, factor, f"{factor:.4g} / preconditioned sharpness", S, lr)
    yield _limit("SGD, batch of 1", 2.0, "2 / Fisher trace", found.get("Fisher trace"), math.nan, "standard error")


@dataclass(frozen=True, kw_only=True)
class Factor:
    """The number c of a stability condition lr S < c.

    Args:
        value: c, the smallest of the optimizer's groups; NaN where the optimizer is adaptive and its limit is not known.
        adaptive: whether S is the preconditioned sharpness instead of the sharpness.
    """

    value: float
    adaptive: bool


def stability_factor(optimizer: torch.optim.Optimizer) -> Factor:
    """The c of lr S < c of an optimizer: see `stability_limits`.

    Known are those of `torch.optim` named there, and SGD, AdamW, AdaBelief and AdaHessian of `towtank.optim`, recognized by
    the name of their rule.

    Args:
        optimizer: whose momentum is taken.

    Raises:
        TypeError: if the optimizer is of another kind.

    Example:
        >>> w = [torch.zeros(1, requires_grad=True)]
        >>> round(stability_factor(torch.optim.SGD(w, momentum=0.9)).value, 6)
        3.8
        >>> round(stability_factor(torch.optim.AdamW(w)).value, 6)
        38.0

    Source: Cohen et al. 2021, appendix B; Cohen et al. 2022, equation 4.
    """
    rule = getattr(getattr(optimizer, "rule", None), "name", "")
    groups = optimizer.param_groups
    if isinstance(optimizer, torch.optim.SGD) or rule == "sgd":
        return Factor(value=min(descent_factor(g) for g in groups), adaptive=False)
    if rule in _ADAM_LIKE:
        return Factor(value=min(_averaged(float(g["betas"][0])) for g in groups), adaptive=True)
    if isinstance(optimizer, torch.optim.NAdam):  # its preconditioner is known, its momentum schedule has no such limit
        return Factor(value=math.nan, adaptive=True)
    known = [_adaptive(type(optimizer), g)[1] for g in groups]
    if not all(known):
        raise TypeError(
            f"expected SGD, Adam or another optimizer whose stability limit is known, got {type(optimizer).__name__}; "
            "give its preconditioner and its factor to preconditioned_sharpness"
        )
    return Factor(value=min(known), adaptive=True)


_ADAM_LIKE = (
    "adamw",
    "adabelief",
    "adahessian",
)  # rules that step along lr m / D, m the exponential average of gradients


def descent_factor(group: Mapping[str, Any]) -> float:
    """The c of lr S < c of gradient descent with the momentum of a parameter group.

    Example:
        >>> descent_factor({"momentum": 0.5}), descent_factor({"momentum": 0.5, "nesterov": True})
        (3.0, 1.5)
    """
    mu = float(group.get("momentum", 0.0))
    if not mu:
        return 2.0
    share = 1 - float(group.get("dampening", 0.0))
    return 2 * (1 + mu) / ((1 + 2 * mu) if group.get("nesterov") else 1) / share


_FACTORS: dict[type, Callable[[Mapping[str, Any]], float]] = {
    torch.optim.Adam: lambda group: _averaged(float(group["betas"][0])),
    torch.optim.AdamW: lambda group: _averaged(float(group["betas"][0])),
    torch.optim.Adamax: lambda group: _averaged(float(group["betas"][0])),
    torch.optim.RMSprop: lambda group: 2 * (1 + float(group["momentum"])),
    torch.optim.Adagrad: lambda group: 2.0,
}


def _averaged(beta: float) -> float:
    """Of a step along the exponential average of gradients."""
    return 2 * (1 + beta) / (1 - beta)


def _adaptive(optimizer: type, group: Mapping[str, Any]) -> tuple[str, float]:
    kind = next((k for k in optimizer.__mro__ if k in _FACTORS), None)
    return (kind.__name__, _FACTORS[kind](group)) if kind else ("", 0.0)


def _limit(
    name: str,
    factor: float,
    formula: str,
    curvature: Estimate | None,
    lr: float,
    kind: Literal["bound", "standard error"] = "bound",
) -> Limit:
    if curvature is None:
        return Limit(name=name, rate=None, kind=kind, note=f"{formula}, which was not measured")
    if curvature.value <= 0:
        rate, said = Estimate(math.inf), ", no positive curvature"
    else:
        rate = Estimate(factor / curvature.value, factor / curvature.value**2 * curvature.stderr)
        said = "" if math.isnan(lr) else f"; lr = {lr:g} is {lr / rate.value:.2g} of it"
    return Limit(name=name, rate=rate, kind=kind, note=formula + said)
