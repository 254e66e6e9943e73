"""Check the second derivatives of a function: symmetry, and one finite difference of its gradient in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from towtank.curvature.finite_difference import central_difference
from towtank.curvature.gradient_graph import GradientGraph

_NEAR = (
    1e-3  # of |Hv|: far above the rounding of float32, below the smallest error of a fused kernel seen so far (0.3 %)
)
# Steps relative to |theta|, and how near their difference must come. The smallest meets the fewest kinks of ReLU; longer ones
# serve forward passes that compute in float32 whatever they are given, and see curvature and kinks on the way.
_STEPS = ((1e-8, _NEAR), (1e-6, _NEAR), (1e-4, 3e-2), (1e-2, 0.3))

Scalar = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class SelfCheck:
    """What a check of second derivatives found.

    Args:
        symmetry: |u'Hv - v'Hu| / (|Hu| + |Hv|) for random u and v.
        error: |Hv - finite difference| / |Hv|.
        floor: difference of the finite differences of two steps, relative to |Hv|: what the check cannot see; 0 where the
            first agreed.
        tolerance: of symmetry and error.
        examples: number of examples it ran on; None where a batch cannot be cut and was taken whole.
    """

    symmetry: float
    error: float
    floor: float
    tolerance: float
    examples: int | None = None

    @property
    def agrees(self) -> bool:
        """Whether products are symmetric and agree with the finite difference, as far as that can tell."""
        return self.symmetry <= _NEAR and self.error <= self.tolerance + 10 * self.floor

    @property
    def decided(self) -> bool:
        """Whether the finite difference is sharp enough to tell."""
        return self.tolerance + 10 * self.floor < 0.1


def compare(native: Scalar, wide: Scalar, at: Sequence[Tensor], size: int | None = None) -> SelfCheck:
    """Check second derivatives of a function: symmetry, and differences of the gradient of `wide`, the same in float64.

    Args:
        native: function of tensors of the shapes of `at` -> ().
        wide: the same computed in float64; where that fails, differences of `native` serve.
        at: where.
        size: kept in the result.
    """
    leaves = [x.detach().requires_grad_() for x in at]
    v = torch.randn(sum(x.numel() for x in leaves), generator=torch.Generator().manual_seed(0)).to(leaves[0])
    u = v.flip(0)  # as random as v, and nothing but a copy
    graph = GradientGraph(native(leaves), leaves)
    Hu, Hv = graph.product(u), graph.product(v)
    slope = float(graph.gradient().norm())
    del graph
    symmetry = float((u @ Hv - v @ Hu).abs() / (Hu.norm() + Hv.norm()).clamp(min=1e-30))
    # below a small part of the length of a typical product, Hv is nothing but rounding
    flat = _flat(leaves).double()
    length = max(float(Hv.norm()), 1e-4 * slope * float(v.norm()) / (float(flat.norm()) or 1.0)) or 1.0

    def gradient(x: Tensor) -> Tensor:
        return _gradient(native, wide, leaves, x)

    error, floor, tolerance = _nearest(lambda step: central_difference(gradient, flat, v, step), Hv, length)
    if floor > tolerance and not torch.equal(gradient(flat), gradient(flat)):
        floor = 0.0  # rough because it draws random numbers: that is disagreement, not doubt
    return SelfCheck(symmetry=symmetry, error=error, floor=floor, tolerance=tolerance, examples=size)


def _nearest(difference: Callable[[float], Tensor], Hv: Tensor, length: float) -> tuple[float, float, float]:
    """Error of Hv relative to `length`, its floor, and the tolerance of the step that has the lowest floor."""
    best = (math.inf, math.inf, 1.0)
    for step, tolerance in _STEPS:
        near = difference(step)
        error = float((near - Hv).norm()) / length
        if error <= tolerance:  # two ways of computing one thing agree: nothing is left to ask
            return error, 0.0, tolerance
        floor = float((near - difference(2 * step)).norm()) / length
        if floor < best[1]:
            best = (error, floor, tolerance)
        if floor <= tolerance / 10:
            break
    return best


def _gradient(native: Scalar, wide: Scalar, leaves: Sequence[Tensor], flat: Tensor) -> Tensor:
    """Gradient at a flat float64 vector: of `wide`, or of `native` where a kernel or a constant is of another dtype."""

    def of(scalar: Scalar, dtypes: list[torch.dtype]) -> Tensor:
        xs = [p.to(d).requires_grad_() for p, d in zip(_shaped(flat, leaves), dtypes)]
        return _flat(torch.autograd.grad(scalar(xs), xs, allow_unused=True, materialize_grads=True)).double()

    try:
        return of(wide, [torch.float64] * len(leaves))
    except (RuntimeError, TypeError):
        return of(native, [x.dtype for x in leaves])


def _shaped(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [p.view(x.shape) for p, x in zip(flat.split([x.numel() for x in like]), like)]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])
