"""Curvature as an adaptive optimizer meets it: D^-1/2 A D^-1/2, and D from the optimizer's own state.

P: number of parameters; m, v: the optimizer's averages of the gradient and of its square; t: its step; g: gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from towtank.linalg.operator import LinearOperator
from towtank.problem import Problem


class Preconditioned(LinearOperator):
    """D^-1/2 A D^-1/2 for a positive diagonal D: symmetric, with the eigenvalues of D^-1 A.

    An optimizer that moves the parameters by -lr D^-1 m sees these eigenvalues instead of A's. At the largest one, S, its step
    stops being stable: lr S > 2 for plain gradient descent with D, lr S > (2 + 2 beta1) / (1 - beta1) = 38 for
    Adam's averaged gradient, beta1 = 0.9.

    Args:
        op: A, symmetric.
        diagonal: D, (P,) or {name: tensor} of the parameters' shapes, positive. Infinite for what does not move.

    Raises:
        ValueError: if D does not fit, or is not positive.
        TypeError: if A is not symmetric.

    Example:
        >>> A = LinearOperator.from_matrix(torch.tensor([[2.0, 1.0], [1.0, 3.0]]))
        >>> Preconditioned(A, torch.tensor([4.0, 1.0])).dense()
        tensor([[0.5000, 0.5000],
                [0.5000, 3.0000]])

    Source: Cohen et al. 2022, "Adaptive gradient methods at the edge of stability", equation 2.
    """

    def __init__(self, op: LinearOperator, diagonal: Tensor | Mapping[str, Tensor]) -> None:
        if not op.symmetric:
            raise TypeError("expected a symmetric operator, got one that is not")
        D = (_flat(op, diagonal) if isinstance(diagonal, Mapping) else diagonal).detach()
        if D.shape != op.shape[:1]:
            raise ValueError(f"expected a diagonal of shape ({op.shape[0]},), got {tuple(D.shape)}")
        if not bool((D > 0).all()):
            bad = int((D > 0).logical_not().nonzero()[0])
            raise ValueError(f"expected a positive diagonal, got {float(D[bad])} at {bad}{_name(op, bad)}")
        super().__init__(
            op.shape[0],
            dtype=op.dtype,
            device=op.device,
            semidefinite=op.semidefinite,
            convention=f"D^-1/2 A D^-1/2, D a diagonal, A the {op.convention}",
            slices=op.slices,
            cost=op.cost,
        )
        self.op, self.diagonal = op, D.to(op.device, torch.float64 if D.dtype == torch.float64 else op.dtype)
        self._scale = self.diagonal.rsqrt().to(op.dtype)[:, None]

    def _matmat(self, X: Tensor) -> Tensor:
        return self._scale * (self.op @ (self._scale * X))

    def _restricted(self, index: Tensor | list[str]) -> LinearOperator:
        places = index if isinstance(index, Tensor) else self._coordinates(index)
        return Preconditioned(self.op._restricted(index), self.diagonal[places])

    def control(self) -> LinearOperator | None:
        """The preconditioned control variate of A."""
        control = self.op.control()
        return None if control is None else Preconditioned(control, self.diagonal)

    def exact_diagonal(self) -> tuple[Tensor, float] | None:
        """The diagonal of A over D."""
        exact = self.op.exact_diagonal()
        return None if exact is None else (exact[0] / self.diagonal, exact[1])


def _flat(op: LinearOperator, named: Mapping[str, Tensor]) -> Tensor:
    if set(named) != set(op.slices):
        odd = ", ".join(sorted(set(named) ^ set(op.slices)))
        raise ValueError(
            f"expected a diagonal for exactly the parameters of the operator, got too much or too little: {odd}"
        )
    for name, part in named.items():
        if part.numel() != op.slices[name].stop - op.slices[name].start:
            raise ValueError(
                f"expected {op.slices[name].stop - op.slices[name].start} entries for {name}, got {part.numel()}"
            )
    return torch.cat([named[name].detach().reshape(-1) for name in op.slices])


def _name(op: LinearOperator, place: int) -> str:
    return next((f" ({name})" for name, s in op.slices.items() if s.start <= place < s.stop), "")


def adam_preconditioner(optimizer: torch.optim.Optimizer, problem: Problem) -> Tensor:
    """D (P,) of an optimizer that moves parameters by -lr D^-1 (averaged gradient), from its actual state.

    Adam, AdamW, NAdam: D = sqrt(v / (1 - beta2^t)) + eps (of the largest v so far with `amsgrad`). RMSprop: sqrt(v) + eps, with
    the variance instead of v where it is centered. Adagrad: (sqrt(sum g^2) + eps) (1 + (t - 1) lr_decay). Adamax: max |g|.
    Where parameter groups have different learning rates, D is in units of the largest: a group that learns at half of it has
    twice its D, and one that stands still an infinite one. So limits on S hold for the largest learning rate. Adam's other
    correction, 1 - beta1^t of the averaged gradient, is gone after some 30 steps and left out.

    Args:
        optimizer: of `torch.optim`; fused, capturable and foreach ones alike.
        problem: whose parameters vary; its order is that of D.

    Raises:
        TypeError: if the optimizer is of another kind.
        ValueError: if a parameter is not in the optimizer, or has no state yet.

    Example:
        After one step v / (1 - beta2) = g^2, so that D = |g| + eps.

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> (3 * model.weight).sum().backward(); optimizer.step()
        >>> problem = Problem(model, torch.nn.functional.mse_loss, (torch.ones(1, 1), torch.ones(1, 1)))
        >>> adam_preconditioner(optimizer, problem)
        tensor([3.])

    Source: Kingma and Ba 2015, algorithm 1; Cohen et al. 2022, section 2.
    """
    rule = next((_RULES[kind] for kind in type(optimizer).__mro__ if kind in _RULES), None)
    if rule is None:
        known = ", ".join(kind.__name__ for kind in _RULES)
        raise TypeError(
            f"expected one of the optimizers {known}, got {type(optimizer).__name__}; give its D to Preconditioned yourself"
        )
    groups = {p: group for group in optimizer.param_groups for p in group["params"]}
    fastest = max((float(groups[p]["lr"]) for p in problem.parameters() if p in groups), default=0.0)
    parts = []
    for name, p in zip(problem.names, problem.parameters()):
        if p not in groups:
            raise ValueError(f"expected an optimizer of all parameters of the problem, got one without {name}")
        state, group = optimizer.state.get(p, {}), groups[p]
        if not state:
            raise ValueError(
                f"expected an optimizer that has taken a step with {name}, got no state for it; take a step with a gradient, "
                "or leave the parameter out by params="
            )
        if not float(state.get("step", 1)):
            raise ValueError(f"expected an optimizer that has taken a step with {name}, got step 0; take a step first")
        D = rule({k: _wide(x) for k, x in state.items()}, group)
        slower = fastest / float(group["lr"]) if group["lr"] else math.inf
        parts.append((D if fastest == 0 else D * slower).reshape(-1))
    return torch.cat([part.to(problem.device) for part in parts]).to(problem.dtype)


def _wide(x: Any) -> Any:
    return x.detach().double() if isinstance(x, Tensor) else x


def _adam(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    v = state["max_exp_avg_sq"] if group.get("amsgrad") else state["exp_avg_sq"]
    return (v / (1 - float(group["betas"][1]) ** float(state["step"]))).sqrt() + group["eps"]


def _rmsprop(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    v = state["square_avg"] - state["grad_avg"].square() if group["centered"] else state["square_avg"]
    return v.clamp(min=0).sqrt() + group["eps"]


def _adagrad(state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    return (state["sum"].sqrt() + group["eps"]) * (1 + (float(state["step"]) - 1) * group["lr_decay"])


def _adamax(state: dict[str, Any], _: dict[str, Any]) -> Tensor:
    return state["exp_inf"]


_RULES: dict[type, Callable[[dict[str, Any], dict[str, Any]], Tensor]] = {
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.NAdam: _adam,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
    torch.optim.Adamax: _adamax,
}
