"""The Gauss-Newton matrix: the Hessian of the loss for outputs that are linear in the parameters.

G = sum_b w_b J_b^T H_b J_b over batches b, J: derivative of the outputs by the parameters, H: second derivative of the loss by
the outputs. P: number of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from towtank.curvature.jacobian import Jacobian, Jacobians
from towtank.curvature.output_hessian import Form, Loss, recognise
from towtank.curvature.output_matrix import OutputMatrix
from towtank.curvature.products import Retain
from towtank.linalg.draws import as_generator, dot, rademacher
from towtank.linalg.operator import LinearOperator
from towtank.problem import Batch, Problem
from towtank.problem.blame import check_finite
from towtank.problem.data import examples, part

AFFORDABLE = 2000  # products that an exact diagonal may cost: random estimates to a few percent cost far more
Middle = Callable[[Jacobian, Form, Loss], OutputMatrix]


def output_hessian(jacobian: Jacobian, form: Form, loss: Loss) -> OutputMatrix:
    """The second derivative of a batch's loss by its outputs."""
    return form.at(loss, jacobian.outputs)


class Sandwich:
    """sum_b w_b J_b^T B_b J_b, its products and cheap samples, for any symmetric B on the outputs of a batch.

    Args:
        problem: model, loss and data.
        middle: makes B of one batch from its Jacobian, the form of its loss, and the loss.
        retain: whether graphs are kept between products.
        budget: bytes for `retain="auto"`.
        curved: whether a loss without curvature in the outputs is refused.
    """

    def __init__(
        self, problem: Problem, middle: Middle, *, retain: Retain, budget: float | None, curved: bool = True
    ) -> None:
        self.problem, self.middle, self.curved = problem, middle, curved
        self.jacobians = Jacobians(problem, retain=retain, budget=budget)
        self.semidefinite = True  # until a B is met that is not
        self._forms: dict[tuple[int, object], Form] = {}

    def each(self, use: Callable[[Jacobian, OutputMatrix], None]) -> None:
        """Call `use` on J and B of every batch, with backends set for exact products."""

        def ready(jacobian: Jacobian) -> None:
            jacobian.middle = jacobian.middle or self._made(jacobian)
            use(jacobian, jacobian.middle)

        self.jacobians.each(ready)

    def _made(self, jacobian: Jacobian) -> OutputMatrix:
        loss = partial(_loss, self.problem, jacobian.batch)
        versions = self.problem.versions()
        key = jacobian.batch.index, versions
        if key not in self._forms:
            check_finite(self.problem, loss(jacobian.outputs), jacobian.batch)
            self._forms = {k: form for k, form in self._forms.items() if k[1] == versions}
            self._forms[key] = recognise(loss, jacobian.outputs, curved=self.curved)
        matrix = self.middle(jacobian, self._forms[key], loss)
        self.semidefinite = self.semidefinite and matrix.semidefinite
        return matrix

    def look(self) -> None:
        """Make J and B of every batch, so that a loss or model that does not fit is found out."""
        self.each(lambda jacobian, matrix: None)

    def kinds(self) -> set[str]:
        """The kinds of loss that were recognised."""
        return {form.kind for form in self._forms.values()}

    def product(self, X: Tensor) -> Tensor:
        """The product with X (P, K)."""
        rows = X.T.contiguous()
        total: list[Tensor] = []

        def add(jacobian: Jacobian, matrix: OutputMatrix) -> None:
            for k, x in enumerate(rows):
                u = jacobian.batch.weight * matrix.apply(self.jacobians.times(jacobian, x))
                product = jacobian.transposed(u)
                if k < len(total):
                    total[k] += product
                else:
                    total.append(product)

        self.each(add)
        return torch.stack(total).T if len(total) > 1 else total[0][:, None]

    def trace_samples(self, count: int, generator: torch.Generator | int | None) -> tuple[Tensor, float]:
        """sum_b w_b |J_b^T u_b|^2 for random roots u of B: one backward pass, half the work of a product.

        Where B has no root it is sum_b w_b <J_b v, B_b J_b v> for random signs v, the other half of a product.
        """
        source = as_generator(generator, self.problem.device)
        samples = torch.zeros(count, dtype=torch.float64)

        def add(jacobian: Jacobian, matrix: OutputMatrix) -> None:
            rooted = matrix.semidefinite
            for i in range(count):
                if rooted:
                    half = jacobian.transposed(matrix.signs(source))
                    samples[i] += jacobian.batch.weight * dot(half, half)
                else:
                    samples[i] += jacobian.batch.weight * self._form(jacobian, matrix, source)

        self.each(add)
        return samples, 0.5

    def _form(self, jacobian: Jacobian, matrix: OutputMatrix, source: torch.Generator) -> float:
        p = self.problem
        v = rademacher(p.size, 1, source, like=p.dtype, device=p.device)[:, 0]
        z = self.jacobians.times(jacobian, v)
        return dot(z.flatten(), matrix.apply(z).flatten())

    def exact_diagonal(self) -> tuple[Tensor, float] | None:
        """sum_b w_b sum_u (J_b^T u)^2 over the columns u of a square root of B; None where they are many or not known."""
        costs: list[float] = []
        self.each(lambda j, m: costs.append(m.rank() * SingleExamples(j).cost if m.semidefinite else math.inf))
        if sum(costs) > AFFORDABLE:
            return None
        total = torch.zeros(self.problem.size, dtype=self.problem.dtype, device=self.problem.device)

        def add(jacobian: Jacobian, matrix: OutputMatrix) -> None:
            single = SingleExamples(jacobian)
            with self.problem.measuring():
                for u in matrix.columns():
                    single.add_squares(total, u, jacobian.batch.weight)

        self.each(add)
        return total, sum(costs)


