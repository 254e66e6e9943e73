"""Gradients of the single examples of a batch: in chunks by `vmap` where the model allows it, else one by one.

M: examples, C: examples of one chunk, P: parameters, N: tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from towtank.problem import Batch, Problem
from towtank.problem.state import batch_coupled
from towtank.signals.example_cuts import Cut, cuts
from towtank.signals.step import CannotTell

_CACHED = 32e6  # most bytes of a chunk's gradients on a CPU, where larger chunks are no faster
_COPIES = 8  # a chunk holds about this many times its gradients: activations, theirs, and one flat copy

Pieces = dict[str, Tensor]  # {parameter: gradients of a chunk (C, *shape)}


@dataclass(frozen=True, kw_only=True)
class _Sums:
    squares_MN: Tensor  # |g_i|^2 by tensor, float64 on the CPU
    mean_P: Tensor


class ExampleGradients:
    """g_i, the gradients of single examples, scaled so that their mean is the gradient of the full loss.

        g_i = M w_b (c_i / c_b) grad loss_i,   (1/M) sum_i g_i = grad L

    with w_b the share of the batch in the full loss, c_i of c_b the loss terms of the example: where every example holds as
    many terms (no padding), g_i is the gradient of its own mean loss. Examples that hold no term are left out. An example is
    what the leading dimension of the batch counts, for a language model a sequence. What is read is computed once and kept;
    all but `chunks` and `inner` comes from one pass.

    That the losses of the examples make up the loss of their batch is checked, so a loss or a layer that couples examples is
    found, whatever its name.

    Args:
        problem: model, loss and data.
        chunk: examples that are differentiated at once; default: as many as fit a part of the free memory, and the cache.

    Raises:
        CannotTell: where normalization couples the examples of a batch; on first use, where anything else does, where the loss
            is not finite, or the batch cannot be cut.
        ValueError: if the chunk is not positive.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> batch = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0], [1.0]])
        >>> examples = ExampleGradients(Problem(model, torch.nn.functional.mse_loss, batch))
        >>> torch.cat(list(examples.chunks()))
        tensor([[-2.,  0.],
                [ 0., -4.]])
        >>> examples.mean, examples.squares.tolist(), examples.inners.tolist()
        (tensor([-1., -2.]), [4.0, 16.0], [2.0, 8.0])
    """

    def __init__(self, problem: Problem, chunk: int | None = None) -> None:
        if chunk is not None and chunk < 1:
            raise ValueError(f"expected a chunk of at least 1 example, got {chunk}")
        coupled = batch_coupled(problem.network) if problem.mode == "train" else []
        if coupled:
            raise CannotTell(
                f"expected examples that do not see each other, got {coupled[0] or 'a model'}, which normalizes over the "
                "batch; use mode='eval'"
            )
        self.problem = problem
        self.chunk = chunk or self._affordable()
        self.how = f"vmap over up to {self.chunk} examples at once"
        self._checked: set[int] = set()

    def _affordable(self) -> int:
        from towtank.curvature.products import free_memory

        one = self.problem.size * self.problem.dtype.itemsize
        room = free_memory(self.problem.device) / _COPIES
        return max(1, int((min(room, _CACHED) if self.problem.device.type == "cpu" else room) // one))

    # What one pass gives

    @property
    def count(self) -> int:
        """M, the number of examples that hold a loss term."""
        return len(self.squares)

    @property
    def mean(self) -> Tensor:
        """(P,), the gradient of the full loss."""
        return self._sums.mean_P

    @cached_property
    def squares(self) -> Tensor:
        """|g_i|^2 (M,), float64 on the CPU."""
        return self._sums.squares_MN.sum(1)

    @property
    def tensor_squares(self) -> dict[str, float]:
        """{parameter: sum_i |g_i|^2}."""
        return dict(zip(self.problem.names, self._sums.squares_MN.sum(0).tolist()))

    @cached_property
    def mean_squares(self) -> dict[str, float]:
        """{parameter: |mean_i g_i|^2}."""
        parts = [torch.linalg.vector_norm(self.mean[s]).double() for s in self.problem.slices.values()]
        return dict(zip(self.problem.names, torch.stack(parts).square().tolist()))

    @cached_property
    def inners(self) -> Tensor:
        """<g_i, mean g> (M,), float64 on the CPU."""
        return self.inner(self.mean)

    @cached_property
    def _sums(self) -> _Sums:
        squares, mean = [], torch.zeros(self.problem.size, dtype=self.problem.dtype, device=self.problem.device)
        for pieces in self._pieces():
            rows = [g.flatten(1) for g in pieces.values()]
            squares.append(torch.stack([torch.linalg.vector_norm(r, dim=1) for r in rows], 1).cpu().double().square())
            for place, row in zip(self.problem.slices.values(), rows):
                mean[place] += row.sum(0)
        squares_MN = torch.cat(squares)
        if not bool(squares_MN.isfinite().all()):
            raise CannotTell("expected finite gradients of all examples, got one that is not")
        return _Sums(squares_MN=squares_MN, mean_P=mean / len(squares_MN))

    # What takes a pass of its own

    def chunks(self) -> Iterator[Tensor]:
        """The gradients, chunk by chunk, (C, P) each, in the order of the data."""
        for pieces in self._pieces():
            yield torch.cat([pieces[n].flatten(1).to(self.problem.dtype) for n in self.problem.names], dim=1)

    def inner(self, vector: Tensor) -> Tensor:
        """<g_i, v> (M,), float64 on the CPU: by forward derivatives of the examples' losses, at about one gradient's cost.

        Where the model has no forward derivative, or where their mean is not <grad L, v>, by another pass of gradients.

        Args:
            vector: v (P,).
        """
        vector = vector.to(self.problem.device, self.problem.dtype)
        found = None
        if self.how.startswith("vmap"):
            try:
                found = torch.cat([self._tangents(cut, vector) for cut in cuts(self.problem)])
            except (RuntimeError, AssertionError):  # no rule for vmap or forward derivatives
                pass
        if found is None or not self._agrees(found, vector):
            found = torch.cat([g_CP @ vector for g_CP in self.chunks()])
        return found.cpu().double()

    def _tangents(self, cut: Cut, vector: Tensor) -> Tensor:
        params = {n: p.detach() for n, p in self.problem.leaves().items()}
        direction = {n: t.to(params[n].dtype) for n, t in self.problem.unflatten(vector).items()}
        batched = torch.func.vmap(partial(self._loss, cut), in_dims=(None, 0, 0))
        losses = lambda p: batched(p, cut.tensors, cut.weights_M)  # noqa: E731
        with self.problem.measuring(), torch.no_grad():
            return torch.func.jvp(losses, (params,), (direction,))[1]

    def _agrees(self, found: Tensor, vector: Tensor) -> bool:
        mean = self.mean if "_sums" in self.__dict__ else self.problem.gradient()[1]
        scale = float(found.double().square().mean().sqrt() + mean.norm() * vector.norm())
        gap = abs(float(found.double().mean()) - float(mean @ vector))
        return gap <= torch.finfo(self.problem.dtype).eps ** 0.5 * scale

    # One chunk at a time

    def _pieces(self) -> Iterator[Pieces]:
        for cut in cuts(self.problem):
            losses, size = [], len(cut.weights_M)
            for start in range(0, size, self.chunk):
                part = range(start, min(start + self.chunk, size))
                pieces, found = self._at_once(cut, part) or self._one_by_one(cut, part)
                losses.append(found)
                yield pieces
            self._check(cut, torch.cat(losses))

    def _at_once(self, cut: Cut, part: range) -> tuple[Pieces, Tensor] | None:
        if not self.how.startswith("vmap"):
            return None
        params = {n: p.detach() for n, p in self.problem.leaves().items()}
        function = torch.func.vmap(torch.func.grad_and_value(partial(self._loss, cut)), in_dims=(None, 0, 0))
        place = slice(part.start, part.stop)
        try:
            with self.problem.measuring():
                return function(params, [t[place] for t in cut.tensors], cut.weights_M[place])
        except torch.OutOfMemoryError:
            raise
        except (
            RuntimeError
        ) as error:  # no rule for a layer, control flow that depends on numbers, a state changed in place
            self.how = f"one by one, because vmap says: {str(error).strip().splitlines()[0]}"
            return None

    def _one_by_one(self, cut: Cut, part: range) -> tuple[Pieces, Tensor]:
        names, rows, losses = self.problem.names, [], []
        for i in part:
            leaves = self.problem.leaves()
            with self.problem.measuring():
                loss = self._loss(cut, leaves, [t[i] for t in cut.tensors], cut.weights_M[i])
                rows.append(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True))
            losses.append(loss.detach())
        return {n: torch.stack([row[k] for row in rows]) for k, n in enumerate(names)}, torch.stack(losses)

    def _loss(self, cut: Cut, params: dict[str, Tensor], tensors: list[Tensor], weight: Tensor) -> Tensor:
        batch = self.problem.ready(cut.rebuild(tensors), index=cut.batch.index, count=1.0, total=1.0)
        return weight * self.problem.loss_of(self.problem.outputs(batch, params), batch)

    def _check(self, cut: Cut, losses_M: Tensor) -> None:
        if cut.batch.index in self._checked:
            return
        with self.problem.measuring(), torch.no_grad():
            whole = self.problem.loss_of(self.problem.outputs(cut.batch), cut.batch)
            if not bool(whole.isfinite()):
                _refuse(self.problem, cut.batch)
        shares = losses_M.double() / cut.weights_M.double().sum()
        if abs(float(shares.sum()) - float(whole)) > torch.finfo(losses_M.dtype).eps ** 0.5 * float(shares.abs().sum()):
            raise CannotTell(
                f"expected the losses of single examples to average to that of their batch, {float(whole):.6g}, got "
                f"{float(shares.sum()):.6g}; a loss or a layer couples examples, or draws random numbers"
            )
        self._checked.add(cut.batch.index)


def pass_cost(problem: Problem) -> float:
    """Expected cost of one pass over all examples, in gradients of the batch.

        2.5 + 40 / r,   r = multiplications of one example's forward pass / P

    Writing the gradients is what costs: a batch gradient of a layer that uses each weight once an example (r = 1, an MLP)
    never makes them; where weights are used at many places (tokens, pixels), r is in the hundreds. Both numbers were measured.

    Args:
        problem: model, loss and data; the model runs once on the first batch.
    """
    from torch.utils.flop_counter import FlopCounterMode

    batch = next(iter(problem.batches()))
    size = min((x.shape[0] for x in tree_flatten(batch.raw)[0] if isinstance(x, Tensor) and x.ndim), default=1)
    with problem.measuring(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        problem.outputs(batch)
    return 2.5 + 40 / max(1.0, counter.get_total_flops() / (2 * max(1, size) * problem.size))


def _refuse(problem: Problem, batch: Batch) -> NoReturn:
    try:
        problem.batch_loss(batch)
    except ValueError as error:
        raise CannotTell(str(error)) from error
    raise CannotTell("expected a finite loss, got one that is not")
