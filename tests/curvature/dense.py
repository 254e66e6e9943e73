"""Dense Gauss-Newton and Fisher matrices by the book: every row of the Jacobian by itself, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.curvature.cases import Case
from tests.curvature.reference import doubled, in_float64


def rows(outputs: Tensor, parameters: list[Tensor]) -> Tensor:
    """J (M, P): one backward pass for each output."""
    found = []
    for z in outputs.flatten():
        parts = torch.autograd.grad(z, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        found.append(torch.cat([p.flatten() for p in parts]))
    return torch.stack(found)


def gauss_newton(outputs: Tensor, loss: Callable[[Tensor], Tensor], parameters: list[Tensor]) -> Tensor:
    """J^T H J (P, P)."""
    J = rows(outputs, parameters)
    H = torch.autograd.functional.hessian(loss, outputs.detach()).reshape(len(J), len(J))
    return J.T @ H @ J


def wide(case: Case) -> tuple[nn.Module, Callable[..., Tensor], Any]:
    """The case in float64."""
    model, loss, batch = case.make()
    return in_float64(model), loss, doubled(batch)


def of_case(case: Case) -> Tensor:
    """The Gauss-Newton matrix (P, P) of a case."""
    model, loss, batch = wide(case)
    if isinstance(batch, dict):
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        function = lambda z: nn.functional.cross_entropy(z[:, :-1].transpose(1, 2), batch["labels"][:, 1:])  # noqa: E731
    else:
        outputs = model(batch[0])
        function = lambda z: loss(z, batch[1])  # noqa: E731
    return gauss_newton(outputs, function, list(model.parameters()))
