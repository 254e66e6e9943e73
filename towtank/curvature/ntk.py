"""The neural tangent kernel, as the Gram matrix of the outputs' gradients.

J: derivative of all outputs on all data by the parameters. M: number of outputs, over all examples and classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from towtank.curvature.jacobian import Jacobian, Jacobians
from towtank.curvature.products import Retain
from towtank.linalg.draws import as_generator, dot, rademacher
from towtank.linalg.operator import LinearOperator
from towtank.problem import Problem


class NTK(LinearOperator):
    """K = J J^T (M, M): outputs of all batches in order, each flattened; no weights, every output counts as it is.

    Products are J (J^T u); J itself is never formed. Padded positions of a batch are outputs like any other.

    Args:
        problem: model and data; the loss does not enter.
        retain: whether forward graphs are kept between products: True, False, or "auto" for as far as memory allows.
        budget: bytes for "auto"; default: half of the memory that is free at first use.

    Example:
        A linear model of one output: K = X X^T.

        >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> problem = Problem(torch.nn.Linear(2, 1, bias=False), torch.nn.functional.mse_loss, (x, torch.zeros(2, 1)))
        >>> NTK(problem).dense()
        tensor([[5., 2.],
                [2., 1.]])

    Source: Jacot, Gabriel, Hongler 2018, section 4.
    """

    def __init__(self, problem: Problem, *, retain: Retain = "auto", budget: float | None = None) -> None:
        self.problem = problem
        self._jacobians = Jacobians(problem, retain=retain, budget=budget)
        sizes: dict[int, int] = {}
        self._jacobians.each(lambda j: sizes.update({j.batch.index: j.outputs.numel()}))
        size = sum(sizes.values())
        super().__init__(
            size,
            dtype=problem.dtype,
            device=problem.device,
            semidefinite=True,
            convention=f"neural tangent kernel of {size} outputs, unweighted, of the problem: {problem.convention}",
        )
        self._places = dict(zip(sizes, torch.arange(size, device=self.device).split(list(sizes.values()))))

    def _matmat(self, X: Tensor) -> Tensor:
        gradients = torch.zeros(X.shape[1], self.problem.size, dtype=self.dtype, device=self.device)
        product = torch.empty_like(X)

        def gather(jacobian: Jacobian) -> None:
            for u, total in zip(self._part(jacobian, X).unbind(1), gradients):
                total += jacobian.transposed(u.reshape(jacobian.graph.shape).to(jacobian.graph.dtype))

        def spread(jacobian: Jacobian) -> None:
            columns = [self._jacobians.times(jacobian, g).flatten().to(self.dtype) for g in gradients]
            product[self._places[jacobian.batch.index]] = torch.stack(columns, dim=1)

        self._jacobians.each(gather)
        self._jacobians.each(spread)
        return product

    def _part(self, jacobian: Jacobian, X: Tensor) -> Tensor:
        return X[self._places[jacobian.batch.index]]

    def trace_samples(self, count: int, generator: torch.Generator | int | None) -> tuple[Tensor, float] | None:
        """sum_b |J_b^T u|^2 for random signs u: one backward pass, half the work of a product.

        Args:
            count: number of samples.
            generator: of the signs.
        """
        source = as_generator(generator, self.device)
        samples = torch.zeros(count, dtype=torch.float64)

        def add(jacobian: Jacobian) -> None:
            z = jacobian.graph
            for i, u in enumerate(rademacher(z.numel(), count, source, like=z.dtype, device=z.device).unbind(1)):
                half = jacobian.transposed(u.reshape(z.shape))
                samples[i] += dot(half, half)

        self._jacobians.each(add)
        return samples, 0.5
