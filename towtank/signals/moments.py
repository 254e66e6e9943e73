"""Moments of many numbers in one pass over memory, and how those of several tensors are pooled.

A tensor is cut into pieces that fit a cache. Each piece leaves its mean and its central power sums, scaled by its largest
entry so that no fourth power overflows; pieces and tensors are pooled by the same formula, in float64.

Shapes: c pieces.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_PIECE = {"cpu": 1 << 16}  # entries: three buffers of them stay in a core's cache
_PIECE_ELSEWHERE = 1 << 22
_MOST = 1 << 18  # entries of one tensor from which moments are taken; its maximum is of all


_here = threading.local()


@contextmanager
def aside() -> Generator[None, None, None]:
    """No graph, no autocast, no interception: arithmetic that the user's program does not notice."""
    if getattr(_here, "aside", False):
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(torch.no_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        _here.aside = True
        try:
            yield
        finally:
            _here.aside = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Moments of all entries of one or several tensors; every property is a tensor ().

    Args:
        pieces_c4: of each piece, divided by its scale: the mean, and the sums of squares, third and fourth powers about it.
        scales_c: the largest magnitude in the tensor that a piece is from.
        sizes_c: number of entries of each piece.
        max: the largest magnitude.

    Example:
        >>> x = torch.tensor([3.0, -1.0, 1.0, 5.0])
        >>> m = Moments.of(x)
        >>> [round(float(v), 4) for v in (m.mean, m.variance, m.rms, m.max, m.kurtosis)]
        [2.0, 5.0, 3.0, 5.0, 1.64]
        >>> halves = Moments.pooled([Moments.of(x[:1]), Moments.of(x[1:])])
        >>> round(float(halves.kurtosis), 4)
        1.64
    """

    pieces_c4: Tensor
    scales_c: Tensor
    sizes_c: Tensor
    max: Tensor

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Of the entries of a tensor; of more than 2^18, moments are those of as many evenly spaced ones, the maximum is of all.

        Raises:
            ValueError: if it is empty or not real.
        """
        if not x.numel() or not x.is_floating_point():
            raise ValueError(
                f"expected a real tensor with entries, got {x.dtype} of shape {tuple(x.shape)}; leave it out"
            )
        with aside():
            flat, size = _flat(x.detach()), _PIECE.get(x.device.type, _PIECE_ELSEWHERE)
            low, high = flat.aminmax()
            thinning = -(-flat.numel() // _MOST) | 1  # odd, so that it does not walk along one channel
            whole, flat = flat.numel(), flat[::thinning].contiguous() if flat.numel() > _MOST else flat
            largest = _at_least_float32(torch.maximum(high, -low))  # NaN if there is one
            scale = largest.clamp_min(torch.finfo(largest.dtype).tiny)
            pieces = flat.split(size)
            d, square = (torch.empty_like(pieces[0], dtype=scale.dtype) for _ in range(2))
            found = [_piece(part, scale, d[: len(part)], square[: len(part)]) for part in pieces]
            wide = torch.float32 if x.device.type == "mps" else torch.float64
            table = torch.stack([value for piece in found for value in piece]).view(-1, 4).to(wide)
            sizes = torch.full((len(found),), size, dtype=wide, device=x.device)
            sizes[-1] = flat.numel() - size * (len(found) - 1)
            sizes *= whole / flat.numel()
            return cls(pieces_c4=table, scales_c=scale.to(wide).expand(len(found)), sizes_c=sizes, max=largest)

    @classmethod
    def pooled(cls, parts: Iterable[Moments]) -> Moments:
        """Of the entries of all of them together."""
        every = list(parts)
        return cls(
            pieces_c4=torch.cat([m.pieces_c4 for m in every]),
            scales_c=torch.cat([m.scales_c for m in every]),
            sizes_c=torch.cat([m.sizes_c for m in every]),
            max=torch.stack([m.max for m in every]).amax(),
        )

    @property
    def count(self) -> Tensor:
        """Number of entries."""
        return self.sizes_c.sum()

    @property
    def mean(self) -> Tensor:
        """E x."""
        return (self.sizes_c * self.scales_c * self.pieces_c4[:, 0]).sum() / self.count

    @property
    def variance(self) -> Tensor:
        """E (x - E x)^2."""
        return self._central[0]

    @property
    def rms(self) -> Tensor:
        """Square root of E x^2."""
        return (self.variance + self.mean.square()).sqrt()

    @property
    def kurtosis(self) -> Tensor:
        """E (x - E x)^4 / variance^2: 3 for a Gaussian, 1 (the least possible) where all entries are equal."""
        second, fourth = self._central
        return torch.where(second == 0, torch.ones_like(second), fourth / second.square())

    @cached_property
    def _central(self) -> tuple[Tensor, Tensor]:
        """Second and fourth central moment (Pebay 2008, equations 2.1 and 2.7, for many pieces at once)."""
        mean, s2, s3, s4 = self.pieces_c4.unbind(1)
        n, a = self.sizes_c, self.scales_c
        shift = mean * a - self.mean
        s2, s3, s4 = s2 * a**2, s3 * a**3, s4 * a**4
        second = s2 + n * shift**2
        fourth = s4 + 4 * shift * s3 + 6 * shift**2 * s2 + n * shift**4
        return second.sum() / self.count, fourth.sum() / self.count


def _flat(x: Tensor) -> Tensor:
    """All entries (n,), in the order in which they lie in memory where that saves a copy."""
    if x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        x = x.permute(0, 2, 3, 1)
    return x.reshape(-1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _piece(x: Tensor, scale: Tensor, d: Tensor, square: Tensor) -> tuple[Tensor, ...]:
    """Mean, and power sums 2 to 4 about it, of x / scale; `d` and `square` are room to work in."""
    if x.dtype == d.dtype:
        torch.div(x, scale, out=d)
    else:  # a half by a scalar would be rounded to a half
        d.copy_(x).div_(scale)
    mean = d.sum() / len(d)
    d.sub_(mean)
    torch.mul(d, d, out=square)
    return mean, square.sum(), d.dot(square), square.dot(square)
