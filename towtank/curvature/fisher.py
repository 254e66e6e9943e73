"""The Fisher information matrix, exact, sampled and empirical: the mean of outer products of gradients of single terms.

F = sum_b w_b J_b^T B_b J_b, where B is a block for each term of the loss. A term is one row of a softmax cross-entropy (an
example, or a token of a sequence), and one example (index of the outputs' first axis) for every other loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from towtank.curvature.gauss_newton import Sandwich, output_hessian
from towtank.curvature.jacobian import Jacobian
from towtank.curvature.output_hessian import Form, Loss, slope
from towtank.curvature.output_matrix import Likelihood, OutputMatrix
from towtank.curvature.products import Retain
from towtank.linalg.operator import LinearOperator
from towtank.problem import Problem

Kind = Literal["exact", "sampled", "empirical"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Outer(OutputMatrix):
    """sum_m u_m u_m^T in the block of each term.

    Args:
        vectors: u, shape (M, ...) over the outputs' shape.
        axes: the axes of the outputs, counted from the end, that belong to one term.

    Example:
        >>> Outer(vectors=torch.tensor([[[1.0, 2.0]]]), axes=(-1,)).apply(torch.tensor([[1.0, 1.0]]))
        tensor([[3., 6.]])
    """

    vectors: Tensor
    axes: tuple[int, ...]
    semidefinite: bool = True
    likelihood: Likelihood | None = None

    def apply(self, u: Tensor) -> Tensor:
        """sum_m u_m <u_m, u> term by term."""
        return (self.vectors * self._total(self.vectors * u)).sum(0)

    def root(self, generator: torch.Generator) -> Tensor:
        """The vectors with a random sign for each term."""
        shape = self._total(self.vectors).shape
        bits = torch.randint(0, 2, shape, generator=generator, device=generator.device)
        return (self.vectors * (2 * bits.to(self.vectors) - 1)).sum(0)

    def rank(self) -> int:
        """Number of vectors times number of terms."""
        return int((self._total(self.vectors.abs()) != 0).sum())

    def columns(self) -> Iterator[Tensor]:
        """Each u in each term alone."""
        terms = self._total(self.vectors.abs()) != 0
        for m, *place in terms.nonzero().tolist():
            here = torch.zeros_like(terms[0])
            here[*place] = True
            yield self.vectors[m] * here

    def _total(self, x: Tensor) -> Tensor:
        return x.sum(self.axes, keepdim=True) if self.axes else x


class Fisher(LinearOperator):
    """F, the mean over loss terms of E[g g^T], g the gradient of a term: over the model's own labels or the given ones.

    "exact": the expectation over labels that the model itself would give, which is the Gauss-Newton matrix for softmax and
    binary cross-entropy, squared error and Poisson likelihoods of the natural parameter. "sampled": a few labels drawn from
    the model for each term; random signs stand in for the noise of single outputs. "empirical": the labels of the data; it is
    no estimate of the other two away from a perfect fit (Kunstner, Balles, Hennig 2019). All cost as much as a Gauss-Newton
    product, since single gradients are never formed.

    Args:
        problem: model, loss and data. The loss is a mean over terms, each of which depends on its own outputs only.
        kind: which labels.
        samples: draws for each term, for "sampled".
        generator: of the draws, or an integer seed; the draws are fixed, so that the operator is always the same matrix.
        retain: whether forward graphs are kept between products: True, False, or "auto" for as far as memory allows.
        budget: bytes for "auto"; default: half of the memory that is free at first use.

    Raises:
        ValueError: if the loss is no negative log-likelihood that is known (but for "empirical"), or couples its terms.

    Example:
        Logistic regression at p = 1/2: the trace is mean p (1 - p) |x|^2.

        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> batch = torch.tensor([[1.0, 1.0], [1.0, 3.0]]), torch.tensor([[0.0], [1.0]])
        >>> fisher = Fisher(Problem(model, torch.nn.functional.binary_cross_entropy_with_logits, batch))
        >>> fisher.dense().trace()
        tensor(1.5000)

    Source: Martens 2020, equations 4 and 28.
    """

    def __init__(
        self,
        problem: Problem,
        kind: Kind = "exact",
        *,
        samples: int = 1,
        generator: torch.Generator | int | None = None,
        retain: Retain = "auto",
        budget: float | None = None,
    ) -> None:
        if kind not in ("exact", "sampled", "empirical"):
            raise ValueError(f"expected kind 'exact', 'sampled' or 'empirical', got {kind!r}")
        if samples < 1:
            raise ValueError(f"expected at least one sample for each term, got {samples}")
        seed = _seed(generator)
        self.problem = problem
        self.kind: Kind = kind
        self._options = {"samples": samples, "generator": seed, "retain": retain, "budget": budget}
        middles = {"exact": _exact, "sampled": partial(_sampled, samples, seed), "empirical": empirical}
        self._sandwich = Sandwich(problem, middles[kind], retain=retain, budget=budget, curved=kind != "empirical")
        self._sandwich.look()  # whether the loss allows it is found here, not in the first product
        labels = {
            "exact": "the model's labels",
            "sampled": f"{samples} drawn labels a term",
            "empirical": "given labels",
        }
        super().__init__(
            problem.size,
            dtype=problem.dtype,
            device=problem.device,
            semidefinite=True,
            convention=f"Fisher matrix over {labels[kind]}, mean over {self._terms()}, of the {problem.convention}",
            slices=problem.slices,
        )

    def _terms(self) -> str:
        return "rows of the softmax" if self._sandwich.kinds() == {"softmax"} else "examples"

    def _matmat(self, X: Tensor) -> Tensor:
        return self._sandwich.product(X)

    def _restricted(self, index: Tensor | list[str]) -> LinearOperator:
        if isinstance(index, Tensor):
            return super()._restricted(index)
        return Fisher(self.problem.restrict(index), self.kind, **self._options)

    def trace_samples(self, count: int, generator: torch.Generator | int | None) -> tuple[Tensor, float] | None:
        """Samples of the trace from random signs on a square root of B, one backward pass each.

        Args:
            count: number of samples.
            generator: of the signs.
        """
        return self._sandwich.trace_samples(count, generator)

    def exact_diagonal(self) -> tuple[Tensor, float] | None:
        """The diagonal (P,), from one backward pass for each column of a square root of B; None where they are many."""
        return self._sandwich.exact_diagonal()


def _seed(generator: torch.Generator | int | None) -> int:
    if isinstance(generator, torch.Generator):
        return int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return int(generator or 0)


def _exact(jacobian: Jacobian, form: Form, loss: Loss) -> OutputMatrix:
    matrix = output_hessian(jacobian, form, loss)
    if matrix.likelihood is None or not matrix.semidefinite:
        raise ValueError(
            "expected a loss that is a negative log-likelihood of the outputs (softmax or binary cross-entropy of logits, "
            "squared error, Poisson), got one that is not; use GaussNewton, or Fisher(problem, 'empirical')"
        )
    return matrix


def _sampled(samples: int, seed: int, jacobian: Jacobian, form: Form, loss: Loss) -> OutputMatrix:
    matrix = _exact(jacobian, form, loss)
    generator = torch.Generator().manual_seed(seed + jacobian.batch.index)
    draws = torch.stack([matrix.root(generator) for _ in range(samples)])
    return Outer(vectors=draws / samples**0.5, axes=_axes(form, jacobian.outputs))


def empirical(jacobian: Jacobian, form: Form, loss: Loss) -> Outer:
    """The matrix g g^T / share for each term, of gradient g in the batch's mean loss and of that share of the mean.

    Raises:
        ValueError: if terms cannot be told apart.
    """
    z = jacobian.outputs
    axes = _axes(form, z)
    g = slope(loss, z)
    if form.kind == "softmax" and form.weights is not None:
        share = form.weights.unsqueeze(form.axis)
    else:
        if form.kind == "other":
            _check_separate(loss, z, g)
        counted = _any(g != 0, axes) | _any(output_hessian(jacobian, form, loss).apply(torch.ones_like(z)) != 0, axes)
        share = counted.to(z.dtype) / counted.sum().clamp(min=1)
    if bool((share < 0).any()):
        raise ValueError("expected terms of positive weight, got a term that counts negatively in the mean")
    return Outer(vectors=(g / share.where(share > 0, 1).sqrt())[None], axes=axes)


def _axes(form: Form, z: Tensor) -> tuple[int, ...]:
    return (form.axis,) if form.kind == "softmax" else tuple(range(1 - z.ndim, 0))


def _any(mask: Tensor, axes: tuple[int, ...]) -> Tensor:
    return mask.any(axes, keepdim=True) if axes else mask


def _check_separate(loss: Callable[[Tensor], Tensor], z: Tensor, g: Tensor) -> None:
    if z.ndim == 0 or len(z) < 2:
        return
    moved = z.clone()
    moved[1::2] = moved[1::2].flip(-1) + 1
    if not torch.allclose(slope(loss, moved)[::2], g[::2], rtol=torch.finfo(z.dtype).eps ** 0.5, atol=0):
        raise ValueError(
            "expected a loss that is a mean over examples, got one whose term for an example depends on other examples' "
            "outputs; there is no empirical Fisher matrix of such a loss"
        )
