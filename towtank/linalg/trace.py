"""The trace of an operator, to a requested standard error.

P: dimension; m: test vectors; v: a probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from towtank.estimate import Estimate
from towtank.linalg.draws import as_generator, dots, gaussian, rademacher
from towtank.linalg.operator import LinearOperator
from towtank.linalg.products import Products
from towtank.linalg.sampling import LEAST, Running, check_tolerance, sample_until
from towtank.linalg.sketches import Sketch, Small, jackknife, shared_error

Method = Literal["auto", "exact", "hutchinson", "hutch++", "xtrace", "samples", "control"]
Found = tuple[float, float, bool]  # value, standard error, whether the target was met
_PILOT = 6  # pairs of products from which a control variate is judged
_SKETCH = 10  # directions that hutch++ takes out exactly


def trace(
    op: LinearOperator,
    *,
    rtol: float = 0.05,
    atol: float = 0.0,
    method: Method = "auto",
    generator: torch.Generator | int | None = None,
    max_products: float = 1000,
    progress: bool | None = None,
) -> Estimate:
    """Trace of a symmetric operator, sampled until the standard error is at most max(rtol |trace|, atol).

    - "hutchinson": mean of v^T A v over random sign vectors; variance 2 sum_{i != j} A_ij^2.
    - "hutch++": the trace on a sketched range exactly, the rest by Hutchinson; for spectra of few large eigenvalues.
    - "xtrace": the same with every test vector used for both; the fewest products where eigenvalues decay fast.
    - "samples": the operator's own samples, cheaper than products (Gauss-Newton, Fisher: one backward each).
    - "control": tr(A - C) by products plus tr(C) by samples, for a near operator C that the operator names (a Hessian's
      Gauss-Newton). A pilot weighs its scatter and cost against Hutchinson's and takes the cheaper.
    - "exact": P products, or the operator's own exact diagonal.
    - "auto": exact if P is at most 20, else samples, else control, else hutchinson, as far as the operator offers them.

    Args:
        op: the operator (P, P).
        rtol: standard error asked for, as a share of the trace.
        atol: standard error asked for, in the unit of the trace: for traces near zero.
        method: see above.
        generator: of the probes, or a seed.
        max_products: where to stop at the latest; not converged is then said.
        progress: show a bar; by default on a terminal when it takes long.

    Raises:
        ValueError: if an argument does not fit, the operator lacks what the method needs, or a product is not finite.
        TypeError: if the operator is not symmetric.

    Example:
        >>> A = LinearOperator.from_matrix(torch.diag(torch.arange(100.0)))
        >>> print(trace(A))
        4950 (20 products)

    Sources: Hutchinson 1990; Meyer et al. 2021 (Hutch++); Epperly, Tropp and Webber 2024 (XTrace).
    """
    check_tolerance(rtol, atol)
    if method not in get_args(Method):
        raise ValueError(f"expected method to be one of {', '.join(get_args(Method))}; got {method!r}")
    with Products(op, max_products, "trace", show=progress) as A:
        goal = _Goal(A, rtol, atol, as_generator(generator, op.device))
        value, stderr, met = _METHODS[_resolved(op, method)](goal)
    return Estimate(value, stderr, A.spent, met, op.convention)


@dataclass(frozen=True)
class _Goal:
    """What is wanted of whom, with which randomness."""

    A: Products
    rtol: float
    atol: float
    generator: torch.Generator

    @property
    def op(self) -> LinearOperator:
        return self.A.op

    def signs(self) -> Tensor:
        return rademacher(self.op.shape[0], 1, self.generator, like=self.op.dtype, device=self.op.device)

    def until(self, draw: Callable[[int], Tensor], room: Callable[[], int], running: Running | None = None) -> Found:
        done, met = sample_until(draw, rtol=self.rtol, atol=self.atol, room=room, running=running)
        return float(done.mean), float(done.stderr), met


def _resolved(op: LinearOperator, method: Method) -> str:
    if method != "auto":
        return method
    if op.shape[0] <= LEAST:
        return "exact"
    if _offers_samples(op):
        return "samples"
    control = op.control()
    return "control" if control is not None and _offers_samples(control) else "hutchinson"


def _offers_samples(op: LinearOperator) -> bool:
    return type(op).trace_samples is not LinearOperator.trace_samples


def _exact(goal: _Goal) -> Found:
    known = goal.op.exact_diagonal()
    if known is not None:
        goal.A.charge(known[1])
        return float(known[0].sum(dtype=torch.float64)), 0.0, True
    P = goal.op.shape[0]
    if goal.A.left < P:
        raise ValueError(f"expected max_products of at least {P} for an exact trace, got {goal.A.limit}")
    total = 0.0
    for i in range(P):
        e = torch.zeros(P, 1, dtype=goal.op.dtype, device=goal.op.device)
        e[i] = 1
        total += float(goal.A(e)[i])
    return total, 0.0, True


def _hutchinson(goal: _Goal, running: Running | None = None) -> Found:
    return goal.until(lambda count: _forms(goal, count), lambda: goal.A.left, running)


def _forms(goal: _Goal, count: int) -> Tensor:
    """v^T A v of so many probes."""
    return torch.cat([dots(v, goal.A(v)) for v in (goal.signs() for _ in range(count))])


def _hutchpp(goal: _Goal) -> Found:
    A, P = goal.A, goal.op.shape[0]
    rank = min(_SKETCH, P, A.left // 3)
    if not rank:
        return _hutchinson(goal)
    Y = torch.cat([A(goal.signs()) for _ in range(rank)], dim=1)
    Q = torch.linalg.qr(Y)[0]
    caught = float(dots(Q, torch.cat([A(q[:, None]) for q in Q.T], dim=1)).sum())
    if rank == P:
        return caught, 0.0, True

    def draw(count: int) -> Tensor:
        rest = [v - Q @ (Q.T @ v) for v in (goal.signs() for _ in range(count))]
        return caught + torch.cat([dots(g, A(g)) for g in rest])

    return goal.until(draw, lambda: A.left)


def _xtrace(goal: _Goal) -> Found:
    op, A, sketch = goal.op, goal.A, Sketch(goal.A)
    found: Found = (math.nan, math.nan, False)
    more = LEAST // 2
    while (more := min(more, A.left // 2, op.shape[0] - sketch.m)) > 0:
        sketch.grow(gaussian(op.shape[0], more, goal.generator, like=op.dtype, device=op.device))
        if sketch.spans:
            return float(sketch.small().H.trace()), 0.0, True
        if sketch.m >= 3:
            found = _judged(sketch.small(), goal)
        if found[2]:
            break
        more = max(1, sketch.m // 2)
    return found


def _judged(small: Small, goal: _Goal) -> Found:
    """The mean of the leave-one-out estimates and its error, see `shared_error`."""
    estimates = Running()
    estimates.add(_left_out_traces(small))
    without = torch.stack([_left_out_traces(small.without(j)).mean() for j in range(small.m)])
    value, stderr = float(estimates.mean), float(shared_error(estimates.stderr, jackknife(without)))
    return value, stderr, stderr <= estimates.target(goal.rtol, goal.atol)


def _left_out_traces(small: Small) -> Tensor:
    """One estimate for each test vector: that one as probe and the others as sketch.

    With w_i = Q^T omega_i and a_i = (I - s_i s_i^T) w_i, the probe is u_i = omega_i - Q a_i, and u_i^T A u_i needs small
    matrices only. u_i points anywhere in the P - m + 1 dimensions left, so its length is divided out.
    """
    W, H, R, S = small.W, small.H, small.R, small.left_out()
    a = W - S * (S * W).sum(dim=0)
    form = (W * R).sum(dim=0) - 2 * (a * R).sum(dim=0) + (a * (H @ a)).sum(dim=0)
    scale = (small.P - small.m + 1) / (small.lengths - a.square().sum(dim=0))
    return H.trace() - (S * (H @ S)).sum(dim=0) + scale * form


def _samples(goal: _Goal) -> Found:
    source = _Cheap(goal.A, goal.op, goal.generator)
    return goal.until(source.draw, source.room)


class _Cheap:
    """An operator's own trace samples, charged at their price."""

    def __init__(self, A: Products, op: LinearOperator, generator: torch.Generator) -> None:
        self.A, self.op, self.generator = A, op, generator
        self.price = 1.0  # products of A each, known from the first draw on

    def room(self) -> int:
        return int((self.A.limit - self.A.spent) / self.price + 1e-9) if self.price else 2**20

    def draw(self, count: int) -> Tensor:
        drawn = self.op.trace_samples(count, self.generator)
        if drawn is None:
            raise ValueError(f"expected an operator with its own trace samples, got {type(self.op).__name__}")
        self.price = drawn[1] * self.op.cost / self.A.op.cost
        self.A.charge(count * self.price)
        return drawn[0].double().cpu()


