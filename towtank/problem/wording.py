"""What is said of a problem, and what its arguments must be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from towtank.problem.problem import Problem


def convention(problem: Problem) -> str:
    """Which loss this is: mean of what over how many terms, of which parameters, in which mode."""
    count, batches = problem.survey.total, len(problem.survey.counts)
    loss = getattr(problem.loss, "func", problem.loss)  # of a partial function
    loss = getattr(loss, "__name__", None) or type(loss).__name__
    every = sum(p.numel() for p in problem.network.parameters())
    statistics = "statistics of " + ("each batch" if batches > 1 else "the batch")
    parts = [
        f"mean of {loss} over {count:g} terms in {batches} batch{'es' if batches > 1 else ''}",
        "labels shifted by one" if problem.shifted and problem.survey.mappings and problem.forward is None else "",
        f"{problem.size} of {every} parameters of {type(problem.network).__name__}",
        "eval mode" if problem.mode == "eval" else statistics,
        "dropout on, masks fixed" if problem.dropout else "",
        str(problem.dtype).removeprefix("torch."),
        "no weight decay",
    ]
    return ", ".join(p for p in parts if p)


def check_arguments(problem: Problem) -> None:
    """Refuse arguments of the wrong kind.

    Raises:
        TypeError: if the model is no module, or the loss no function.
        ValueError: if the loss is no mean, or the mode unknown.
    """
    if not isinstance(problem.model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module as model, got {type(problem.model).__name__}")
    if not callable(problem.loss):
        raise TypeError(f"expected a function loss(outputs, targets), got {type(problem.loss).__name__}")
    keywords = getattr(problem.loss, "keywords", {})
    reduction = keywords.get("reduction", getattr(problem.loss, "reduction", "mean"))
    if reduction in ("sum", "none"):
        raise ValueError(
            f"expected a loss that is a mean, got reduction={reduction!r}; use reduction='mean' (and scale the operator)"
        )
    if problem.mode not in ("eval", "train"):
        raise ValueError(f"expected mode 'eval' or 'train', got {problem.mode!r}")
