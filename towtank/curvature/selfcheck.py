"""The first-use check of second derivatives, on a few examples.

Fused backward kernels may have no derivative, or one that silently misses terms; custom autograd functions may be wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from towtank.curvature.blame import blame
from towtank.curvature.comparison import Scalar, SelfCheck, compare
from towtank.problem import Problem
from towtank.problem.data import cut, is_batch

_EXAMPLES = 2  # few, to cost little; batch statistics need more than one


def self_check(problem: Problem) -> SelfCheck:
    """Check products with the Hessian of the first few examples.

    It costs two products, and two gradients in float64, of two examples.

    Raises:
        RuntimeError: naming the module that disagrees.
        MissingDerivative: if a second derivative does not exist.
    """
    few, size = few_examples(problem)
    native, wide = _losses(few)
    with few.backends():  # the backward passes too: autocast may be on outside
        found = compare(native, wide, list(few.leaves().values()), size)
    if not found.agrees:
        raise RuntimeError(
            "expected products with the Hessian to be symmetric and to agree with differences of gradients, got relative "
            f"errors {found.symmetry:.2g} and {found.error:.2g}: {blame(few)} has a wrong derivative, draws random numbers of "
            "its own, or computes in reduced precision (autocast inside?); mend it, or use "
            "Hessian(problem, method='finite_difference')"
        )
    if not found.decided:
        warnings.warn(
            f"the self-check of the Hessian cannot tell: differences of gradients are rough to {found.floor:.1g} of a product, "
            "as in reduced precision (autocast inside the model?); compare with method='finite_difference', or silence this with "
            "check=False",
            stacklevel=2,
        )
    return found


def few_examples(problem: Problem) -> tuple[Problem, int | None]:
    """The problem of the first few examples of the first batch, and their number; of the batch where it cannot be cut."""
    batch = next(iter(problem.batches()))
    whole = batch.raw if is_batch(batch.raw) else tuple(batch.raw)
    few = cut(whole, _EXAMPLES)
    if few is not None:
        cheap = problem.replace(data=few, first=batch.index, checks=False)
        try:
            with cheap.measuring(), torch.no_grad():
                (small,) = cheap.batches()
                if torch.isfinite(cheap.loss_of(cheap.outputs(small), small)):
                    return cheap, _EXAMPLES
        except (RuntimeError, ValueError, IndexError):  # the examples belong together; then all of them serve
            pass
    return problem.replace(data=whole, first=batch.index, checks=False), None


def _losses(problem: Problem) -> tuple[Scalar, Scalar]:
    """The loss of a problem of one batch as a function of its leaves: as it is measured, and in float64."""

    def loss_of(p: Problem) -> Scalar:
        (batch,) = p.batches()

        def loss(leaves: Sequence[Tensor]) -> Tensor:
            with p.measuring():
                return p.batch_loss(batch, dict(zip(p.names, leaves)))

        return loss

    return loss_of(problem), loss_of(problem.replace(precision=torch.float64))