def _controlled(goal: _Goal) -> Found:
    op, A = goal.op, goal.A
    control = op.control()
    if control is None:
        raise ValueError(f"expected an operator with a control variate, got {type(op).__name__}; use 'hutchinson'")
    pair_cost = 1 + control.cost / op.cost
    source = _Cheap(A, control, goal.generator)
    plain, gap, near, cheap = Running(), Running(), Running(), Running()

    def pairs(count: int) -> None:
        probes = [goal.signs() for _ in range(count)]
        forms = torch.cat([dots(v, A(v)) for v in probes])
        plain.add(forms)
        controls = torch.cat([dots(v, control @ v) for v in probes])
        near.add(controls)
        gap.add(forms - controls)
        A.charge(count * (pair_cost - 1))

    pilot = min(_PILOT, int(A.left / pair_cost))
    if pilot < 2:
        return _hutchinson(goal)
    pairs(pilot)
    if source.room() < LEAST:
        return _hutchinson(goal, plain)
    cheap.add(source.draw(1))  # which tells the price
    if not _pays(plain, gap, near, pair_cost, source.price):
        return _hutchinson(goal, plain)
    cheap.add(source.draw(LEAST - 1))
    return _balanced(goal, gap, cheap, pairs, source, pair_cost)


def _pays(plain: Running, gap: Running, near: Running, pair_cost: float, price: float) -> bool:
    """Whether the best split of work between the two streams beats plain probes: cost times variance of each.

    The control's own samples scatter about as much as the forms of random signs with it, which the pilot has seen.
    """
    split = (float(gap.variance) * pair_cost) ** 0.5 + (float(near.variance) * price) ** 0.5
    return split**2 < float(plain.variance)


