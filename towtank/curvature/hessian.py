"""The Hessian of a problem, by its products."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from towtank.curvature.blame import blame
from towtank.curvature.comparison import SelfCheck
from towtank.curvature.finite_difference import CentralDifferences
from towtank.curvature.gradient_graph import GradientGraph, MissingDerivative
from towtank.curvature.products import Graphs, Retain
from towtank.curvature.selfcheck import few_examples, self_check
from towtank.linalg.operator import LinearOperator
from towtank.problem import Batch, Problem

if TYPE_CHECKING:
    from towtank.curvature.gauss_newton import GaussNewton

Method = Literal["autograd", "finite_difference"]


class Hessian(LinearOperator):
    """H = d^2 L / d theta^2 of the full loss of a problem, as an operator on flat vectors (P,).

    Products are reverse over reverse. The gradient graph of every batch is kept while memory allows, which makes a product
    cost about two gradients instead of three. They are rebuilt when a parameter changes: the operator is always that of the
    parameters as they are. The first product is preceded by a self-check on two examples of the first batch, which costs two
    products and two float64 gradients of those two.

    Args:
        problem: model, loss and data.
        method: "autograd", or "finite_difference": central differences of the gradient, two gradients a product, for models
            whose second derivative does not exist. `noise` then says how far the first product can be trusted.
        retain: whether gradient graphs are kept: True, False, or "auto", as many as the budget allows.
        budget: bytes for "auto"; default: half of the free memory.
        check: whether to run the self-check.

    Raises:
        RuntimeError: at the first product, if a second derivative does not exist or is wrong, naming the module.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
        >>> Hessian(Problem(model, torch.nn.functional.mse_loss, (x, y))).dense()  # 2 x'x / 2
        tensor([[1., 0.],
                [0., 4.]])

    Source: B. Pearlmutter 1994, "Fast exact multiplication by the Hessian"; reverse over reverse as in PyHessian.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        method: Method = "autograd",
        retain: Retain = "auto",
        budget: float | None = None,
        check: bool = True,
    ) -> None:
        if method not in ("autograd", "finite_difference"):
            raise ValueError(f"expected method 'autograd' or 'finite_difference', got {method!r}")
        by = "" if method == "autograd" else " by finite differences"
        super().__init__(
            problem.size,
            dtype=problem.dtype,
            device=problem.device,
            cost=2.0,  # gradients, on kept graphs; a Gauss-Newton product is 1.4
            convention=f"Hessian{by}: {problem.convention}",
            slices=problem.slices,
        )
        self.problem, self.check = problem, check
        self.method: Method = method
        self.checked: SelfCheck | None = None
        self.retain: Retain = retain
        self.budget = budget
        self.graphs = Graphs(problem, _gradient_graph(problem), lambda g: g.roots, retain=retain, budget=budget)
        self._differences = CentralDifferences(problem) if method == "finite_difference" else None

    @property
    def noise(self) -> float | None:
        """Relative noise of a product by finite differences, measured on the first one; None before, and for autograd."""
        return self._differences.noise if self._differences else None

    def release(self) -> None:
        """Free every graph that is kept; the next product builds them anew."""
        self.graphs.release()

    def _matmat(self, X: Tensor) -> Tensor:
        with torch.inference_mode(False):
            rows = X.T.clone(memory_format=torch.contiguous_format) if X.is_inference() else X.T.contiguous()
            if not len(rows):
                return torch.zeros_like(X)
            return self._of_rows(rows).T

    def _of_rows(self, rows: Tensor) -> Tensor:
        if self._differences:
            return torch.stack([self._differences.product(v) for v in rows])
        try:
            if self.check and self.checked is None:
                self.checked = self_check(self.problem)
            return self._products(rows)
        except MissingDerivative as error:
            self.release()
            raise RuntimeError(_missing(self.problem, error)) from error

    def _products(self, rows: Tensor) -> Tensor:
        total: Tensor | None = None

        def add(graph: GradientGraph) -> None:
            nonlocal total
            found = graph.products(rows, last=not self.graphs.holds(graph)).to(self.dtype)
            total = found if total is None else total.add_(found)

        self.graphs.each(add)
        assert total is not None  # the survey refuses problems without a batch that counts
        return total

    def _restricted(self, index: Tensor | list[str]) -> LinearOperator:
        if isinstance(index, Tensor):
            return super()._restricted(index)
        part = self.problem.restrict(index)
        return Hessian(part, method=self.method, retain=self.retain, budget=self.budget, check=self.check)

    def control(self) -> GaussNewton:
        """Its Gauss-Newton matrix: the part of the Hessian that is cheap to sample, and near a minimum most of it."""
        from towtank.curvature.gauss_newton import GaussNewton

        return GaussNewton(self.problem)


def _gradient_graph(problem: Problem):  # noqa: ANN202
    def build(batch: Batch, leaves: dict[str, Tensor]) -> GradientGraph:
        return GradientGraph(batch.weight * problem.batch_loss(batch, leaves), list(leaves.values()))

    return build


def _missing(problem: Problem, error: MissingDerivative) -> str:
    return (
        f"expected a second derivative, got {str(error)!r} from {blame(few_examples(problem)[0])}; "
        "use Hessian(problem, method='finite_difference'), or replace what has none"
    )
