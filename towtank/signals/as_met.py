"""The curvature that an optimizer meets: with its weight decay, its preconditioner, and the rates of its groups.

P: number of parameters; H: Hessian on the probe batch; w: weight decay; D: diagonal preconditioner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from towtank.linalg.operator import LinearOperator

if TYPE_CHECKING:
    from towtank.problem import Problem


class Decayed(LinearOperator):
    """H + diag(w): the curvature with weight decay that is part of the gradient.

    Args:
        op: H, symmetric.
        decay: w, (P,).

    Example:
        >>> Decayed(LinearOperator.from_matrix(torch.eye(2)), torch.tensor([0.0, 0.5])).dense()
        tensor([[1.0000, 0.0000],
                [0.0000, 1.5000]])
    """

    def __init__(self, op: LinearOperator, decay: Tensor) -> None:
        super().__init__(
            op.shape[0],
            dtype=op.dtype,
            device=op.device,
            convention=f"{op.convention} with weight decay",
            slices=op.slices,
            cost=op.cost,
        )
        self.op, self.decay = op, decay.to(op.device, op.dtype)[:, None]

    def _matmat(self, X: Tensor) -> Tensor:
        return self.op @ X + self.decay * X


def as_met(op: LinearOperator, optimizer: torch.optim.Optimizer, problem: Problem, D: Tensor | None) -> LinearOperator:
    """The curvature that an optimizer meets: D^-1/2 (H + diag(w)) D^-1/2.

    w is the weight decay that is added to the gradient (coupled); decoupled decay is no part of it. Without a D, where groups
    learn at different rates, D is the largest rate over a parameter's own, so that limits hold for the largest rate; what the
    optimizer does not move has an infinite D.

    Args:
        op: H, in the order of the problem.
        optimizer: whose groups are read.
        problem: whose parameters vary.
        D: preconditioner (P,), None for plain descent.

    Raises:
        ValueError: if D is not positive.
    """
    from towtank.curvature.preconditioned import Preconditioned

    groups = {p: g for g in optimizer.param_groups for p in g["params"]}
    mine = [groups.get(p) for p in problem.parameters()]
    w = [float(g.get("weight_decay", 0.0)) if g and _coupled(optimizer, g) else 0.0 for g in mine]
    if any(w):
        op = Decayed(op, _spread(w, problem))
    if D is None:
        rates = [float(g["lr"]) if g else 0.0 for g in mine]
        if len(set(rates)) > 1:
            D = _spread([max(rates) / rate if rate else math.inf for rate in rates], problem)
    return op if D is None else Preconditioned(op, D)


def _coupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    if "decay" in group:  # of towtank.optim
        return group["decay"] == "coupled"
    return not isinstance(optimizer, torch.optim.AdamW) and not group.get("decoupled_weight_decay", False)


def _spread(values: list[float], problem: Problem) -> Tensor:
    """One value for each parameter, as a vector (P,)."""
    counts = torch.tensor([p.numel() for p in problem.parameters()])
    return torch.tensor(values, dtype=torch.float64).repeat_interleave(counts).to(problem.device)


def preconditioner(optimizer: torch.optim.Optimizer, problem: Problem) -> Tensor:
    """D (P,) of the optimizer's state: see `towtank.adam_preconditioner`; of `towtank.optim`, what the optimizer itself says.

    Args:
        optimizer: adaptive, after its first step.
        problem: whose parameters vary.

    Raises:
        TypeError: if the kind of optimizer is not known.
        ValueError: if a parameter has no state yet.
    """
    from towtank.curvature.preconditioned import adam_preconditioner

    if not hasattr(optimizer, "rule"):
        return adam_preconditioner(optimizer, problem)
    if not optimizer.state:
        raise ValueError("expected an optimizer that has taken a step, got one without state; take a step first")
    found: dict[str, Tensor] = optimizer.preconditioner()  # pyright: ignore[reportAttributeAccessIssue]
    groups = {p: g for g in optimizer.param_groups for p in g["params"]}
    names = [optimizer.name_of(p) if p in groups else "" for p in problem.parameters()]  # pyright: ignore[reportAttributeAccessIssue]
    missing = [n for n, own in zip(problem.names, names, strict=True) if own not in found]
    if missing:
        raise ValueError(f"expected an optimizer that has taken a step with {missing[0]}, got no state for it")
    rates = [float(groups[p]["lr"]) for p in problem.parameters()]
    slower = [max(rates) / r if r else math.inf for r in rates]
    parts = [found[n].detach().double().reshape(-1) * s for n, s in zip(names, slower, strict=True)]
    return torch.cat([part.to(problem.device) for part in parts])