def _balanced(
    goal: _Goal, gap: Running, cheap: Running, pairs: Callable[[int], None], source: _Cheap, pair_cost: float
) -> Found:
    """Draw from both streams, each in proportion to its scatter over the root of its price (Neyman 1934)."""
    while True:
        value, stderr = float(gap.mean + cheap.mean), math.hypot(float(gap.stderr), float(cheap.stderr))
        target = max(goal.rtol * abs(value), goal.atol)
        if stderr <= target:
            return value, stderr, True
        wanted = []
        costs = (pair_cost, max(source.price, 1e-6))
        work = sum((float(s.variance) * c) ** 0.5 for s, c in zip((gap, cheap), costs))
        for stream, cost in zip((gap, cheap), costs):
            best = 1.05 * (float(stream.variance) / cost) ** 0.5 * work / target**2 if target else math.inf
            wanted.append(math.ceil(min(max(best - stream.count, 0), stream.count)))
        if not any(wanted):
            wanted = [1, 1]  # widened for few samples, the error is a little larger than planned
        fits = min(wanted[0], int((goal.A.limit - goal.A.spent) / pair_cost + 1e-9))
        if fits:
            pairs(fits)
        rest = min(wanted[1], source.room())
        if rest:
            cheap.add(source.draw(rest))
        if not fits and not rest:
            return value, stderr, False


_METHODS: dict[str, Callable[[_Goal], Found]] = {
    "exact": _exact,
    "hutchinson": _hutchinson,
    "hutch++": _hutchpp,
    "xtrace": _xtrace,
    "samples": _samples,
    "control": _controlled,
}
