"""The second derivative of a loss in the outputs of the model: closed forms where they hold, autograd elsewhere.

A form is recognised by how the loss behaves, not by its name, so that one rule covers `F.cross_entropy` with masks,
class weights, soft labels or label smoothing, the loss of a Hugging Face model, a fused kernel and a lambda. For a
generalized linear model the gradient is s (mu(z) - t), so that grad L(z) - grad L(z') = s (mu(z) - mu(z')) for *any* z and z':
the weights s are fitted at two random points, x and -x, and the identity and a finite difference are then checked at the outputs
themselves. A loss that fails is differentiated twice by autograd, and that is checked by a finite difference too.

z: outputs, any shape. Row: the outputs of one softmax; C: classes, the length of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from towtank.curvature.output_matrix import Elementwise, Likelihood, OutputMatrix, Softmax, in_blocks

Loss = Callable[[Tensor], Tensor]
# The second derivative of the log-normalizer, mu'(z), in a form that keeps its digits where it is small.
_VARIANCES: dict[Likelihood, Callable[[Tensor], Tensor]] = {
    "gaussian": torch.ones_like,
    "bernoulli": lambda z: torch.sigmoid(z) * torch.sigmoid(-z),
    "poisson": torch.exp,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Differentiated(OutputMatrix):
    """The second derivative by autograd, on a graph of the loss alone.

    Args:
        point: z, a leaf that requires a gradient.
        gradient: of the loss at z, with the graph to differentiate it.
    """

    point: Tensor
    gradient: Tensor
    semidefinite: bool = False
    likelihood: Likelihood | None = None

    def apply(self, u: Tensor) -> Tensor:
        """The derivative of <gradient, u>."""
        if not self.gradient.requires_grad:
            return torch.zeros_like(u)
        (product,) = torch.autograd.grad(
            self.gradient, self.point, u, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return product


@dataclass(frozen=True, kw_only=True)
class Form:
    """What one batch's loss was recognised as: enough to write its second derivative down at other outputs.

    Args:
        kind: softmax rows, a sum over single outputs, or neither.
        weights: s of the rows of a softmax, or of the single outputs of a known likelihood.
        axis: the class axis of a softmax, counted from the end.
        likelihood: the distribution whose negative log-likelihood, up to weights, the loss is.
    """

    kind: Literal["softmax", "elementwise", "other"]
    weights: Tensor | None = None
    axis: int = -1
    likelihood: Likelihood | None = None

    def at(self, loss: Loss, outputs: Tensor) -> OutputMatrix:
        """The second derivative of the loss in the outputs."""
        z = outputs.detach()
        if self.kind == "other":
            return _differentiated(loss, z)
        if self.kind == "softmax" and self.weights is not None:
            return Softmax(outputs=z, weights=self.weights, axis=self.axis)
        if self.likelihood and self.weights is not None:
            return Elementwise(diagonal=self.weights * _VARIANCES[self.likelihood](z), likelihood=self.likelihood)
        return Elementwise(diagonal=_differentiated(loss, z).apply(torch.ones_like(z)))


def recognise(loss: Loss, outputs: Tensor, *, curved: bool = True) -> Form:
    """Which form the loss has in its outputs, tried on the loss itself.

    Args:
        loss: from outputs to a scalar, with the targets of one batch already in it.
        outputs: of the model for that batch.
        curved: whether a loss that is linear in the outputs is refused.

    Raises:
        ValueError: if the loss does not depend on the outputs, or only linearly: then there is no curvature to see.
        NotImplementedError: if the second derivative does not exist and no closed form holds.

    Example:
        >>> target = torch.tensor([0, 2])
        >>> form = recognise(lambda z: torch.nn.functional.cross_entropy(z, target), torch.randn(2, 3))
        >>> form.kind, [round(s, 6) for s in form.weights.tolist()]
        ('softmax', [0.5, 0.5])
        >>> recognise(lambda z: (z - 1).square().mean(), torch.randn(2, 3)).likelihood
        'gaussian'
    """
    z = outputs.detach()
    form = _as_softmax(loss, z)
    if form is not None:
        return form
    second = _differentiated(loss, z)
    probe = _noise(z, seed=2)
    product, diagonal = second.apply(probe), second.apply(torch.ones_like(z))
    if not _differences_agree(loss, z, product, slope(loss, z).abs().amax()):
        raise NotImplementedError(
            "expected a loss with a second derivative, got one whose products disagree with differences of its gradient: "
            "a part of it has a backward pass that autograd cannot differentiate; write that part in plain operations"
        )
    if not product.any() and not diagonal.any():
        if not curved:
            return Form(kind="other")
        raise ValueError(
            "expected a loss that is curved in the outputs, got one that is constant or linear in them; let the model "
            "return logits and the loss take their logarithms, or use Hessian"
        )
    if not _close(product, diagonal * probe, (diagonal * probe).abs().amax()):
        return Form(kind="other")
    return _as_likelihood(loss, z, diagonal) or Form(kind="elementwise")


def _as_softmax(loss: Loss, z: Tensor) -> Form | None:
    """Softmax rows along the last or the second axis, if the gradients at three points and a difference say so."""
    if z.ndim == 0 or not z.numel():
        return None
    fit = _fit(loss, z)  # by itself, so that its copies of the outputs are gone before the next are made
    if fit is None or not fit[0].any():
        return None
    weights, axis = fit
    product = Softmax(outputs=z, weights=weights, axis=axis).apply(_noise(z, seed=2))
    if not _differences_agree(loss, z, product, weights.abs().amax()):
        return None
    return Form(kind="softmax", weights=weights, axis=axis, likelihood="categorical")


def _fit(loss: Loss, z: Tensor) -> tuple[Tensor, int] | None:
    """Weights of softmax rows, and the axis along which they lie, if gradients at three points fit."""
    x = _noise(z, seed=0)
    away, opposite = _slope_anywhere(loss, x), _slope_anywhere(loss, -x)
    if away is None or opposite is None:
        return None
    points = x, z, away, opposite, slope(loss, z)
    for axis in dict.fromkeys((-1, min(1, z.ndim - 1) - z.ndim)):
        blocks = zip(*(in_blocks(point, axis, z.shape[axis]) for point in points))
        fitted = [_fitted(*block) for block in blocks]
        found = [s for s in fitted if s is not None]
        if len(found) == len(fitted):
            return torch.cat(found).reshape(z.movedim(axis, -1).shape[:-1]), axis
    return None


def _fitted(x: Tensor, z: Tensor, at_x: Tensor, opposite: Tensor, here: Tensor) -> Tensor | None:
    """Weights (rows,) with which gradients at x, -x and z (rows, C) differ as s softmax does, or None."""
    p = x.softmax(-1)
    step = (-x).softmax(-1) - p
    norm = step.square().sum(-1, keepdim=True)
    s = ((opposite - at_x) * step).sum(-1, keepdim=True) / norm.where(norm > 0, 1)
    scale = torch.stack([g.abs().amax(-1, keepdim=True) for g in (at_x, opposite, here)]).sum(0)
    holds = _close(opposite - at_x, s * step, scale) and _close(here - at_x, s * (z.softmax(-1) - p), scale)
    return s[:, 0] if holds else None


def _differences_agree(loss: Loss, z: Tensor, product: Tensor, size: Tensor) -> bool:
    """Whether a product with the second noise vector is the central difference of gradients along it.

    Gradients alone are asked, as a kernel whose backward pass is not differentiable gives no error but a zero. One entry
    in ten may differ, for a kink of the loss may lie within the step.

    Args:
        loss: from outputs to a scalar.
        z: outputs.
        product: to check.
        size: of the terms that cancel in the gradient, which sets its rounding.
    """
    eps, direction = torch.finfo(z.dtype).eps, _noise(z, seed=2)
    step = eps ** (1 / 3) * max(1.0, float(z.square().mean().sqrt()))
    difference = (slope(loss, z + step * direction) - slope(loss, z - step * direction)) / (2 * step)
    tolerance = 0.05 * product.abs().amax() + 64 * eps / step * size
    wrong = (difference - product).abs() > tolerance
    seen = (difference != 0) | (product != 0)
    return int(wrong.sum()) <= 0.1 * int(seen.sum())


def _as_likelihood(loss: Loss, z: Tensor, diagonal: Tensor) -> Form | None:
    """The distribution whose variance explains the diagonal both here and at another point, if there is one."""
    other = _noise(z, seed=0).tanh()
    if _slope_anywhere(loss, other) is None:
        return None
    elsewhere = _differentiated(loss, other).apply(torch.ones_like(z))
    for likelihood, variance in _VARIANCES.items():
        weights = elsewhere / variance(other)
        if _close(diagonal, weights * variance(z), (weights * variance(z).clamp(min=1)).abs()):
            return Form(kind="elementwise", weights=weights, likelihood=likelihood)
    return None


def _slope_anywhere(loss: Loss, z: Tensor) -> Tensor | None:
    """The gradient at outputs that no model gave; None if the loss refuses them, as one of probabilities does.

    Raises:
        OutOfMemoryError: if memory runs out.
    """
    try:
        return slope(loss, z)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        return None


def slope(loss: Loss, z: Tensor) -> Tensor:
    """The gradient of the loss in the outputs."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(_value(loss, leaf), leaf, allow_unused=True, materialize_grads=True)
    return gradient


def _differentiated(loss: Loss, z: Tensor) -> Differentiated:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(
            _value(loss, leaf), leaf, create_graph=True, allow_unused=True, materialize_grads=True
        )
    return Differentiated(point=leaf, gradient=gradient)


def _value(loss: Loss, leaf: Tensor) -> Tensor:
    value = loss(leaf)
    if not value.requires_grad:
        raise ValueError("expected a loss that depends on the outputs, got one without a gradient; do not detach them")
    return value


def _noise(z: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)


def _close(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    """Whether a = b up to half the digits of the scale: rounding passes, another function does not."""
    return bool(((a - b).abs() <= torch.finfo(a.dtype).eps ** 0.5 * scale).all())
