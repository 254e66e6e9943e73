"""The Jacobian of a model's outputs, one batch at a time, as products with vectors of parameters and of outputs.

J: derivative of the outputs of one batch, of any shape, by the parameters. P: number of parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from towtank.curvature.output_matrix import OutputMatrix
from towtank.curvature.products import Graphs, Retain, free_memory, nodes
from towtank.problem import Batch, Problem

Way = Literal["tape", "dual"]
TAPED = 3  # a forward graph with its tape holds up to this many times what the forward graph alone does


class Jacobian:
    """J of one batch at fixed parameters, on a forward graph that is kept.

    J^T u is a backward pass of the graph. J v is computed in one of two ways. "tape": J^T w is recorded for a symbolic w,
    which it is linear in; its derivative by w along v is J v, at the cost of a backward pass. "dual": another forward pass
    with tangents, which keeps nothing; it wins on convolutions, whose double backward is dear.

    Args:
        problem: whose parameters vary. Make a Jacobian only inside `problem.measuring()`.
        batch: one of its batches.
        leaves: the parameters, from `problem.leaves()`.

    Raises:
        TypeError: if the model's output is no floating-point tensor.
        ValueError: if it does not depend on the parameters.

    Source: for the tape, Townsend 2017, "A new trick for calculating Jacobian vector products".
    """

    def __init__(self, problem: Problem, batch: Batch, leaves: dict[str, Tensor]) -> None:
        outputs = problem.outputs(batch, leaves)
        if not isinstance(outputs, Tensor) or not outputs.dtype.is_floating_point:
            kind = outputs.dtype if isinstance(outputs, Tensor) else type(outputs).__name__
            raise TypeError(
                f"expected the model to give one floating-point tensor of outputs, got {kind}; give forward=, a function of "
                "model and batch that returns the tensor that the loss is curved in"
            )
        if not outputs.requires_grad:
            raise ValueError("expected outputs that depend on the parameters, got outputs without a gradient")
        self.problem, self.batch, self.leaves, self.graph = problem, batch, leaves, outputs
        self.way: Way = "tape"
        self.middle: OutputMatrix | None = None  # what its owner puts between J^T and J
        self._tape: tuple[Tensor, list[tuple[int, Tensor]]] | None = None

    @property
    def outputs(self) -> Tensor:
        """The model's outputs, without their graph."""
        return self.graph.detach()

    def transposed(self, u: Tensor) -> Tensor:
        """J^T u (P,), for u of the outputs' shape."""
        return torch.cat([part.reshape(-1).to(self.problem.dtype) for part in self._parts(u)])

    def add_squares(self, total: Tensor, u: Tensor, scale: float) -> None:
        """Add scale (J^T u)^2, entry by entry, to `total` (P,)."""
        for place, part in zip(self.problem.slices.values(), self._parts(u)):
            flat = part.reshape(-1).to(total.dtype)
            total[place].addcmul_(flat, flat, value=scale)

    def _parts(self, u: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            self.graph, tuple(self.leaves.values()), u, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    def times(self, v: Tensor) -> Tensor:
        """J v, of the outputs' shape, for v (P,)."""
        tangents = [v[self.problem.slices[n]].view(p.shape).to(p.dtype) for n, p in self.leaves.items()]
        return self._by_tape(tangents) if self.way == "tape" else self._by_duals(tangents)

    def _by_tape(self, tangents: list[Tensor]) -> Tensor:
        if self._tape is None:
            w = torch.zeros_like(self.graph, requires_grad=True)
            parts = torch.autograd.grad(
                self.graph, tuple(self.leaves.values()), w, create_graph=True, allow_unused=True
            )
            self._tape = w, [(i, part) for i, part in enumerate(parts) if part is not None]
        w, used = self._tape
        (product,) = torch.autograd.grad(
            [part for _, part in used], w, [tangents[i] for i, _ in used], retain_graph=True
        )
        return product

    def _by_duals(self, tangents: list[Tensor]) -> Tensor:
        with self.problem.measuring(), torch.no_grad(), forward_ad.dual_level():
            duals = {n: forward_ad.make_dual(p.detach(), t) for (n, p), t in zip(self.leaves.items(), tangents)}
            tangent = forward_ad.unpack_dual(self.problem.outputs(self.batch, duals)).tangent
            if tangent is None:
                raise NotImplementedError("the derivative got lost on the way to the outputs")
            return tangent


class Jacobians:
    """The Jacobians of all batches of a problem, kept while memory allows and made anew when parameters move.

    Args:
        problem: model, loss and data.
        retain: whether graphs are kept between products: True, False, or "auto" for as far as memory allows.
        budget: bytes for "auto"; default: half of the memory that is free at first use.
    """

    def __init__(self, problem: Problem, *, retain: Retain = "auto", budget: float | None = None) -> None:
        if budget is None and retain == "auto":
            budget = free_memory(problem.device) / 2
        # Only the forward graph is there to be weighed when it is decided whether to keep it: the tape is recorded after.
        self.graphs: Graphs[Jacobian] = Graphs(
            problem,
            partial(Jacobian, problem),
            lambda jacobian: [jacobian.graph],
            retain=retain,
            budget=None if budget is None else budget / TAPED,
        )
        self._ways: dict[bool, Way] = {}

    def each(self, use: Callable[[Jacobian], None]) -> None:
        """Call `use` on the Jacobian of every batch, with backends set for exact products."""
        self.graphs.each(use)

    def times(self, jacobian: Jacobian, v: Tensor) -> Tensor:
        """J v, the cheapest way that the model allows; the first time, that it agrees with J^T is checked."""
        kept = self.graphs.holds(jacobian)
        if kept not in self._ways:
            self._ways[kept] = checked_way(jacobian, kept=kept)
        jacobian.way = self._ways[kept]
        return jacobian.times(v)


def checked_way(jacobian: Jacobian, *, kept: bool) -> Way:
    """The first way of computing J v that the model allows and that is right.

    A tape is compared with duals, which share no formula with it; where that cannot be done or fails, either is asked for
    <J v, J v> = <J^T J v, v>.

    Args:
        jacobian: of one batch.
        kept: whether graphs are kept: then a tape is worth recording, but for convolutions.

    Raises:
        NotImplementedError: if no way is open.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(jacobian.problem.size, generator=generator).to(jacobian.problem.device, jacobian.problem.dtype)
    faults: list[str] = []
    tape_first = kept and not convolutional(jacobian.graph)
    if tape_first:
        tape, duals = (_tried(jacobian, way, v, faults) for way in ("tape", "dual"))
        if tape is not None and duals is not None and _near(tape - duals, duals):
            return "tape"
    ways: tuple[Way, ...] = ("tape", "dual") if tape_first else ("dual", "tape")
    for way in ways:
        product = _tried(jacobian, way, v, faults)
        if product is None:
            continue
        forth = product.double().square().sum()
        back = (jacobian.transposed(product).double() * v.double()).sum()
        if _near(forth - back, forth):
            return way
        faults.append(f"{way}: |J v|^2 = {float(forth):.6g} but <J^T J v, v> = {float(back):.6g}")
    raise NotImplementedError(
        "expected a model whose outputs can be differentiated along a direction, got an operation with neither a second "
        f"derivative nor a forward one ({'; '.join(dict.fromkeys(faults))}); write it in plain operations"
    )


def _tried(jacobian: Jacobian, way: Way, v: Tensor, faults: list[str]) -> Tensor | None:
    """J v, or None where an operation lacks the derivative that this way needs.

    Raises:
        OutOfMemoryError: if memory runs out.
    """
    jacobian.way = way
    try:
        return jacobian.times(v)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as fault:
        faults.append(f"{way}: {str(fault).splitlines()[0]}")
        return None


def _near(difference: Tensor, of: Tensor) -> bool:
    return bool(difference.norm() <= torch.finfo(torch.float32).eps ** 0.5 * of.norm())


def convolutional(outputs: Tensor) -> bool:
    """Whether a graph has a convolution in it."""
    return any("Convolution" in node.name() for node in nodes([outputs]))
