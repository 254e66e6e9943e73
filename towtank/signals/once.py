"""One step without a loop: what probes say of a model now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from towtank.problem import Problem
from towtank.signals.capture import capture
from towtank.signals.step import Step


def look(
    model: nn.Module,
    loss: Callable[..., Any],
    batch: Any,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> Step:
    """A `Step` for probes, made of one forward and backward pass on a batch; nothing is trained and nothing changed.

    Its gradients are those of the batch, what was seen is the forward pass; there is no update and there are no parts.

    Args:
        model: the network.
        loss: `loss(outputs, targets)` -> mean.
        batch: one batch, see `Problem`.
        optimizer: for probes that read it.
        options: of `Problem`: mode, dropout, forward, ...; also `keep`, globs of modules whose inputs and outputs are kept.

    Raises:
        TypeError: if model, loss and batch do not make a problem.
        ValueError: if the loss is not finite.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 3.0)
        >>> step = look(model, nn.functional.mse_loss, (torch.ones(1, 1), torch.zeros(1, 1)))
        >>> float(step.loss), step.gradients["weight"]
        (9.0, tensor([[6.]]))
    """
    keep = tuple(options.pop("keep", ()))
    problem = Problem(model, loss, batch, **options)
    with capture(problem.network, keep, eager=True) as seen:
        value, gradient = problem.gradient()
    found: dict[str, Any] = {"seen": seen, "gradients": problem.unflatten(gradient)}
    return Step(
        number=1,
        loss=torch.tensor(value),
        model=problem.network,
        optimizer=optimizer,
        batch=batch,
        recorded=found,
        problem_of=lambda raw: problem if raw is batch else problem.replace(data=raw),
        probe_batch=batch,
    )
