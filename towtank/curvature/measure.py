"""One call, one table: what the loss surface looks like where the model is, and which learning rates that allows.

H: Hessian of the full loss; G: Gauss-Newton matrix, the Fisher matrix where the loss is a likelihood; g: gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from towtank.curvature.fisher import Fisher
from towtank.curvature.gauss_newton import GaussNewton
from towtank.curvature.hessian import Hessian
from towtank.curvature.limits import Limit, stability_limits
from towtank.curvature.preconditioned import Preconditioned, adam_preconditioner
from towtank.estimate import Estimate, Verdict, finite
from towtank.linalg.eigsh import Eigenpairs, eigsh
from towtank.linalg.norm import frobenius_norm
from towtank.linalg.trace import trace
from towtank.problem import Problem

ErrorKind = Literal["exact", "bound", "standard error", "none"]
_COARSE = 0.01  # residual allowed to the inner eigenvectors, as a share of the sharpness


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One line of the table.

    Args:
        name: of the quantity.
        value: NaN where it could not be measured.
        error: in the unit of the value; see `kind`.
        kind: what the error is: "exact" (rounding only), "bound" (an eigenvalue lies within it), "standard error".
        products: operator products it took.
        time_s: seconds it took.
        verdict: `weak` if the requested accuracy was not reached, `refuse` if it could not be measured, and why.
        note: what the value means here.

    Example:
        >>> print(Reading(name="sharpness", value=18.0, error=0.002, kind="bound", products=9, time_s=0.31))
        sharpness: 18 ± 0.002
    """

    name: str
    value: float
    error: float = math.nan
    kind: ErrorKind = "none"
    products: float = 0.0
    time_s: float = 0.0
    verdict: Verdict = field(default_factory=lambda: Verdict("ok"))
    note: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.shown()}"

    def shown(self) -> str:
        """The value with its error, or why there is none."""
        if self.verdict.status == "refuse":
            return self.verdict.reason
        if finite(self.error) and self.error > 0:
            return str(Estimate(self.value, self.error)).partition(" (")[0]
        return f"{self.value:.5g}"

    def to_json(self) -> dict[str, Any]:
        """Plain data: numbers that are not finite are None."""
        numbers = {k: getattr(self, k) for k in ("value", "error", "products", "time_s")}
        status = {"status": self.verdict.status, "reason": self.verdict.reason, "note": self.note}
        return (
            {"name": self.name, "error_kind": self.kind}
            | {k: v if finite(v) else None for k, v in numbers.items()}
            | status
        )


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What `measure` found.

    Args:
        readings: the lines of the table, in order.
        convention: which loss of which parameters this is.
        size: P, the number of parameters that vary.
    """

    readings: tuple[Reading, ...]
    convention: str
    size: int

    def __getitem__(self, name: str) -> Reading:
        found = {r.name: r for r in self.readings}
        if name not in found:
            raise KeyError(f"expected one of {', '.join(found)}; got {name}")
        return found[name]

    def __str__(self) -> str:
        wide = max(len(r.name) for r in self.readings)
        value = max(len(r.shown()) for r in self.readings if r.verdict.status != "refuse")
        lines = [self.convention]
        for r in self.readings:
            said = "; ".join(s for s in (r.note, str(r.verdict) if r.verdict.status == "weak" else "") if s)
            cost = f"{r.products:6.4g} products {r.time_s:7.2f} s"
            lines.append(f"{r.name:{wide}}  {r.shown():{value}}  {cost}  {said}".rstrip())
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data: numbers that are not finite are None."""
        return {
            "convention": self.convention,
            "parameters": self.size,
            "readings": [r.to_json() for r in self.readings],
        }


