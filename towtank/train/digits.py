"""The digits images of scikit-learn and a multilayer perceptron on them: a second task, of images, that needs no download."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from towtank.train.task import Batch

PIXELS, CLASSES, LARGEST = 64, 10, 16.0
HELD_OUT = 5  # every fifth image


@dataclass(frozen=True)
class Digits:
    """Random images of 8 x 8 pixels in [0, 1], as (size, 64), with their digits; every fifth image is held out."""

    size: int

    @property
    def digest(self) -> str:
        """Hash of the images and their split."""
        return _load()[2]

    def batch(self, seed: int, step: int) -> Batch:
        """The batch of a step, drawn with replacement."""
        (images, digits), _, _ = _load()
        drawn = torch.from_numpy(np.random.default_rng((seed, step)).integers(len(images), size=self.size))
        return images[drawn], digits[drawn]

    def heldout(self) -> list[Batch]:
        """All held-out images, as one batch."""
        return [_load()[1]]


class MLP(nn.Module):
    """Linear layers with biases, ReLU between them.

    Args:
        width: of the hidden layers.
        depth: number of hidden layers.

    Example:
        >>> MLP(8, 2)(torch.zeros(3, 64)).shape
        torch.Size([3, 10])
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        sizes = [PIXELS, *[width] * depth]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 10) of images (B, 64)."""
        for layer in self.layers:
            images = layer(images).relu()
        return self.head(images)


@lru_cache(maxsize=1)
def _load() -> tuple[Batch, Batch, str]:
    """Training images, held-out images, and their hash.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits task needs scikit-learn: pip install 'towtank[digits]'") from error
    pixels, labels = load_digits(return_X_y=True)
    digest = hashlib.sha256(pixels.tobytes() + labels.astype(np.int64).tobytes() + bytes([HELD_OUT])).hexdigest()[:16]
    images, digits = torch.from_numpy((pixels / LARGEST).astype(np.float32)), torch.from_numpy(labels.astype(np.int64))
    held = torch.arange(len(images)) % HELD_OUT == 0
    return (images[~held], digits[~held]), (images[held], digits[held]), digest
