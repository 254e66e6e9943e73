"""A small convolutional network."""

from __future__ import annotations

from torch import Tensor, nn


class CNN(nn.Module):
    """Three 3x3 convolutions with GroupNorm and ReLU, mean over positions, linear head: (B, C, H, W) -> (B, outputs).

    GroupNorm rather than BatchNorm: examples stay independent, and no buffer changes during a forward.

    Example:
        >>> import torch
        >>> CNN(channels=1, width=8, outputs=10)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, *, channels: int, width: int, outputs: int, groups: int = 4) -> None:
        super().__init__()
        widths = [channels, width, width, width]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(groups, width) for _ in self.convolutions)
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of a batch of images."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nn.functional.relu(norm(convolution(x)))
        return self.head(x.mean(dim=(-2, -1)))
