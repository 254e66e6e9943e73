"""Which parameter, input or module a loss that is not finite comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from towtank.problem.data import Batch
    from towtank.problem.problem import Problem


def check_finite(problem: Problem, loss: Tensor, batch: Batch) -> Tensor:
    """The loss itself, if it is finite.

    Raises:
        ValueError: naming what it comes from.
    """
    if not bool(torch.isfinite(loss.detach())):
        raise ValueError(
            f"expected a finite loss, got {float(loss.detach())} on batch {batch.index}: {_culprit(problem, batch)}; "
            "mend it, or measure at a point before it went wrong"
        )
    return loss


def _culprit(problem: Problem, batch: Batch) -> str:
    bad = [n for n, p in problem.network.named_parameters() if not _finite(p)]
    if bad:
        return f"parameter {bad[0]} is not finite"
    if not all(_finite(x) for x in tree_leaves(batch.raw)):
        return "the batch itself is not finite"
    names = {m: n for n, m in problem.network.named_modules()}
    found: list[str] = []

    def look(module: nn.Module, _: Any, outputs: Any) -> None:
        if not found and module in names and not all(_finite(x) for x in tree_leaves(outputs)):
            found.append(names[module] or type(module).__name__)

    hook = register_module_forward_hook(look)
    try:
        with problem.measuring(), torch.no_grad():
            problem.outputs(batch)
    finally:
        hook.remove()
    return (
        f"the output of module {found[0]} is not finite" if found else "the outputs are finite, the loss of them is not"
    )


def _finite(x: Any) -> bool:
    if not isinstance(x, Tensor) or not (x.dtype.is_floating_point or x.dtype.is_complex):
        return True
    return bool(torch.isfinite(x.detach()).all())
