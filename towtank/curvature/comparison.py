"""Check the second derivatives of a function: symmetry, and one finite difference of its gradient in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from towtank.curvature.gradient_graph import GradientGraph
from towtank.linalg.draws import dot, norm, rademacher

_NEAR = (
    1e-3  # of |Hv|: far above the rounding of float32, below the smallest error of a fused kernel seen so far (0.3 %)
)
# Steps relative to |theta|, and how near their difference must come. The smallest meets the fewest kinks of ReLU; longer ones
# serve forward passes that compute in float32 whatever they are given, and see curvature and kinks on the way.
_STEPS = ((1e-8, _NEAR), (1e-6, _NEAR), (1e-4, 3e-2), (1e-2, 0.3))

_SUMS = 2**12

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
    generator, like = torch.Generator().manual_seed(0), leaves[0]
    u, v = (
        rademacher(sum(x.numel() for x in leaves), 1, generator, like=like.dtype, device=like.device)[:, 0]
        for _ in range(2)
    )
    graph = GradientGraph(native(leaves), leaves)
    slope = math.hypot(*(norm(g.detach().reshape(-1)) for g in graph.grads if g is not None))
    Hu = graph.product(u)
    vHu, scale = dot(v, Hu), norm(Hu)
    del Hu  # what lives at once is what the check adds to the peak memory of a first product
    Hv = graph.product(v)
    del graph
    symmetry = abs(vHu - dot(u, Hv)) / max(scale + norm(Hv), 1e-30)
    del u
    # below a small part of the length of a typical product, Hv is nothing but rounding
    theta = math.hypot(*(norm(x.detach().reshape(-1)) for x in leaves)) or 1.0
    length = max(norm(Hv), 1e-4 * slope * norm(v) / theta) or 1.0
    product = _sums(_shaped(Hv, leaves))
    del Hv

    def gradient(e: float) -> Tensor:
        return _sums(_gradient(native, wide, leaves, _shaped(v, leaves), e))

    def difference(step: float) -> Tensor:
        e = step * theta / norm(v)
        return (gradient(e) - gradient(-e)) / (2 * e)

    error, floor, tolerance = _nearest(difference, product, length)
    if floor > tolerance and not torch.equal(gradient(0.0), gradient(0.0)):
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
        if not near.any() and step < _STEPS[-1][0]:
            continue  # too short to move a parameter that is rounded to float32
        floor = float((near - difference(2 * step)).norm()) / length
        if floor < best[1]:
            best = (error, floor, tolerance)
        if floor <= tolerance / 10:
            break
    return best


def _gradient(
    native: Scalar, wide: Scalar, leaves: Sequence[Tensor], v: Sequence[Tensor], e: float
) -> tuple[Tensor, ...]:
    """Gradient at leaves + e v: of `wide`, or of `native` where a kernel or a constant is of another dtype."""

    def of(scalar: Scalar, dtypes: list[torch.dtype]) -> tuple[Tensor, ...]:
        moved = [x.detach().to(d, copy=True).add_(t, alpha=e) for x, t, d in zip(leaves, v, dtypes)]
        xs = [x.requires_grad_() for x in moved]
        return torch.autograd.grad(scalar(xs), xs, allow_unused=True, materialize_grads=True)

    try:
        return of(wide, [torch.float64] * len(leaves))
    except (RuntimeError, TypeError):
        return of(native, [x.dtype for x in leaves])


def _sums(parts: Sequence[Tensor]) -> Tensor:
    """Sums of runs of entries with random signs, four draws of signs, in float64: as long as all the entries together.

    A few times `_SUMS` numbers, so that two gradients in float64 need not be held at once. The length is exact for short
    runs and right to a percent or so for long ones.

    Source: Charikar, Chen, Farach-Colton 2002, "Finding frequent items in data streams".
    """
    run, sums = max(1, sum(p.numel() for p in parts) // _SUMS), []
    drawn = rademacher(run, 4, torch.Generator().manual_seed(1), like=parts[0].dtype, device=parts[0].device) / 2
    for part in parts:
        flat, signs = part.detach().reshape(-1), drawn.to(part.dtype)
        rest = len(flat) % run
        whole = flat[: len(flat) - rest]
        sums += [(whole.view(-1, run) @ signs).flatten(), flat[len(whole) :] @ signs[:rest]]
    return torch.cat([x.double() for x in sums])


def _shaped(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [p.view(x.shape) for p, x in zip(flat.split([x.numel() for x in like]), like)]
