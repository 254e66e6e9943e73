"""The systems that `bench/curvature.py` compares, each behind the same few methods.

Every peer is used as its documentation says, in its best setting for one fixed batch: curvlinops without its determinism
check and with the ARPACK basis that suits it, PyHessian in single-batch mode (which keeps its graph).

No peer's trace stops at a requested standard error. Their samples are drawn a fixed number of times, and the cost is that of as
many as the requested error takes: `pilot`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from curvature_cases import Case, flat
from torch import Tensor

from towtank.curvature.gauss_newton import GaussNewton
from towtank.curvature.hessian import Hessian
from towtank.linalg.density import spectral_density
from towtank.linalg.eigsh import eigsh
from towtank.linalg.trace import trace
from towtank.problem import Problem

Product = Callable[[Tensor], Tensor]
Answer = tuple[float, float, float]  # value, the error the system itself states (NaN: none), products


class Sampled(NamedTuple):
    """A trace: its value, its standard error, the products that the requested error takes, and what share that is of those made."""

    value: float
    stderr: float
    products: float
    share: float


@dataclass(frozen=True)
class System:
    """A system on one case. Making it costs nothing: each method pays for what it needs."""

    case: Case


class Towtank(System):
    """This package, with its defaults."""

    def problem(self) -> Problem:
        """The case as a problem of this package."""
        return Problem(self.case.model, self.case.loss, (self.case.inputs, self.case.targets))

    def hessian(self, retain: Any = "auto") -> Product:
        return Hessian(self.problem(), retain=retain).__matmul__

    def gauss_newton(self) -> Product:
        return GaussNewton(self.problem()).__matmul__

    def largest(self) -> Answer:
        pairs = eigsh(Hessian(self.problem()), 1, tol=1e-3, generator=_seeded(self.case))
        return float(pairs.values[0]), float(pairs.residuals[0]), pairs.products

    def trace(self, which: str, rtol: float) -> Sampled:
        op = {"G": GaussNewton, "H": Hessian}[which](self.problem())
        found = trace(op, rtol=rtol, generator=_seeded(self.case))
        return Sampled(found.value, found.stderr, found.products, 1.0)

    def density(self, steps: int) -> tuple[Tensor, Tensor]:
        found = spectral_density(Hessian(self.problem()), steps=steps, generator=_seeded(self.case))
        return found.nodes[0], found.weights[0]


class Curvlinops(System):
    """curvlinops."""

    def _operator(self, which: str) -> Any:
        import curvlinops

        kind = {"G": curvlinops.GGNLinearOperator, "H": curvlinops.HessianLinearOperator}[which]
        case, mean = self.case, torch.nn.CrossEntropyLoss()
        forward = torch.nn.Sequential(case.model, torch.nn.Flatten(0, -2)) if case.targets.ndim > 1 else case.model
        data = [(case.inputs, case.targets.flatten())]
        return kind(forward, mean, case.parameters, data, check_deterministic=False)

    def hessian(self) -> Product:
        op = self._operator("H")
        return lambda v: op @ v

    def gauss_newton(self) -> Product:
        op = self._operator("G")
        return lambda v: op @ v

    def largest(self, basis: int | None = None) -> Answer:
        import numpy as np
        from scipy.sparse.linalg import LinearOperator, eigsh

        op, count = self._operator("H"), 0

        def product(v: Any) -> Any:
            nonlocal count
            count += 1
            return (op @ torch.from_numpy(np.ravel(v)).to(op.device)).cpu().numpy()

        A = LinearOperator((self.case.size,) * 2, matvec=product, dtype=np.float32)
        start = torch.randn(self.case.size, generator=torch.Generator().manual_seed(0)).numpy()
        found = eigsh(A, k=1, which="LA", tol=1e-3, ncv=basis, v0=start, return_eigenvectors=False)
        return float(found[0]), math.nan, count

    def trace(self, which: str, rtol: float) -> Sampled:
        from curvlinops import hutchinson_trace

        op = self._operator(which)
        return pilot(rtol, lambda: float(hutchinson_trace(op, 1)))

    def density(self, steps: int) -> tuple[Tensor, Tensor]:
        from curvlinops.papyan2020traces.spectrum import fast_lanczos

        values, vectors = fast_lanczos(self._operator("H"), steps)
        return values, vectors[0].square()


class PyHessian(System):
    """PyHessian, on one batch."""

    def _hessian(self) -> Any:
        from pyhessian import hessian

        case = self.case
        for p in case.parameters:
            p.grad = None  # it adds to what is there
        cuda = case.inputs.is_cuda
        return hessian(case.model, case.loss, data=(case.inputs, case.targets), cuda=cuda)

    def hessian(self) -> Product:
        from pyhessian.utils import hessian_vector_product

        made = self._hessian()

        def product(v: Tensor) -> Tensor:
            parts = [x.view_as(p) for x, p in zip(v.split([p.numel() for p in made.params]), made.params, strict=True)]
            return flat(hessian_vector_product(made.gradsH, made.params, parts))

        return product

    def largest(self) -> Answer:
        module = import_module("pyhessian.hessian")
        made, count, product = self._hessian(), 0, module.hessian_vector_product

        def counted(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            return product(*arguments)

        module.hessian_vector_product = counted
        try:
            return float(made.eigenvalues(tol=1e-3)[0][0]), math.nan, count
        finally:
            module.hessian_vector_product = product

    def trace(self, which: str, rtol: float) -> Sampled:
        made = self._hessian()
        return pilot(rtol, lambda: made.trace(maxIter=1)[0])

    def density(self, steps: int) -> tuple[Tensor, Tensor]:
        values, weights = self._hessian().density(iter=steps)
        return torch.tensor(values[0]), torch.tensor(weights[0])


class Eigenthings(System):
    """hessian-eigenthings."""

    def _operator(self, which: str) -> Any:
        import hessian_eigenthings as he

        case, data = self.case, [(self.case.inputs, self.case.targets)]
        if which == "H":
            return he.HessianOperator(case.model, data, he.supervised_loss(case.loss))
        return he.GGNOperator(case.model, data, he.supervised_forward, he.supervised_loss_of_output(case.loss))

    def hessian(self) -> Product:
        return self._operator("H").matvec

    def gauss_newton(self) -> Product:
        return self._operator("G").matvec

    def largest(self, steps: int | None = None) -> Answer:
        import hessian_eigenthings as he

        found = he.lanczos(self._operator("H"), k=1, max_iter=steps, tol=1e-3, which="LA", seed=0)
        return float(found.eigenvalues[0]), float(found.residuals[0]), found.iterations

    def trace(self, which: str, rtol: float) -> Sampled:
        import hessian_eigenthings as he

        op, seeds = self._operator(which), iter(range(10**6))
        return pilot(rtol, lambda: float(he.hutchinson(op, num_samples=1, seed=next(seeds)).estimate))

    def density(self, steps: int) -> tuple[Tensor, Tensor]:
        import hessian_eigenthings as he

        found = he.spectral_density(self._operator("H"), num_runs=1, lanczos_steps=steps, seed=0)
        return found.raw_eigenvalues[0], found.raw_weights[0]


def pilot(rtol: float, sample: Callable[[], float], drawn: int = 40) -> Sampled:
    """The mean of a fixed number of samples, and how many of them a standard error of `rtol` would take.

    A loop that stops as soon as a standard error looks small would stop on luck after a handful.
    """
    found = [sample() for _ in range(drawn)]
    mean, deviation = statistics.fmean(found), statistics.stdev(found)
    needed = max(1, math.ceil((deviation / (rtol * mean)) ** 2))
    return Sampled(mean, deviation / drawn**0.5, needed, needed / drawn)


def _seeded(case: Case) -> torch.Generator:
    return torch.Generator(case.inputs.device).manual_seed(0)
