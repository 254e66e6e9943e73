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
        share = 1 - float(group.get("dampening", 0.0)) if sgd else 1.0
        nesterov = sgd and bool(group.get("nesterov"))
        factor = 2 * (1 + mu) / ((1 + 2 * mu) if nesterov else 1) / share
        name = f"{'Nesterov ' if nesterov else ''}momentum {mu:g}"
        yield _limit(name, factor, f"{factor:.4g} / sharpness", found.get("sharpness"), lr if sgd else math.nan)
    kind, factor = _adaptive(optimizer, group)
    if factor:
        S = found.get("preconditioned sharpness")
        yield _limit(kind, factor, f"{factor:.4g} / preconditioned sharpness", S, lr)
    yield _limit("SGD, batch of 1", 2.0, "2 / Fisher trace", found.get("Fisher trace"), math.nan, "standard error")


_FACTORS: dict[type, Callable[[dict[str, Any]], float]] = {
    torch.optim.Adam: lambda group: _averaged(float(group["betas"][0])),
    torch.optim.AdamW: lambda group: _averaged(float(group["betas"][0])),
    torch.optim.Adamax: lambda group: _averaged(float(group["betas"][0])),
    torch.optim.RMSprop: lambda group: 2 * (1 + float(group["momentum"])),
    torch.optim.Adagrad: lambda group: 2.0,
}


def _averaged(beta: float) -> float:
    """Of a step along the exponential average of gradients."""
    return 2 * (1 + beta) / (1 - beta)


def _adaptive(optimizer: torch.optim.Optimizer | None, group: dict[str, Any]) -> tuple[str, float]:
    kind = next((k for k in type(optimizer).__mro__ if k in _FACTORS), None)
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
