"""TrAct: the first layer's weights move as if its pre-activations were trained."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def tract(model: nn.Module, *, damping: float = 0.1, layer: str | None = None) -> Generator[str, None, None]:
    """While open, the gradient of the first layer's weight is G^T X (X^T X / b + lambda I)^-1 in place of G^T X.

    X (b, n) are the layer's inputs, the patches of a convolution, and G (b, m) the gradients of its outputs. The gradient
    is a product that autograd has anyway: it is multiplied as it passes, no module is replaced, and all hooks are gone
    when the block ends. Forward passes that take part in one backward count as one batch. Curvature samples
    (`towtank.optim.diagonals`) are to be taken outside. Under data parallelism each process has the X of its own batch.

    Args:
        model: whose first `nn.Linear` or `nn.Conv2d`, in the order of registration, is meant.
        damping: lambda.
        layer: its name, where the first is another.

    Yields:
        The name of the layer.

    Raises:
        ValueError: if damping is not positive, the layer is not to be found, or it is a grouped convolution.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> with tract(model, damping=1.0):
        ...     model(torch.tensor([[1.0], [3.0]])).sum().backward()
        >>> model.weight.grad  # (1 + 3) / ((1 + 9) / 2 + 1)
        tensor([[0.6667]])

    Source: Petersen, Borgelt and Ermon 2024, "TrAct: making first-layer pre-activations trainable", equation 5. The
        authors' code drops dilation, groups and padding modes, and with `cholesky_inverse` inverts another matrix.
    """
    if not damping > 0:
        raise ValueError(f"damping = {damping}: expected a positive number")
    name, module = _layer(model, layer)
    seen: list[Tensor] = []  # the inputs whose outputs the present backward has reached

    def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.clear()
        if output.requires_grad:
            x = inputs[0].detach()
            output.register_hook(lambda _: seen.append(_rows(module, x)))

    def backward(grad: Tensor) -> Tensor:
        X = torch.cat(seen)
        seen.clear()
        wide = torch.promote_types(X.dtype, torch.float32)
        return _preconditioned(grad.flatten(1).to(wide), X.to(wide), damping).view_as(grad).to(grad.dtype)

    weight = module.weight
    assert isinstance(weight, Tensor)
    hooks = [module.register_forward_hook(forward), weight.register_hook(backward)]
    try:
        yield name
    finally:
        for hook in hooks:
            hook.remove()


def _layer(model: nn.Module, wanted: str | None) -> tuple[str, nn.Module]:
    for name, module in model.named_modules():
        if name == wanted or (wanted is None and isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)):
            if not isinstance(module, nn.Linear | nn.Conv2d):
                raise ValueError(f"layer {name!r}: expected an nn.Linear or nn.Conv2d, got {type(module).__name__}")
            if isinstance(module, nn.Conv2d) and module.groups != 1:
                raise ValueError(
                    f"layer {name!r} is a convolution of {module.groups} groups: expected 1; each would need its own inverse"
                )
            return name, module
    raise ValueError(f"no layer {'that is an nn.Linear or nn.Conv2d' if wanted is None else repr(wanted)} in the model")


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """The inputs of a layer as a matrix (b, n): its weight as (m, n) times a row is a pre-activation."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = nn.functional.pad(x if x.ndim == 4 else x[None], _padding(module), mode=mode)
    patches = nn.functional.unfold(x, module.kernel_size, dilation=module.dilation, stride=module.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def _padding(module: nn.Conv2d) -> list[int]:
    """(left, right, top, bottom)."""
    if isinstance(module.padding, str):
        both = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        sides = [(n // 2, n - n // 2) if module.padding == "same" else (0, 0) for n in both]
    else:
        sides = [(n, n) for n in module.padding]
    return [*sides[1], *sides[0]]


def _preconditioned(grad: Tensor, X: Tensor, damping: float) -> Tensor:
    """Return grad (X^T X / b + lambda I)^-1, by the smaller of the two systems (Woodbury's identity where b < n)."""
    b, n = X.shape
    small = X @ X.T + b * damping * torch.eye(b, dtype=X.dtype, device=X.device) if b < n else None
    if small is not None:
        return (grad - torch.linalg.solve(small, X @ grad.T).T @ X) / damping
    matrix = X.T @ X / b + damping * torch.eye(n, dtype=X.dtype, device=X.device)
    return torch.linalg.solve(matrix, grad.T).T
