"""A plain multi-layer perceptron."""

from __future__ import annotations

from torch import Tensor, nn


class MLP(nn.Module):
    """`depth` hidden layers of GELU units: inputs (B, inputs) -> outputs (B, outputs).

    Example:
        >>> import torch
        >>> MLP(inputs=3, width=8, outputs=2)(torch.zeros(4, 3)).shape
        torch.Size([4, 2])
    """

    def __init__(self, *, inputs: int, width: int, outputs: int, depth: int = 2, bias: bool = True) -> None:
        super().__init__()
        widths = [inputs, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.head = nn.Linear(width, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of a batch."""
        for layer in self.layers:
            x = nn.functional.gelu(layer(x))
        return self.head(x)
