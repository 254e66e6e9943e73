"""Random vectors from a generator of the caller, and inner products summed in float64."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_RUN, _RUNS = 2**16, 64  # shortest run, and how many at most


def as_generator(generator: torch.Generator | int | None, device: torch.device) -> torch.Generator:
    """A generator: the given one, or a new one seeded with an integer (0 for None, so that results repeat).

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(generator, torch.Generator):
        return generator
    if generator is None or (isinstance(generator, int) and not isinstance(generator, bool)):
        return torch.Generator(device).manual_seed(generator or 0)
    raise TypeError(f"expected a torch.Generator or an integer seed, got {type(generator).__name__}")


def rademacher(size: int, count: int, generator: torch.Generator, *, like: torch.dtype, device: torch.device) -> Tensor:
    """Independent signs, +1 or -1 with equal chance, shape (size, count).

    64 signs are cut from each random integer: ten times as fast as drawing each, which for a small network would cost
    half a gradient.

    Example:
        >>> v = rademacher(100, 2, torch.Generator().manual_seed(0), like=torch.float32, device=torch.device("cpu"))
        >>> v.shape, v.abs().sum().item()
        (torch.Size([100, 2]), 200.0)
    """
    words = torch.empty(count, (size + 63) // 64, dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    bytes_ = words.view(torch.uint8).to(device, torch.int32)
    signs = torch.nn.functional.embedding(bytes_, _signs_of_bytes(like, device))
    return signs.flatten(1)[:, :size].T


@functools.cache
def _signs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs of each byte, (256, 8)."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (2 * bits - 1).to(dtype)


def gaussian(size: int, count: int, generator: torch.Generator, *, like: torch.dtype, device: torch.device) -> Tensor:
    """Independent standard normal numbers, shape (size, count)."""
    drawn = torch.randn(count, size, generator=generator, device=generator.device, dtype=like)
    return drawn.to(device).T


def dot(x: Tensor, y: Tensor) -> float:
    """<x, y> of vectors (P,): short runs in the vectors' dtype, their sums in float64.

    The run's rounding errors are independent, so the whole is far more exact than a plain float32 sum, at its price.

    Example:
        >>> x = torch.full((2**24 + 1,), 1.0)
        >>> dot(x, x) - 2**24
        1.0
    """
    run = max(_RUN, -(-x.numel() // _RUNS))
    if x.numel() <= run:
        return float(x @ y)
    return float(torch.stack([a @ b for a, b in zip(x.split(run), y.split(run))]).sum(dtype=torch.float64))


def dots(X: Tensor, Y: Tensor) -> Tensor:
    """<x_k, y_k> for the columns of X and Y (P, K), summed in float64: (K,) on the CPU."""
    if X.shape[1] == 1:
        return torch.tensor([dot(X[:, 0], Y[:, 0])], dtype=torch.float64)
    return (X * Y).sum(dim=0, dtype=torch.float64).cpu()


def norm(x: Tensor) -> float:
    """Euclidean length of a vector (P,), summed like `dot`."""
    return dot(x, x) ** 0.5