class SingleExamples:
    """J^T u for u that lie in one example, on a graph of that example alone where the batch can be cut.

    Args:
        jacobian: of the whole batch.
    """

    def __init__(self, jacobian: Jacobian) -> None:
        graph = jacobian.graph
        self.whole = self.one = jacobian
        self.place = -1
        self.cut = graph.ndim > 1 and examples(jacobian.batch.raw) == len(graph)
        # In products: half a product's work shared out, and what it costs to write a gradient, as measured (0.1 to 0.3).
        self.cost = 0.5 / len(graph) + 0.2 if self.cut else 0.5

    def add_squares(self, total: Tensor, u: Tensor, scale: float) -> None:
        """Add scale (J^T u)^2 to `total` (P,); call it inside `measuring()`."""
        place = int(u.flatten(1).any(1).nonzero()[0]) if self.cut and bool(u.any()) else self.place
        if self.cut and place != self.place:
            self._move(place)
        self.one.add_squares(total, u[place : place + 1] if self.cut else u, scale)

    def _move(self, place: int) -> None:
        whole = self.whole
        batch = replace(whole.batch, raw=part(whole.batch.raw, place, place + 1))
        self.place, self.one = place, Jacobian(whole.problem, batch, whole.leaves)
        expected = whole.outputs[place : place + 1]
        rounding = torch.finfo(expected.dtype).eps ** 0.5 * expected.abs().amax()
        if self.one.graph.shape != expected.shape or not ((self.one.outputs - expected).abs() <= rounding).all():
            self.cut, self.one = False, whole  # the examples of this batch depend on each other


def _loss(problem: Problem, batch: Batch, outputs: Tensor) -> Tensor:
    return problem.loss_of(outputs, batch)


class GaussNewton(LinearOperator):
    """G = sum_b w_b J_b^T H_b J_b: the Hessian without the curvature of the network itself.

    A product costs about 1.3 gradients on kept graphs, about 2.3 on fresh ones.

    Args:
        problem: model, loss and data; the model's outputs must be one tensor.
        retain: whether forward graphs are kept between products: True, False, or "auto" for as far as memory allows.
        budget: bytes for "auto"; default: half of the memory that is free at first use.

    Raises:
        ValueError: if the loss has no curvature in the outputs.
        NotImplementedError: if a derivative that is needed does not exist.

    Example:
        Linear regression, L = mean (w x - y)^2: G = 2 mean x^2, for any w and y.

        >>> x = torch.tensor([[1.0], [3.0]])
        >>> problem = Problem(torch.nn.Linear(1, 1, bias=False), torch.nn.functional.mse_loss, (x, torch.zeros(2, 1)))
        >>> GaussNewton(problem) @ torch.ones(1)
        tensor([10.])

    Source: Schraudolph 2002, section 3; Martens 2020, section 8.
    """

    def __init__(self, problem: Problem, *, retain: Retain = "auto", budget: float | None = None) -> None:
        self.problem, self._options = problem, {"retain": retain, "budget": budget}
        self._sandwich = Sandwich(problem, output_hessian, retain=retain, budget=budget)
        self._sandwich.look()
        sign = (
            ""
            if self._sandwich.semidefinite
            else ", may be indefinite: the loss is not known to be convex in the outputs"
        )
        super().__init__(
            problem.size,
            dtype=problem.dtype,
            device=problem.device,
            semidefinite=self._sandwich.semidefinite,
            cost=1.4,  # gradients, on kept graphs; a Hessian product is 2
            convention=f"Gauss-Newton matrix of the {problem.convention}{sign}",
            slices=problem.slices,
        )

    def _matmat(self, X: Tensor) -> Tensor:
        product = self._sandwich.product(X)
        self.semidefinite = self._sandwich.semidefinite  # parameters that moved may have changed it
        return product

    def _restricted(self, index: Tensor | list[str]) -> LinearOperator:
        if isinstance(index, Tensor):
            return super()._restricted(index)
        return GaussNewton(self.problem.restrict(index), **self._options)

    def trace_samples(self, count: int, generator: torch.Generator | int | None) -> tuple[Tensor, float] | None:
        """Samples of the trace from random signs on a square root of the loss' curvature, one backward pass each.

        Args:
            count: number of samples.
            generator: of the signs.
        """
        return self._sandwich.trace_samples(count, generator)

    def exact_diagonal(self) -> tuple[Tensor, float] | None:
        """The diagonal (P,), from one backward pass for each column of a square root of H; None where they are many."""
        return self._sandwich.exact_diagonal()
