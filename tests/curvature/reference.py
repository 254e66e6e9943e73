"""What operators are compared with: float64 finite differences of the plain gradient of the plain loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature.cases import Case


def doubled(batch: Any) -> Any:
    """A batch in float64."""
    if isinstance(batch, dict):
        return {k: doubled(v) for k, v in batch.items()}
    if isinstance(batch, tuple):
        return tuple(doubled(v) for v in batch)
    return batch.double() if batch.dtype.is_floating_point else batch


def in_float64(model: nn.Module) -> nn.Module:
    """A copy in float64; Hugging Face's norms, which compute in float32 whatever they are given, are replaced by torch's."""
    model = copy.deepcopy(model).double()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.numel(), eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model


def plain_loss(model: nn.Module, loss: Callable[..., Tensor], batch: Any) -> Tensor:
    """The loss as a user would write it."""
    if isinstance(batch, dict):
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:])
    return loss(model(batch[0]), batch[1])


def plain_gradient(model: nn.Module, loss: Callable[..., Tensor], batch: Any, at: Tensor) -> Tensor:
    """Flat gradient at flat parameters (P,)."""
    parameters = list(model.parameters())
    with torch.no_grad():
        for p, part in zip(parameters, at.split([p.numel() for p in parameters])):
            p.copy_(part.view_as(p))
    grads = torch.autograd.grad(plain_loss(model, loss, batch), parameters)
    return torch.cat([g.reshape(-1) for g in grads])


def product(case: Case, v: Tensor) -> Tensor:
    """H v in float64 by Romberg's extrapolation of central differences.

    Four halvings of the step cancel errors up to its eighth power; what is left is rounding, about 1e-15 / step of the gradient.
    Kinks are avoided by a short step: between them the gradient is smooth.
    """
    model, loss, batch = case.make()
    model, batch = in_float64(model), doubled(batch)
    at = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    v = v.double()
    first = (2e-2 if case.smooth else 1e-4) / float(v.norm())

    def central(e: float) -> Tensor:
        ahead, behind = (plain_gradient(model, loss, batch, at + s * e * v) for s in (1, -1))
        return (ahead - behind) / (2 * e)

    rows = [central(first / 2**k) for k in range(4 if case.smooth else 2)]
    for order in range(1, len(rows)):
        rows = [(4**order * b - a) / (4**order - 1) for a, b in zip(rows, rows[1:])]
    return rows[0]
