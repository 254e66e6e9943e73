"""Output logits: divergence of log Z, softmax collapse, and gradients that only scale the weights.

Shapes: R rows, one for every softmax; B batch, T positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from towtank.problem.data import is_batch, is_mapping, target_key
from towtank.problem.forward import shifts, targets_of
from towtank.signals.output_stats import Output
from towtank.signals.readings import norms
from towtank.signals.step import CannotTell, Readings, Step


def gradient_alignment(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Tensor:
    """cos(-g, w) over all parameters that have a gradient; positive where the step makes the weights longer.

    cos(-g, w) = -sum <g, w> / sqrt(sum |g|^2 sum |w|^2). A loss that falls along the weights themselves falls because the logits
    are scaled up, not because more is learned (naive loss minimization). 0 where either is 0.

    Args:
        parameters: {name: w}.
        gradients: {name: g}, of the same shapes.

    Raises:
        ValueError: if no parameter has a gradient.

    Example:
        >>> w = torch.tensor([3.0, 4.0])
        >>> round(float(gradient_alignment({"w": w}, {"w": torch.tensor([0.0, -1.0])})), 6)
        0.8

    Source: Prieto et al. 2025, section 4.
    """
    names = [n for n in gradients if n in parameters and gradients[n].numel()]
    if not names:
        raise ValueError("expected gradients of some parameters, got none; call backward before")
    quick = _quick_alignment([gradients[n] for n in names], [parameters[n] for n in names])
    if quick is not None:
        return quick
    home = parameters[names[0]].device
    sums = torch.stack([_products(gradients[n], parameters[n]).to(home) for n in names]).sum(dim=0)
    product, g_square, w_square = sums
    scale = g_square.sqrt() * w_square.sqrt()
    return torch.where(scale == 0, torch.zeros_like(scale), -product / scale)


def _quick_alignment(g: list[Tensor], w: list[Tensor]) -> Tensor | None:
    """The same where plain sums are safe, on a CPU: squares of ordinary size."""
    if any(x.device.type != "cpu" or x.layout != torch.strided for x in (*g, *w)):
        return None
    sizes = [torch.stack([n.double() for n in norms(x)]).norm() for x in (g, w)]
    if not all(1e-12 < float(size) < 1e12 for size in sizes):
        return None
    wide = torch.float64 if any(x.dtype == torch.float64 for x in (*g, *w)) else torch.float32
    flat = [[x.detach().reshape(-1).to(wide) for x in xs] for xs in (g, w)]
    dots = [a.dot(b) for a, b in zip(*flat, strict=True)]
    return -torch.stack(dots).double().sum() / (sizes[0] * sizes[1])


def _products(g: Tensor, w: Tensor) -> Tensor:
    """<g, w>, |g|^2 and |w|^2 (3,); scaled meanwhile, as gradients of a collapsed softmax have squares below any float32."""
    g, w = ((x.to_dense() if x.layout != torch.strided else x).detach().reshape(-1) for x in (g, w))
    g, w = (x if x.dtype == torch.float64 else x.float() for x in (g, w))
    tops = torch.stack([x.abs().amax().clamp_min(torch.finfo(x.dtype).tiny) for x in (g, w)])
    a, b = tops if g.device.type == "mps" else tops.double()
    g, w = g / tops[0], w / tops[1]
    return torch.stack([g.dot(w) * a * b, g.dot(g) * a * a, w.dot(w) * b * b])


class _OutputProbe:
    name = "output"
    needs = frozenset({"seen"})

    def __call__(self, step: Step) -> Readings:
        found: dict[str, Tensor] = {}
        if step.gradients:
            found["output/gradient_alignment"] = gradient_alignment(_before(step), step.gradients)
        out, targets = step.seen.output, _targets(step.batch)
        if out is not None and not _of_another_kind(out, targets, step):
            found |= {"output/log_z_mean": out.log_z_mean, "output/log_z_min": out.log_z_min}
            found |= {"output/max_logit": out.max_logit, "output/collapse": out.collapse}
            zero = _zero_losses(step, out, targets)
            found |= {} if zero is None else {"output/zero_losses": zero}
        if not found:
            raise CannotTell(
                "; ".join(step.seen.unseen) or "no output logits were seen; the model returns no scores of classes"
            )
        return found


def output() -> Callable[[Step], Readings]:
    """A probe of output logits z: log Z, largest logit, softmax collapse, zero losses, alignment of gradient and weights.

    log Z = log sum_j exp z_j drifts far from 0 before output logits diverge. A softmax has collapsed where
    sum_j exp(z_j - max z) is exactly 1 in the working precision: on its target, the loss and its gradient are then exactly 0.
    The working precision is that of the logits; float32 for halves under autocast, which widens the loss.

    Readings: `output/log_z_mean`, `output/log_z_min`, `output/max_logit`, `output/collapse` (share of rows),
    `output/zero_losses` (share of rows; only where the targets are known), `output/gradient_alignment`. Outputs that are
    compared with real targets of their own shape, as in regression, are no logits: of them only the alignment is told.

    Raises:
        CannotTell: by the probe, if there is none of them.

    Example:
        >>> from torch import nn
        >>> from towtank.signals.capture import capture
        >>> model, x, y = nn.Identity(), torch.tensor([[20.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0])
        >>> with capture(model) as seen:
        ...     loss = nn.functional.cross_entropy(model(x), y)
        >>> step = Step(number=1, loss=loss, model=model, recorded={"seen": seen})
        >>> found = output()(step)
        >>> float(found["output/collapse"]), float(found["output/zero_losses"]), float(found["output/max_logit"])
        (0.5, 0.5, 20.0)

    Source: Prieto et al. 2025; log Z: Wortsman et al. 2023, section 3.1.2.
    """
    return _OutputProbe()


def _before(step: Step) -> Mapping[str, Tensor]:
    """The weights at which the gradient was taken, where the update was recorded; else those after it."""
    updates = step.recorded.get("updates", {})
    return {n: p - updates[n] if n in updates else p for n, p in step.parameters.items()}


def _targets(batch: Any) -> Tensor | None:
    """Targets in a batch, labels of sequences as (B, T)."""
    if batch is None or not is_batch(batch) or (not is_mapping(batch) and len(batch) < 2):
        return None
    key = target_key(batch) if is_mapping(batch) else None
    found = batch[key] if key else targets_of(batch, default=False, shift=False)
    return found.detach() if isinstance(found, Tensor) else None


def _of_another_kind(out: Output, targets: Tensor | None, step: Step) -> bool:
    """Whether real targets of the shape of the outputs say that these are no logits (probabilities may)."""
    if targets is None or not targets.is_floating_point() or step.seen.losses:
        return False
    if targets.numel() != len(out.top_R) * out.rows_KV.shape[1]:
        return False
    sums = targets.reshape(-1, out.rows_KV.shape[1]).sum(dim=-1)
    return not bool((targets >= 0).all() & torch.isclose(sums, torch.ones_like(sums), atol=1e-2).all())


def _zero_losses(step: Step, out: Output, targets: Tensor | None) -> Tensor | None:
    if out.targets_R is not None:
        return out.zero_losses()
    if step.seen.losses or targets is None or targets.is_floating_point() or targets.dtype == torch.bool:
        return None
    last = step.seen.outputs[-1]  # of the batch at hand, where several were accumulated
    winner, classes = last.winner_R, targets.to(last.winner_R.device)
    if classes.numel() != len(winner):
        return None
    if classes.ndim == 2 and is_mapping(step.batch) and shifts(step.model):
        winner, classes = winner.view(classes.shape)[:, :-1], classes[:, 1:]
    valid = classes >= 0
    return ((winner.reshape(-1) == classes.reshape(-1)) & valid.reshape(-1)).sum() / valid.sum()
