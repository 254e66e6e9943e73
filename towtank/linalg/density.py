"""Spectral density by stochastic Lanczos quadrature.

P: dimension; r: probes; m: steps; g: grid points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from towtank.estimate import Estimate
from towtank.linalg.draws import as_generator, rademacher
from towtank.linalg.lanczos import Krylov
from towtank.linalg.operator import LinearOperator
from towtank.linalg.products import Products
from towtank.linalg.sampling import Running


@dataclass(frozen=True, kw_only=True)
class Smoothed:
    """A density on a grid: the mean over probes and its standard error.

    Args:
        grid: eigenvalues, (g,).
        density: share of eigenvalues per unit of the axis at each of them, (g,); integrates to one along the axis.
        stderr: standard error over probes, (g,); NaN for a single probe.
        axis: grid points as positions on the axis, (g,): the grid itself, or its signed logarithm.
        width: standard deviation of the kernel, in units of the axis.
    """

    grid: Tensor
    density: Tensor
    stderr: Tensor
    axis: Tensor
    width: float


@dataclass(frozen=True, kw_only=True)
class SpectralDensity:
    """Quadrature rules for the distribution of the eigenvalues of an operator.

    Each probe gives m nodes (Ritz values) and weights that sum to one, exact for polynomials up to degree 2 m - 1 in the
    probe's own measure; means over probes estimate the spectrum. A probe whose Krylov space closed early has its last
    node repeated with weight zero.

    Args:
        nodes: (r, m) float64, ascending.
        weights: (r, m) float64.
        residuals: some eigenvalue lies within this distance of the node, (r, m).
        size: P.
        products: operator products spent.
        converged: whether all probes made all their steps.
        convention: which matrix of which loss this is.
        state: what `spectral_density(..., state=)` needs to go on, if it was asked to be kept.
    """

    nodes: Tensor
    weights: Tensor
    residuals: Tensor
    size: int
    products: float
    converged: bool
    convention: str = ""
    state: dict[str, Tensor] | None = None

    def mean(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """Mean of f over the eigenvalues, (1/P) tr f(A); f acts on each entry of a tensor."""
        return self._estimate((self.weights * f(self.nodes)).sum(dim=1))

    def moment(self, order: int) -> Estimate:
        """Mean power of the eigenvalues, (1/P) tr A^order."""
        return self.mean(lambda x: x**order)

    @property
    def trace(self) -> Estimate:
        """Sum of the eigenvalues, tr A."""
        return self._estimate(self.size * (self.weights * self.nodes).sum(dim=1))

    def quantile(self, q: float) -> Estimate:
        """The eigenvalue below which a share q of the spectrum lies.

        The distribution function passes half of a node's weight at the node, between the bounds that hold for a Gauss
        rule there, and is linear in between.

        Raises:
            ValueError: if q is not between 0 and 1.

        Source: the bounds are the Chebyshev-Markov-Stieltjes inequalities (Szego 1939, section 3.41).
        """
        if not 0 <= q <= 1:
            raise ValueError(f"expected a share between 0 and 1, got {q}")
        rows = [_interpolate(q, (w.cumsum(0) - w / 2), x) for x, w in zip(self.nodes, self.weights)]
        return self._estimate(torch.stack(rows))

    def density(
        self,
        grid: Tensor,
        *,
        axis: Literal["linear", "signed-log"] = "linear",
        width: float | None = None,
        linear_below: float | None = None,
    ) -> Smoothed:
        """The density smoothed by a Gaussian kernel.

        Args:
            grid: eigenvalues at which it is wanted, (g,).
            axis: "linear", or "signed-log" for sign(x) log10(1 + |x| / linear_below).
            width: standard deviation of the kernel in units of the axis; by default 1/100 of the span of the nodes.
            linear_below: where the logarithmic axis turns linear; by default 1e-4 of the largest |node|.

        Raises:
            ValueError: if an argument is out of range.
        """
        if axis not in ("linear", "signed-log"):
            raise ValueError(f"expected axis 'linear' or 'signed-log', got {axis!r}")
        grid = torch.as_tensor(grid, dtype=torch.float64)
        knee = 1e-4 * float(self.nodes.abs().max()) if linear_below is None else linear_below
        place = _identity if axis == "linear" else _signed_log(knee or 1.0)
        nodes, points = place(self.nodes), place(grid)
        span = float(nodes.max() - nodes.min())
        width = (span / 100 or 1.0) if width is None else width
        if not width > 0 or knee < 0:
            raise ValueError(f"expected a positive width and linear_below, got {width} and {knee}")
        rows = Running()
        for x, w in zip(nodes, self.weights):
            bumps = torch.exp(-0.5 * ((points[:, None] - x) / width) ** 2) / (width * (2 * torch.pi) ** 0.5)
            rows.add((bumps @ w)[None])
        return Smoothed(grid=grid, density=rows.mean, stderr=rows.stderr, axis=points, width=width)

    def _estimate(self, per_probe: Tensor) -> Estimate:
        running = Running()
        running.add(per_probe)
        return Estimate(float(running.mean), float(running.stderr), self.products, self.converged, self.convention)


def spectral_density(
    op: LinearOperator,
    *,
    steps: int = 80,
    probes: int = 1,
    generator: torch.Generator | int | None = None,
    max_products: int | None = None,
    state: dict[str, Tensor] | None = None,
    keep_state: bool = False,
    progress: bool | None = None,
) -> SpectralDensity:
    """Density of the eigenvalues from Lanczos runs on random sign vectors.

    A run of m steps from v gives Ritz values theta_i with weights (e_1^T s_i)^2, the Gauss rule of the measure
    sum_k (v^T u_k)^2 / |v|^2 delta(lambda_k), whose mean over v is the spectrum. The basis is kept orthogonal to
    sqrt(eps), so no eigenvalue appears twice; it takes `steps` times P numbers of memory.

    Args:
        op: the operator (P, P).
        steps: nodes of each rule, at most P are taken.
        probes: independent runs; with two or more there are standard errors.
        generator: of the probes, or a seed.
        max_products: where to stop at the latest. Not converged is then said; whole probes are kept, or the part of the
            only one.
        state: a `SpectralDensity.state`, to go on as if there had been no stop.
        keep_state: whether to keep the state; it holds the basis.
        progress: show a bar; by default on a terminal when it takes long.

    Raises:
        ValueError: if steps, probes or the bound are below one, or a product is not finite.
        TypeError: if the operator is not symmetric.

    Example:
        >>> A = LinearOperator.from_matrix(torch.diag(torch.tensor([1.0, 1.0, 1.0, 5.0])))
        >>> rule = spectral_density(A, steps=4)
        >>> print(torch.round(rule.nodes[0, :2], decimals=4), torch.round(rule.weights[0, :2], decimals=4))
        tensor([1., 5.], dtype=torch.float64) tensor([0.7500, 0.2500], dtype=torch.float64)

    Sources: Ubaru, Chen and Saad 2017, eq. 3.4; Ghorbani, Krishnan and Xiao 2019.
    """
    if steps < 1 or probes < 1:
        raise ValueError(f"expected at least one step and one probe, got steps={steps}, probes={probes}")
    limit = steps * probes if max_products is None else max_products
    with Products(op, limit, "spectral density", show=progress) as A:
        draw = as_generator(generator, op.device)
        run = _Run(A, min(steps, op.shape[0]), draw, state)
        while run.probe < probes and A.left:
            run.step(last=run.probe == probes - 1)
        complete = run.probe >= probes
        rules = run.rules if run.rules else [run.rule()]
        nodes, weights, residuals = (torch.stack(part) for part in zip(*rules))
        kept = run.state() if keep_state and not complete else None
    return SpectralDensity(
        nodes=nodes,
        weights=weights,
        residuals=residuals,
        size=op.shape[0],
        products=A.spent,
        converged=complete,
        convention=op.convention,
        state=kept,
    )


class _Run:
    """Lanczos runs one after another: finished rules, and the basis of the run at hand."""

    def __init__(self, A: Products, steps: int, draw: torch.Generator, state: dict[str, Tensor] | None = None) -> None:
        self.A, self.steps, self.draw = A, steps, draw
        self.rules: list[tuple[Tensor, Tensor, Tensor]] = []
        if state is None:
            self.krylov = self._begin()
        else:
            like = torch.empty(0, dtype=A.op.dtype, device=A.op.device)
            self.krylov = Krylov.resumed(A, state, like)
            self.draw.set_state(state["generator"])
            self.rules = [tuple(rule) for rule in state["rules"]]  # type: ignore[misc]
            if state["Q"].shape[1] != A.op.shape[0] or self.krylov.H.shape[1] != steps:
                raise ValueError(
                    f"expected a state of {steps} steps in {A.op.shape[0]} dimensions, got {self.krylov.H.shape[1]} "
                    f"steps in {state['Q'].shape[1]} dimensions"
                )

    @property
    def probe(self) -> int:
        return len(self.rules)

    def step(self, *, last: bool) -> None:
        self.krylov.expand()
        if self.krylov.done == self.steps or self.krylov.complete:
            self.rules.append(self.rule())
            if not last:
                self.krylov = self._begin()

    def rule(self) -> tuple[Tensor, Tensor, Tensor]:
        d = self.krylov.done
        theta, S = torch.linalg.eigh(self.krylov.projected())
        left = self.krylov.H[d, d - 1] * S[-1].abs()
        rounding = 8 * torch.finfo(self.krylov.Q.dtype).eps * self.krylov.scale
        more = self.steps - d
        none = torch.zeros(more, dtype=torch.float64)
        return (
            torch.cat([theta, theta[-1:].expand(more)]),
            torch.cat([S[0] ** 2, none]),
            torch.cat([left, left[-1:].expand(more)]) + rounding,
        )

    def state(self) -> dict[str, Tensor]:
        rules = torch.stack([torch.stack(r) for r in self.rules]) if self.rules else torch.empty(0, 3, self.steps)
        return {**self.krylov.state(), "generator": self.draw.get_state(), "rules": rules}

    def _begin(self) -> Krylov:
        op = self.A.op
        start = rademacher(op.shape[0], 1, self.draw, like=op.dtype, device=op.device).T
        slack = torch.finfo(op.dtype).eps ** 0.5
        return Krylov(self.A, start, capacity=self.steps, slack=slack)


def _interpolate(q: float, at: Tensor, x: Tensor) -> Tensor:
    right = int(torch.searchsorted(at, q).clamp(1, len(at) - 1)) if len(at) > 1 else 0
    left = max(right - 1, 0)
    step = at[right] - at[left]
    share = ((q - at[left]) / step).clamp(0, 1) if step > 0 else torch.zeros((), dtype=at.dtype)
    return x[left] + share * (x[right] - x[left])


def _identity(x: Tensor) -> Tensor:
    return x


def _signed_log(knee: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x.sign() * torch.log10(1 + x.abs() / knee)
