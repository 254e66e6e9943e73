"""Walks over batches and backward passes that show, for every layer, what its gradients are made of.

The vectors that are propagated backwards have second moments equal to the second derivative of the loss in the outputs, so
that the gradients they give have those of the Gauss-Newton matrix.

E examples, R positions, m, n: shape of a weight, K: outputs of one example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from towtank.curvature.captures import Layer, Rest, Sides, captured, layers_of, sides
from towtank.curvature.fisher import Kind, empirical
from towtank.curvature.jacobian import Jacobian
from towtank.curvature.output_hessian import OutputMatrix, recognise
from towtank.linalg.draws import as_generator
from towtank.problem import Batch, Problem

COLUMNS = 256  # most outputs of one example for which "exact" makes a backward pass each


Visit = Callable[[int, list[Sides], Batch], None]


class Passes:
    """Walks over batches and backward passes.

    Args:
        problem: model, loss and data.
        kind: which vectors go backwards: columns of exact square roots, random roots, or the gradients by the labels.
        samples: of random roots.
        rest: see `layers_of`.
        generator: of random roots, or a seed.

    Raises:
        ValueError: if the kind is unknown, or there are no samples.
    """

    def __init__(self, problem: Problem, kind: Kind, samples: int, rest: Rest, generator: Any) -> None:
        if kind not in ("exact", "sampled", "empirical"):
            raise ValueError(f'expected kind "exact", "sampled" or "empirical", got {kind!r}')
        if samples < 1:
            raise ValueError(f"expected at least 1 sample, got {samples}")
        self.problem, self.kind, self.samples = problem, kind, samples
        self.layers = layers_of(problem, rest)
        self.generator = as_generator(generator, problem.device)
        self._checked = False

    def walk(self, *, grouped: bool, visit: Visit, done: Callable[[Batch], None] = lambda batch: None) -> None:
        """Show every layer's sides, (E, R, .) if grouped and (1, E R, .) otherwise, for each backward pass.

        Args:
            grouped: whether positions are told apart by example.
            visit: receives the place of the layer, the sides of its uses, and the batch.
            done: called after the last backward pass of a batch.
        """
        modules = dict.fromkeys(use.module for layer in self.layers for use in layer.uses)
        with self.problem.measuring():
            for batch in self.problem.batches():
                with captured(modules) as calls:
                    jacobian = Jacobian(self.problem, batch, self.problem.leaves())
                ends = [output for kept in calls.values() for _, output in kept]
                examples = _examples(batch)
                for seed in self._seeds(jacobian, batch, examples):
                    found = _gradients_at(jacobian, ends, seed)
                    by_output = {id(e): g for e, g in zip(ends, found, strict=True)}
                    for place, layer in enumerate(self.layers):
                        shown = self._sides(layer, calls, by_output, examples if grouped else 1)
                        self._check(layer, shown, jacobian, seed)
                        visit(place, shown, batch)
                    self._checked = True
                done(batch)

    def _sides(self, layer: Layer, calls: Any, by_output: dict[int, Tensor], examples: int) -> list[Sides]:
        """One item a use; the calls of one module are further positions."""
        dtype, shown = self.problem.dtype, []
        for use in layer.uses:
            parts = [sides(use, call, by_output[id(call[1])], examples, dtype) for call in calls[use.module]]
            if parts:
                rho, kappa = (torch.cat([getattr(p, k) for p in parts], dim=1) for k in ("rho", "kappa"))
                shown.append(Sides(rho, kappa, parts[0].gradient_is_rho))
        return shown

    def _check(self, layer: Layer, shown: list[Sides], jacobian: Jacobian, seed: Tensor) -> None:
        """Compare the captured gradient with autograd's, once."""
        if self._checked:
            return
        leaves = [jacobian.leaves[n] for n in layer.names]
        wanted = _gradients_at(jacobian, leaves, seed)
        m = layer.shape[0]
        wanted = torch.cat([g.reshape(m, -1).to(self.problem.dtype) for g in wanted], dim=1)
        got = gradients(layer, shown).sum(0) if shown else torch.zeros_like(wanted)
        scale = sum(float(s.rho.abs().max() * s.kappa.abs().max()) for s in shown) + float(wanted.norm())
        if float((got - wanted).norm()) > torch.finfo(wanted.dtype).eps ** 0.5 * scale:
            raise NotImplementedError(
                f"expected the gradient of {' and '.join(layer.names)} to come from the calls of its layer, got another: it is "
                "used elsewhere, or its layer computes something else; leave it out by Problem(..., params=...)"
            )

    def _seeds(self, jacobian: Jacobian, batch: Batch, examples: int) -> Iterator[Tensor]:
        """Vectors u on the outputs with sum u u^T = the second derivative of the batch's loss, or its empirical twin."""
        loss = partial(_loss, self.problem, batch)
        form = recognise(loss, jacobian.outputs, curved=self.kind != "empirical")
        if self.kind == "empirical":
            yield from empirical(jacobian, form, loss).vectors
            return
        matrix = form.at(loss, jacobian.outputs)
        if self.kind == "exact":
            yield from _columns(matrix, jacobian.outputs, examples)
        else:
            for _ in range(self.samples):
                yield matrix.root(self.generator) / self.samples**0.5


