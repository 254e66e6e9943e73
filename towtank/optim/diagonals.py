"""Samples of the curvature's diagonal, for `optimizer.observe_curvature`: the optimizers themselves never call autograd.

Each takes what a training step has anyway: the loss or the logits of a batch with their graph. Nothing is written to
`.grad`, and no global random state is touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def hutchinson_diagonal(
    loss: Tensor,
    params: Sequence[Tensor],
    *,
    generator: torch.Generator | None = None,
    average_kernels: bool = False,
) -> list[Tensor]:
    """Sample z * (H z) with z of random signs: E[z * (H z)] = diag(H).

    Under data parallelism (an initialized process group) the samples are averaged over the ranks, which is unbiased for the
    Hessian of the mean loss whether or not the ranks draw the same signs.

    Args:
        loss: scalar mean loss with its graph; the graph is freed.
        params: P_i tensors that require gradients.
        generator: of the signs, on the parameters' device.
        average_kernels: replace each convolution's sample by the mean absolute value over a kernel, AdaHessian's
            spatial averaging (Yao et al. 2021, equation 10).

    Returns:
        One signed tensor per parameter (averaged kernels are not negative); zeros where the loss does not depend on it.

    Raises:
        ValueError: if the loss is not a scalar with a graph.

    Example:
        >>> w = torch.tensor([1.0, -2.0], requires_grad=True)
        >>> hutchinson_diagonal((torch.tensor([3.0, 5.0]) * w**2).sum(), [w])  # a diagonal Hessian is exact
        [tensor([ 6., 10.])]

    Source: Hutchinson 1990; Bekas, Kokiopoulou and Saad 2007, equation 3.
    """
    _scalar(loss)
    params = list(params)
    grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True, materialize_grads=True)
    signs = [_signs(p, generator) for p in params]
    inner = torch.stack([(g * z).sum() for g, z in zip(grads, signs, strict=True)]).sum()
    if not inner.requires_grad:  # a loss that is linear in its parameters
        return [torch.zeros_like(p) for p in params]
    products = torch.autograd.grad(inner, params, allow_unused=True, materialize_grads=True)
    samples = _averaged_over_ranks([z * h for z, h in zip(signs, products, strict=True)])
    return [_over_kernel(s) if average_kernels and s.ndim > 2 else s for s in samples]


def gauss_newton_bartlett_diagonal(
    logits: Tensor,
    params: Sequence[Tensor],
    *,
    generator: torch.Generator | None = None,
    keep: Tensor | None = None,
) -> list[Tensor]:
    """The squared gradient of the mean cross-entropy at labels sampled from the model: g * g, where E[B g * g] = diag(G).

    Under data parallelism gradients are averaged over the ranks before they are squared, as one batch of all ranks would
    give: B is then the number of loss terms of all ranks.

    Args:
        logits: (..., C) with their graph; the graph is freed.
        params: tensors that require gradients.
        generator: of the labels, on the device of the logits.
        keep: which of the leading positions count, boolean, of the shape of the labels (padding left out); None: all.

    Returns:
        One tensor per parameter, not negative.

    Raises:
        ValueError: if the logits have no graph, or nothing counts.

    Example:
        >>> w = torch.zeros(1, 2, requires_grad=True)
        >>> gauss_newton_bartlett_diagonal(w, [w])  # p - onehot is (-0.5, 0.5) or its opposite
        [tensor([[0.2500, 0.2500]])]

    Source: Liu et al. 2024, "Sophia", algorithm 2 (Gauss-Newton-Bartlett).
    """
    loss = sampled_label_loss(logits, generator=generator, keep=keep)
    grads = torch.autograd.grad(loss, list(params), allow_unused=True, materialize_grads=True)
    return [g.square() for g in _averaged_over_ranks(list(grads))]


def sampled_label_loss(
    logits: Tensor, *, generator: torch.Generator | None = None, keep: Tensor | None = None
) -> Tensor:
    """The mean cross-entropy at labels sampled from the model.

    Args:
        logits: (..., C) with their graph.
        generator: of the labels, on the device of the logits.
        keep: which of the leading positions count, boolean; None: all.

    Raises:
        ValueError: if the logits have no graph, or nothing counts.

    Example:
        >>> sampled_label_loss(torch.tensor([[50.0, 0.0]], requires_grad=True)).item()  # the sure label
        0.0
    """
    if not logits.requires_grad:
        raise ValueError("expected logits with their graph, got none; call this before backward(), outside no_grad()")
    flat = logits.reshape(-1, logits.shape[-1])
    flat = flat.float() if flat.element_size() < 4 else flat
    if keep is not None:
        flat = flat[keep.reshape(-1)]
    if not len(flat):
        raise ValueError("expected at least one position that counts, got none")
    labels = torch.multinomial(flat.detach().softmax(-1), 1, generator=generator)[:, 0]
    return torch.nn.functional.cross_entropy(flat, labels)


def _scalar(loss: Tensor) -> None:
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"expected a scalar loss with its graph, got shape {tuple(loss.shape)}"
            f"{'' if loss.requires_grad else ' without a graph'}; call this before backward()"
        )


def _signs(param: Tensor, generator: torch.Generator | None) -> Tensor:
    bits = torch.randint(0, 2, param.shape, generator=generator, device=param.device)
    return (2 * bits - 1).to(param.dtype)


def _over_kernel(sample: Tensor) -> Tensor:
    return sample.abs().mean(tuple(range(2, sample.ndim)), keepdim=True).expand_as(sample).contiguous()


def _averaged_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensors
    for t in tensors:
        dist.all_reduce(t)
    return [t / dist.get_world_size() for t in tensors]
