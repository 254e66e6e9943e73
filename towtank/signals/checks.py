"""Whether a monitor was asked for something that makes sense, and whether a loop calls it where it should."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from towtank.problem import Problem
from towtank.problem.data import is_mapping
from towtank.signals.step import Step

_OPTIONS = {f.name for f in dataclasses.fields(Problem)} - {"model", "loss", "data", "first"}


def innermost(optimizer: Any) -> Any:
    """The optimizer inside wrappers such as Accelerate's."""
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def check_model(model: Any, optimizer: Any) -> None:
    """Refuse what is no model that an optimizer trains.

    Raises:
        TypeError: if the model is no module, or the optimizer none.
        ValueError: if the model has no parameter that requires a gradient, or the optimizer moves none of them.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module as model, got {type(model).__name__}")
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not trained:
        raise ValueError("expected parameters that require a gradient, got none; make the monitor after they are set")
    if isinstance(optimizer, list | tuple):
        raise TypeError(
            f"expected one torch.optim.Optimizer, got {len(optimizer)}; make a monitor for each network with its own"
        )
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not trained & {id(p) for group in optimizer.param_groups for p in group["params"]}:
        raise ValueError("expected an optimizer of the model's parameters, got one that has none of them")


def check_settings(
    *, every: Any, budget: Any, loss: Any, probes: Any, rules: Any, sinks: Iterable[Any], options: Mapping[str, Any]
) -> None:
    """Refuse settings that cannot work, before the training has begun.

    Raises:
        TypeError: if a number is none, something that must be called cannot be, or an option is unknown.
        ValueError: if a number is out of range.
    """
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f"expected every to be a whole number of steps, got {every!r}")
    if every < 1:
        raise ValueError(f"expected every to be a positive number of steps, got {every}")
    if isinstance(budget, bool) or not isinstance(budget, int | float):
        raise TypeError(f"expected a budget between 0 and 1, such as 0.05; got {budget!r}")
    if not 0 < budget <= 1:
        raise ValueError(f"expected a budget above 0 and at most 1, a share of the loop's time; got {budget}")
    if loss is not None and (not callable(loss) or isinstance(loss, type)):
        raise TypeError(f"expected a function loss(outputs, targets), got {loss!r}; give F.mse_loss, or nn.MSELoss()")
    for what, given in (("probes", probes), ("rules", rules)):
        if given is not None and (not isinstance(given, list | tuple) or not all(callable(x) for x in given)):
            raise TypeError(f"expected {what} to be a list of functions, got {given!r}")
    for sink in sinks:
        if not hasattr(sink, "write"):
            raise TypeError(
                f"expected sinks with write, alarm, note and close, got {sink!r}; see towtank.signals.sinks"
            )
    unknown = [name for name in options if name not in _OPTIONS]
    if unknown:
        close = get_close_matches(unknown[0], [*_OPTIONS, "loss", "out", "probes", "rules", "sinks", "config"], n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(_OPTIONS))}"
        raise TypeError(f"expected options of a Problem, got {unknown[0]!r}{hint}")


def misplaced(step: Step, *, moved: bool | None, scaled: bool) -> str | None:
    """What is wrong with the place of `monitor.step` in the loop, in a sentence, or None.

    Args:
        step: as it was seen.
        moved: whether the optimizer has moved since the last call; None where nobody looked.
        scaled: whether a gradient scaler may have skipped the step.
    """
    if step.optimizer is not None and moved is False and not scaled:
        return "the optimizer has not moved since the last call; call monitor.step after optimizer.step()"
    if not step.gradients:
        return "there are no gradients; call monitor.step after optimizer.step() and before optimizer.zero_grad()"
    return None


def broken_examples(batch: Any) -> list[int]:
    """Places along the first axis at which tensors of a batch are not finite.

    Example:
        >>> broken_examples((torch.tensor([[1.0], [float("nan")]]), torch.tensor([0, 1])))
        [1]
    """
    found: set[int] = set()
    for x in tree_leaves(dict(batch) if is_mapping(batch) else batch):
        if isinstance(x, Tensor) and x.is_floating_point() and x.ndim and x.numel():
            bad = ~torch.isfinite(x.detach().reshape(len(x), -1)).all(dim=1)
            found |= set(bad.nonzero()[:, 0].tolist())
    return sorted(found)