def _gradients_at(jacobian: Jacobian, ends: list[Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    if not ends:
        return ()
    return torch.autograd.grad(jacobian.graph, ends, seed, retain_graph=True, allow_unused=True, materialize_grads=True)


def _loss(problem: Problem, batch: Batch, outputs: Tensor) -> Tensor:
    return problem.loss_of(outputs, batch)


def _examples(batch: Batch) -> int:
    """Length of the first axis of the batch."""
    tensors = pytree.tree_leaves(batch.raw)
    return next(t.shape[0] for t in tensors if isinstance(t, Tensor) and t.ndim)


def _columns(matrix: OutputMatrix, outputs: Tensor, examples: int) -> Iterator[Tensor]:
    """Columns of square roots of every example's own block of the matrix, one of each example at a time.

    Raises:
        ValueError: if there are too many, or the loss is not convex.
    """
    K = outputs.numel() // examples
    if outputs.numel() % examples or K > COLUMNS:
        raise ValueError(
            f"expected at most {COLUMNS} outputs for each of {examples} examples, got outputs of shape "
            f'{tuple(outputs.shape)}; use kind="sampled"'
        )
    blocks = torch.zeros(examples, K, K, dtype=torch.float64, device=outputs.device)
    for k in range(K):
        unit = outputs.new_zeros(examples, K)
        unit[:, k] = 1
        blocks[:, :, k] = matrix.apply(unit.reshape(outputs.shape)).reshape(examples, K).double()
    _check_independent(matrix, outputs, examples)
    values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
    eps = torch.finfo(outputs.dtype).eps
    if float(values.min()) < -8 * K * eps * float(values.abs().max()):
        raise ValueError(
            "expected a loss that is convex in the outputs, got a negative second derivative; use GaussNewton"
        )
    roots = vectors * values.clamp(min=0).sqrt()[:, None, :]
    for k in range(K):
        if roots[:, :, k].any():
            yield roots[:, :, k].to(outputs.dtype).reshape(outputs.shape)


def _check_independent(matrix: OutputMatrix, outputs: Tensor, examples: int) -> None:
    """Refuse losses that couple examples, which have no blocks.

    Raises:
        ValueError: then.
    """
    odd = (torch.arange(examples, device=outputs.device) % 2).to(outputs.dtype)
    u = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0), dtype=outputs.dtype).to(outputs.device)
    product = matrix.apply((u.reshape(examples, -1) * odd[:, None]).reshape(outputs.shape)).reshape(examples, -1)
    if float((product * (1 - odd)[:, None]).abs().max()) > torch.finfo(u.dtype).eps ** 0.5 * float(product.abs().max()):
        raise ValueError(
            "expected a loss that is a mean over independent examples, got one that couples them; use GaussNewton"
        )


def gradients(layer: Layer, shown: list[Sides]) -> Tensor:
    """Gradients of single examples (E, m, n)."""
    m, n = layer.shape
    total = torch.zeros(shown[0].kappa.shape[0], m, n, dtype=shown[0].kappa.dtype, device=shown[0].kappa.device)
    for s in shown:
        if s.rho.is_floating_point():
            total += torch.einsum("erm,ern->emn", s.rho, s.kappa)
        else:
            first = m * torch.arange(len(total), device=total.device)[:, None]
            total.view(-1, n).index_add_(0, (first + s.rho).reshape(-1), s.kappa.reshape(-1, n))
    return total
