"""Symmetric matrices on the outputs of one batch: the softmax's and the diagonal one, by products and square roots.

z: outputs, any shape. Row: the outputs of one softmax; C: classes, the length of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from towtank.linalg.draws import rademacher

Likelihood = Literal["categorical", "gaussian", "bernoulli", "poisson"]
CHUNK = 2**22  # elements: products over larger outputs go through blocks of rows of this size


class OutputMatrix(ABC):
    """A symmetric matrix on the outputs of one batch, known by its products.

    A leaf says in `semidefinite` whether it has no negative eigenvalue for certain, and in `likelihood` whether it is the
    Fisher information of a distribution that the outputs parametrize, and of which one.
    """

    semidefinite: bool
    likelihood: Likelihood | None

    @abstractmethod
    def apply(self, u: Tensor) -> Tensor:
        """Product with u, of the outputs' shape."""

    def root(self, generator: torch.Generator) -> Tensor:
        """A random u of the outputs' shape with E[u] = 0 and E[u u^T] = the matrix.

        Raises:
            TypeError: if no square root of the matrix is known.
        """
        raise TypeError(f"expected a semidefinite matrix with a known square root, got {type(self).__name__}")

    def signs(self, generator: torch.Generator) -> Tensor:
        """Another `root`, of random signs, for traces: its length hardly varies, even where labels are nearly certain.

        Raises:
            TypeError: if no square root of the matrix is known.
        """
        return self.root(generator)

    def rank(self) -> int:
        """Number of `columns`.

        Raises:
            TypeError: if no square root of the matrix is known.
        """
        raise TypeError(f"expected a semidefinite matrix with a known square root, got {type(self).__name__}")

    def columns(self) -> Iterator[Tensor]:
        """All u of a square root, sum u u^T = the matrix; each lies in one index of the outputs' first axis, or in all.

        Raises:
            TypeError: if no square root of the matrix is known.
        """
        raise TypeError(f"expected a semidefinite matrix with a known square root, got {type(self).__name__}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Softmax(OutputMatrix):
    """s (diag(p) - p p^T) in each row, p = softmax(z): every softmax cross-entropy with targets that sum to s.

    Products are right to rounding where p is close to 0 or 1: the largest class is the origin of u, which changes
    nothing else as the matrix does not see a constant.

    Args:
        outputs: z.
        weights: s, of the shape of z without its class axis.
        axis: the class axis.

    Example:
        >>> softmax = Softmax(outputs=torch.zeros(1, 2), weights=torch.ones(1), axis=-1)
        >>> softmax.apply(torch.tensor([[4.0, 0.0]]))
        tensor([[ 1., -1.]])

    Source: Botev, Ritter, Barber 2017, section 2.1.
    """

    outputs: Tensor
    weights: Tensor
    axis: int
    likelihood: Likelihood | None = "categorical"

    @property
    def semidefinite(self) -> bool:  # type: ignore[override]
        """Whether no row has a negative weight."""
        return bool((self.weights >= 0).all())

    def apply(self, u: Tensor) -> Tensor:
        """Each row's s (p u - p <p, u>), by blocks of rows."""
        return self._by_rows(lambda z, s, block: _covariance(z, block) * s, u)

    def root(self, generator: torch.Generator) -> Tensor:
        """sqrt(s) (p - e_y) with labels y drawn from the model."""
        draws = torch.rand(self.weights.shape, generator=generator, device=generator.device, dtype=torch.float64)
        return self._by_rows(
            lambda z, s, draw: _label_gradient(z, draw) * s.sqrt(), draws.to(self.outputs.device).unsqueeze(self.axis)
        )

    def signs(self, generator: torch.Generator) -> Tensor:
        """sqrt(s) (diag(p)^1/2 - p sqrt(p)^T) e for random signs e.

        Drawn labels miss rare classes: at p = 0.9999 most draws see next to nothing of the trace, and agree on it.
        """
        z = self.outputs
        e = rademacher(z.numel(), 1, generator, like=z.dtype, device=z.device).reshape(z.shape)
        return self._by_rows(lambda z, s, e: _signed_root(z, e) * s.sqrt(), e)

    def rank(self) -> int:
        """C for each row that counts."""
        return int((self.weights != 0).sum()) * self.outputs.shape[self.axis]

    def columns(self) -> Iterator[Tensor]:
        """sqrt(s p_c) (e_c - p) for each row and class c."""
        p = self.outputs.softmax(self.axis).movedim(self.axis, -1)
        s = self.weights.unsqueeze(self.axis).movedim(self.axis, -1)
        for row in s[..., 0].nonzero().tolist() if s.ndim > 1 else [[]]:
            for c in range(p.shape[-1]):
                u = torch.zeros_like(p)
                u[*row] = -p[*row]
                u[*row, c] += 1
                yield (u * (s[*row] * p[*row, c]).sqrt()).movedim(-1, self.axis)

    def _by_rows(self, function: Callable[[Tensor, Tensor, Tensor], Tensor], operand: Tensor) -> Tensor:
        z = self.outputs
        parts = (z, self.weights.unsqueeze(self.axis), operand)
        blocks = zip(*(in_blocks(part, self.axis, z.shape[self.axis]) for part in parts), strict=True)
        shape = z.movedim(self.axis, -1).shape
        return torch.cat([function(*block) for block in blocks]).reshape(shape).movedim(-1, self.axis)


@dataclass(frozen=True, kw_only=True, eq=False)
class Elementwise(OutputMatrix):
    """A diagonal matrix: every loss that is a sum over the single outputs.

    Args:
        diagonal: of the outputs' shape.
        likelihood: the distribution whose information it is, or None.

    Example:
        >>> Elementwise(diagonal=torch.tensor([2.0, 1.0])).apply(torch.ones(2))
        tensor([2., 1.])
    """

    diagonal: Tensor
    likelihood: Likelihood | None = None

    @property
    def semidefinite(self) -> bool:  # type: ignore[override]
        """Whether no entry is negative."""
        return bool((self.diagonal >= 0).all())

    def apply(self, u: Tensor) -> Tensor:
        """The product entry by entry."""
        return self.diagonal * u

    def root(self, generator: torch.Generator) -> Tensor:
        """The square root of the diagonal with random signs, which vary less than drawn labels."""
        bits = torch.randint(0, 2, self.diagonal.shape, generator=generator, device=generator.device)
        return self.diagonal.sqrt() * (2 * bits.to(self.diagonal) - 1)

    def rank(self) -> int:
        """Number of entries that are not zero."""
        return int((self.diagonal != 0).sum())

    def columns(self) -> Iterator[Tensor]:
        """sqrt(d_i) e_i for each output i."""
        for place in self.diagonal.nonzero().tolist():
            u = torch.zeros_like(self.diagonal)
            u[*place] = self.diagonal[*place].sqrt()
            yield u


def _covariance(z: Tensor, u: Tensor) -> Tensor:
    """(diag(p) - p p^T) u of each row."""
    p = z.softmax(-1)
    u = u - u.gather(-1, z.argmax(-1, keepdim=True))
    return p * (u - (p * u).sum(-1, keepdim=True))


def _signed_root(z: Tensor, e: Tensor) -> Tensor:
    """(diag(p)^1/2 - p sqrt(p)^T) e of each row."""
    p = z.softmax(-1)
    signed = p.sqrt() * e
    return _balanced(z, signed - p * signed.sum(-1, keepdim=True))


def _label_gradient(z: Tensor, draw: Tensor) -> Tensor:
    """The difference p - e_y of each row, y drawn from p where draw (rows, 1) is uniform."""
    p = z.softmax(-1)
    cumulative = p.double().cumsum(-1)
    label = torch.searchsorted(cumulative, draw * cumulative[:, -1:]).clamp(max=z.shape[-1] - 1)
    difference = p.scatter_add(-1, label, -torch.ones_like(p[:, :1]))
    return _balanced(z, difference)


def _balanced(z: Tensor, u: Tensor) -> Tensor:
    """Rows u that sum to zero with the largest class' entry made of the others, which keeps its digits where p is near 1."""
    top = z.argmax(-1, keepdim=True)
    return u.scatter(-1, top, -u.scatter(-1, top, 0.0).sum(-1, keepdim=True))


def in_blocks(x: Tensor, axis: int, length: int) -> tuple[Tensor, ...]:
    """Blocks (rows, x.shape[axis]) of a tensor whose rows lie along `axis`, for rows of `length` elements."""
    return x.movedim(axis, -1).reshape(-1, x.shape[axis]).split(max(1, CHUNK // max(1, length)))
