"""A gradient that can be differentiated once more: reverse-over-reverse products."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from towtank.curvature.products import graph_bytes, nodes

_NO_SECOND = (
    "is not implemented",
    "not implemented for",
    "once_differentiable",
    "differentiate twice",
    "double backward",
    "does not support",
)


# Bytes up to which a graph is bound by the overhead of its operations rather than by arithmetic, so that batching vectors
# pays: on one CPU core it won 1.2 to 9 times below this size and lost a quarter above.
_SMALL = {False: 1e6, True: 64e6}
_BLOCK = 64  # most vectors at once, which bounds the memory


class MissingDerivative(RuntimeError):
    """A second derivative that does not exist."""


@contextmanager
def _missing_named() -> Generator[None, None, None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if any(mark in str(error) for mark in _NO_SECOND):
            raise MissingDerivative(str(error).splitlines()[0]) from error
        raise


class GradientGraph:
    """Gradient of a scalar by several leaves, on a graph that is kept for any number of products with the Hessian.

    Reverse over reverse picks backward formulas that can be differentiated any number of times. Forward modes over a fused
    backward do not: through an affine LayerNorm they are silently wrong.

    Args:
        scalar: () with a graph.
        leaves: what it is differentiated by.

    Raises:
        ValueError: if the scalar does not depend on any leaf.
        MissingDerivative: if a second derivative does not exist.

    Example:
        >>> x, y = torch.tensor(3.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
        >>> GradientGraph(x * x * y, [x, y]).product(torch.tensor([1.0, 0.0]))  # (2y, 2x)
        tensor([4., 6.])
    """

    def __init__(self, scalar: Tensor, leaves: Sequence[Tensor]) -> None:
        if not scalar.requires_grad:
            raise ValueError(
                "expected a loss that depends on the parameters, got one without a gradient; either they are not used, or "
                "the forward pass runs under no_grad or detaches"
            )
        with _missing_named():
            grads = torch.autograd.grad(scalar, leaves, create_graph=True, allow_unused=True)
        self.leaves = tuple(leaves)
        self.grads = grads
        self.places = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self.roots = [grads[i] for i in self.places]
        if any(node.name() == "torch::autograd::Error" for node in nodes(self.roots)):
            # such a node leads nowhere, so that the engine would pass it by and leave its terms out
            raise MissingDerivative("a function marked once_differentiable")

    def gradient(self) -> Tensor:
        """The gradient itself, flat."""
        filled = (torch.zeros_like(x) if g is None else g.detach() for g, x in zip(self.grads, self.leaves))
        return torch.cat([g.reshape(-1) for g in filled])

    def product(self, vector: Tensor, *, last: bool = False) -> Tensor:
        """Product with the Hessian of a flat vector (P,).

        Args:
            vector: (P,).
            last: whether the graph may be freed on the way, which a third of the memory is saved by.

        Raises:
            MissingDerivative: if a second derivative does not exist.
        """
        return self._differentiate(self._shaped(vector), last=last) if self.roots else torch.zeros_like(vector)

    def products(self, rows: Tensor, *, last: bool = False) -> Tensor:
        """Products with K vectors, the rows of a matrix (K, P): all at once where the graph is small, else one by one.

        Args:
            rows: (K, P).
            last: whether the graph may be freed by the last of them.

        Raises:
            MissingDerivative: if a second derivative does not exist.
        """
        if not self.roots or len(rows) == 1:
            return torch.stack([self.product(v, last=last) for v in rows])
        if self._small:
            try:
                return torch.cat([self._differentiate(self._shaped(part), batched=True) for part in rows.split(_BLOCK)])
            except RuntimeError:  # an operation that cannot be batched
                self._small = False
        found = torch.empty_like(rows)
        for k, (v, out) in enumerate(zip(rows, found)):
            out.copy_(self.product(v, last=last and k == len(rows) - 1))
        return found

    @cached_property
    def _small(self) -> bool:
        return graph_bytes(self.roots) <= _SMALL[self.roots[0].device.type == "cuda"]

    def _shaped(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([x.numel() for x in self.leaves], dim=-1)
        return [parts[i].reshape((*flat.shape[:-1], *self.leaves[i].shape)) for i in self.places]

    def _differentiate(self, tangents: list[Tensor], *, batched: bool = False, last: bool = False) -> Tensor:
        with _missing_named():
            parts = torch.autograd.grad(
                self.roots,
                self.leaves,
                tangents,
                retain_graph=not last,
                allow_unused=True,
                materialize_grads=True,
                is_grads_batched=batched,
            )
        lead = tangents[0].shape[:1] if batched else ()
        return torch.cat([h.reshape(*lead, -1) for h in parts], dim=-1)