def measure(
    model: nn.Module | Problem,
    loss: Callable[..., Any] | None = None,
    data: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    rtol: float = 0.05,
    tol: float = 1e-3,
    top: int = 10,
    max_products: int = 400,
    generator: int | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Measurement:
    """Loss, gradient, curvature and the learning rates they allow, each with its error, cost and time.

    - loss, gradient norm |g|
    - sharpness, smallest eigenvalue: ends of the spectrum of H, with residual bounds
    - trace, Frobenius norm of H; Fisher trace: of G
    - effective rank: tr(G)^2 / |G|_F^2, the number of equal eigenvalues with the same trace and norm
    - gradient alignment: |V^T g|^2 / |g|^2, V the `top` largest eigenvectors of H
    - preconditioned sharpness: largest eigenvalue of D^-1/2 H D^-1/2, D of the optimizer's state
    - largest stable learning rates: 2 / sharpness for gradient descent, more with momentum; Adam's from its
      preconditioned sharpness; 2 / tr(G) for stochastic gradient descent on single terms of the loss

    Nothing of the user's is changed. A quantity that cannot be measured is a line that says why.

    Args:
        model: the model; or a `Problem`, then without loss and data.
        loss: see `Problem`.
        data: see `Problem`.
        optimizer: the optimizer that trains the model, for what depends on it.
        rtol: relative standard error asked of traces and norms; of the trace of H as a share of that of G, where that is more.
        tol: relative residual asked of eigenvalues.
        top: eigenvectors that the gradient is compared with.
        max_products: where each quantity stops at the latest; its line is then `weak`.
        generator: seed of the random probes.
        progress: show bars; by default on a terminal for long work.
        **options: of `Problem`: forward, weight, params, mode, ...

    Raises:
        TypeError: if model, loss and data do not make a problem.
        ValueError: if the loss is not finite.

    Example:
        The bowl L = 2 w^2 at w = 1: H = 4, and gradient descent is stable below 2 / 4.

        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> found = measure(model, lambda z, y: 2 * (z - y).square().mean(), (torch.ones(1, 1), torch.zeros(1, 1)))
        >>> round(found["sharpness"].value, 4), round(found["limit: gradient descent"].value, 4)
        (4.0, 0.5)

    Source: limits: Cohen et al. 2021 (equation 1), Cohen et al. 2022 (equation 4), Wu et al. 2018 (theorem 1).
    """
    problem = as_problem(model, loss, data, options)
    how = {"max_products": max_products, "progress": progress}
    work = _Work(problem, optimizer, rtol=rtol, tol=tol, top=top, seed=generator or 0, how=how)
    return Measurement(readings=tuple(work.readings()), convention=problem.convention, size=problem.size)


def as_problem(model: nn.Module | Problem, loss: Any, data: Any, options: dict[str, Any]) -> Problem:
    """A problem of what the user gave.

    Raises:
        TypeError: if a part is missing, or given twice.
    """
    if isinstance(model, Problem):
        if loss is not None or data is not None:
            raise TypeError("expected a Problem alone, got a loss or data beside it; they are inside the Problem")
        return model.replace(**options) if options else model
    if loss is None or data is None:
        raise TypeError("expected model, loss and data, or a Problem; got no loss or no data")
    return Problem(model, loss, data, **options)


class _Work:
    """The measurements in order; each pays for itself, and later ones use what earlier ones found."""

    def __init__(
        self,
        problem: Problem,
        optimizer: torch.optim.Optimizer | None,
        *,
        rtol: float,
        tol: float,
        top: int,
        seed: int,
        how: dict[str, Any],
    ) -> None:
        if top < 1:
            raise ValueError(f"expected at least one eigenvector to compare with, got top={top}")
        self.problem, self.optimizer = problem, optimizer
        self.rtol, self.tol, self.top, self.seed, self.how = rtol, tol, min(top, problem.size), seed, how
        self.hessian = Hessian(problem)
        self.found: dict[str, Estimate] = {}

    def readings(self) -> Iterator[Reading]:
        began = time.perf_counter()
        loss, self.g = self.problem.gradient()
        spent = time.perf_counter() - began
        norm = float(self.g.double().norm())
        yield Reading(name="loss", value=loss, error=0.0, kind="exact", time_s=spent)
        yield Reading(name="gradient norm", value=norm, error=0.0, kind="exact")
        yield self._measured("sharpness", "bound", self._sharpness)
        yield self._measured("smallest eigenvalue", "bound", self._smallest)
        yield self._measured(
            "gradient alignment", "bound", self._alignment, f"with the {self.top} largest eigenvectors"
        )
        yield self._measured("Fisher trace", "standard error", self._fisher_trace)
        yield self._measured("trace", "standard error", self._trace)
        norm_of = lambda: frobenius_norm(self.hessian, rtol=self.rtol, **self._draws(2))  # noqa: E731
        yield self._measured("Frobenius norm", "standard error", norm_of)
        note = "" if isinstance(self.gauss_newton, Fisher) else "of the Gauss-Newton matrix: the loss is no likelihood"
        yield self._measured("effective rank", "standard error", self._effective_rank, note)
        if self.optimizer is not None:
            yield self._measured("preconditioned sharpness", "bound", self._preconditioned)
        for limit in stability_limits(self.optimizer, self.found):
            yield _limit_reading(limit)

    def _draws(self, number: int) -> dict[str, Any]:
        """Independent random numbers for each measurement."""
        return {"generator": self.seed + 1000 * number, **self.how}

    def _measured(self, name: str, kind: ErrorKind, work: Callable[[], Estimate], note: str = "") -> Reading:
        began = time.perf_counter()
        try:
            found = work()
        except torch.OutOfMemoryError:
            raise
        except (ValueError, TypeError, RuntimeError) as error:  # it cannot be measured, which is an answer
            reason = Verdict("refuse", " ".join(str(error).split()))
            return Reading(name=name, value=math.nan, verdict=reason, time_s=time.perf_counter() - began)
        self.found[name] = found
        reached = Verdict("ok") if found.converged else Verdict("weak", "stopped before the requested accuracy")
        return Reading(
            name=name,
            value=found.value,
            error=found.stderr,
            kind=kind if found.stderr or kind == "bound" else "exact",
            products=found.products,
            time_s=time.perf_counter() - began,
            verdict=reached,
            note=note,
        )

    def _sharpness(self) -> Estimate:
        basis = 2 * (self.top + 1) + 20
        self.pairs = eigsh(self.hessian, 1, tol=self.tol, max_basis=basis, keep_state=True, **self._draws(0))
        return _end(self.pairs)

    def _smallest(self) -> Estimate:
        allowed = self.tol * abs(self.found["sharpness"].value) if "sharpness" in self.found else 0.0
        return _end(eigsh(self.hessian, 1, which="SA", tol=self.tol, atol=allowed, **self._draws(3)))

    def _alignment(self) -> Estimate:
        """|V^T g|^2 / |g|^2; V is off by an angle of at most |residuals| / gap (Davis and Kahan 1970).

        Raises:
            ValueError: if the gradient is zero.
        """
        if not self.g.any():
            raise ValueError("the gradient is zero")
        k, first = min(self.top + 1, self.problem.size), self.pairs
        allowed = _COARSE * float(first.values[0].abs())
        pairs = eigsh(self.hessian, k, tol=0.0, atol=allowed, state=first.state, **self.how)
        V = pairs.vectors[:, : self.top].double()
        share = (V.T @ self.g.double()).square().sum() / self.g.double().square().sum()
        return Estimate(float(share), self._angle(pairs), pairs.products, pairs.converged)

    def _angle(self, pairs: Eigenpairs) -> float:
        if len(pairs.values) == self.top:  # the whole space
            return 0.0
        gap = float(pairs.values[self.top - 1] - pairs.values[self.top] - pairs.residuals[self.top])
        return min(1.0, float(pairs.residuals[: self.top].norm()) / gap) if gap > 0 else 1.0

    @property
    def gauss_newton(self) -> Fisher | GaussNewton:
        """The Fisher matrix where there is one."""
        if not hasattr(self, "_gauss_newton"):
            try:
                self._gauss_newton = Fisher(self.problem)
            except ValueError:
                self._gauss_newton = GaussNewton(self.problem)
        return self._gauss_newton

    def _fisher_trace(self) -> Estimate:
        return trace(self.gauss_newton, rtol=self.rtol, **self._draws(4))

    def _trace(self) -> Estimate:
        """Where H is nearly traceless, its error is measured by the trace of G, without which it would never end."""
        scale = self.found["Fisher trace"].value if "Fisher trace" in self.found else 0.0
        return trace(self.hessian, rtol=self.rtol, atol=self.rtol * abs(scale), **self._draws(1))

    def _effective_rank(self) -> Estimate:
        t = self.found.get("Fisher trace") or self._fisher_trace()
        norm = frobenius_norm(self.gauss_newton, rtol=self.rtol, **self._draws(5))
        if not norm.value:
            raise ValueError("the Gauss-Newton matrix is zero")
        rank = (t.value / norm.value) ** 2
        share = math.hypot(2 * t.stderr / t.value, 2 * norm.stderr / norm.value) if t.value else math.nan
        return Estimate(rank, rank * share, norm.products, t.converged and norm.converged)

    def _preconditioned(self) -> Estimate:
        assert self.optimizer is not None
        D: Tensor = adam_preconditioner(self.optimizer, self.problem)
        return _end(eigsh(Preconditioned(self.hessian, D), 1, tol=self.tol, **self._draws(6)))


def _end(pairs: Eigenpairs) -> Estimate:
    return Estimate(
        float(pairs.values[0]), float(pairs.residuals[0]), pairs.products, pairs.converged, pairs.convention
    )


def _limit_reading(limit: Limit) -> Reading:
    verdict = Verdict("ok") if limit.rate is not None else Verdict("refuse", limit.note)
    return Reading(
        name=f"limit: {limit.name}",
        value=math.nan if limit.rate is None else limit.rate.value,
        error=math.nan if limit.rate is None else limit.rate.stderr,
        kind=limit.kind,
        verdict=verdict,
        note=limit.note,
    )
