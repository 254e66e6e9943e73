"""Examples with opposing signals: two small groups that pull the parameters apart, and how much of the sharpness they carry.

n: examples; k: examples of a group; P: parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from towtank.problem import Problem
from towtank.signals.along import derivatives, places, separable
from towtank.signals.per_example import ExampleGradients, pass_cost
from towtank.signals.step import CannotTell

if TYPE_CHECKING:
    from towtank.signals.step import Step

Along = Literal["eigenvector", "direction", "change"]
_DRAWS = 999  # of each test: the smallest p is 0.001
_OPPOSED = -0.5  # cosine below which two groups are said to oppose each other: an angle of more than 120 degrees
_PRODUCTS = 20  # of the Hessian that a top eigenvector usually takes, at 2 gradients each


@dataclass(frozen=True, kw_only=True, eq=False)
class OpposingSignals:
    """Two groups of examples that pull in opposite directions.

    Args:
        up: places of the k examples whose loss rises most along the direction or across the step, most extreme first.
        down: places of those whose loss falls most.
        cosine: of the mean gradients of the two groups, -1 where they oppose each other.
        cosine_error: standard error of it, by leaving out one example at a time.
        share: v' H_S v / v' H v with H_S = sum over both groups of w_i H_i: of the curvature along v, what they carry.
        sharpness: v' H v, the curvature along v; v is the top eigenvector of H, or the direction given.
        alignment: mean cos^2 of the angles between the gradients of the groups and what they were ordered by, over the square of
            the usual cosine: 1 in the bulk of the examples.
        alignment_p: how often groups found in the same way reach this alignment if no direction is special to a few examples.
        share_p: how often random groups of the same size reach this share.
        level: of significance, for `found`.
        along: what the examples were ordered by.
        examples: n.
        cost: gradients of the whole problem that it took.
    """

    up: tuple[int, ...]
    down: tuple[int, ...]
    cosine: float
    cosine_error: float
    share: float
    sharpness: float
    alignment: float
    alignment_p: float
    share_p: float
    level: float
    along: Along
    examples: int
    cost: float

    @property
    def found(self) -> bool:
        """Whether there are opposing signals: both tests reject, and the cosine is below -0.5 by 2 standard errors."""
        significant = max(self.alignment_p, self.share_p) <= self.level
        return significant and self.cosine + 2 * self.cosine_error < _OPPOSED

    def __str__(self) -> str:
        answer = "opposing signals" if self.found else "no opposing signals"
        return (
            f"{answer}: two groups of {len(self.up)} of {self.examples} examples, cosine {self.cosine:.2f} ± "
            f"{self.cosine_error:.2g}, {self.share:.0%} of the sharpness (p = {max(self.alignment_p, self.share_p):.2g})"
        )


def opposing_signals(
    problem: Problem,
    *,
    change: Tensor | None = None,
    direction: Tensor | None = None,
    k: int | None = None,
    level: float = 0.01,
    seed: int = 0,
) -> OpposingSignals:
    """The two groups of examples that oppose each other most, with a test of whether they are more than chance.

    Examples are ordered by their slope <g_i, v> along the top eigenvector v of the Hessian, or by `change`, the change of
    their loss across a step, and the k with the largest values and the k with the smallest are the groups. Slopes and curvatures
    v' H_i v are exact: derivatives of l_i(theta + t v) in t.

    Two tests guard the answer, because the ends of any order seem to oppose each other. One draws groups of the same size at
    random and compares the share of the sharpness. The other repeats the choice on what a bulk without special examples would
    show: with s_i the quantity ordered by and a_i = s_i / |g_i|, it draws a_i* = median(a) + 1.48 MAD(a) z with z Gaussian,
    orders by a_i* |g_i|, and compares the mean of ((a - median) / (1.48 MAD))^2 over the groups. Gradients of different size,
    as of hard and easy examples, are no signal by that test; examples whose direction is unusual are. So are the hard examples
    on either side of a boundary between two of several classes, even in a network that trains well: the answer says what
    carries the sharpness, not that something is broken.

    Args:
        problem: model, loss and examples; the loss must be a mean over them.
        change: loss of each example after a step minus before, (n,), as `example_losses` gives.
        direction: v in place of the top eigenvector, (P,), of any length.
        k: examples of a group; default 5 % of all, at least 2.
        level: of significance: the rate of false alarms on examples without special directions.
        seed: of the draws and of the start of the eigenvector.

    Raises:
        CannotTell: if there are too few examples, the loss is not a mean over them, values are not finite, or fewer than k
            examples rise or fall.
        ValueError: if an argument has the wrong shape.

    Example:
        >>> x = torch.cat([torch.eye(12)[2:].repeat(4, 1), 9 * torch.eye(12)[:1].repeat(6, 1)])
        >>> y = torch.cat([torch.linspace(-0.1, 0.1, 40), torch.tensor([1.0, 1, 1, -1, -1, -1])])[:, None]
        >>> model = torch.nn.Linear(12, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> signals = opposing_signals(Problem(model, torch.nn.functional.mse_loss, (x, y)), k=3)
        >>> sorted(signals.up + signals.down), round(signals.cosine, 6), round(signals.share, 6), signals.found
        ([40, 41, 42, 43, 44, 45], -1.0, 1.0, True)

    Source: E. Rosenfeld and A. Risteski 2023, "Outliers with opposing signals have an outsized effect on neural network
    optimization": groups by the change of the loss across a step. Order along the eigenvector and the tests are ours.
    """
    unit, spent = _unit(problem, direction, seed)
    examples = ExampleGradients(problem)
    place_n, every = places(problem)
    slope_n, curve_n = derivatives(problem, unit)
    k = max(2, round(0.05 * len(place_n))) if k is None else k
    order_n = slope_n if change is None else _checked_change(change, place_n, every)
    up, down = _tails(order_n, k)
    rows = _gradients(examples, up + down)
    cosine, error = _cosine(rows.double() @ rows.double().T, k)
    total = float(curve_n.sum())
    if not total > 0:
        raise CannotTell(
            f"expected positive curvature along the direction, got {total:.3g}; there is no sharpness to share"
        )
    part = float(curve_n[up + down].sum())
    draw = torch.Generator().manual_seed(seed)
    alignment, alignment_p = _alignment_test(order_n, examples.squares.sqrt(), up + down, draw)
    return OpposingSignals(
        up=tuple(place_n[up].tolist()),
        down=tuple(place_n[down].tolist()),
        cosine=cosine,
        cosine_error=error,
        share=part / total,
        sharpness=total / len(place_n),
        alignment=alignment,
        alignment_p=alignment_p,
        share_p=_share_test(curve_n, part, 2 * k, draw),
        level=level,
        along="change" if change is not None else "eigenvector" if direction is None else "direction",
        examples=len(place_n),
        cost=spent + _passes(problem),
    )


def _passes(problem: Problem) -> float:
    # gradients: one pass over the examples for norms, one for the groups; slopes and curvatures took 5 to 20, measured
    return 5.0 + 2.5 * pass_cost(problem)


def _unit(problem: Problem, direction: Tensor | None, seed: int) -> tuple[Tensor, float]:
    # the direction of unit length, (P,), and the gradients it cost
    if direction is not None:
        if direction.shape != (problem.size,):
            raise ValueError(f"expected a direction of shape ({problem.size},), got {tuple(direction.shape)}")
        vector = direction.detach().to(problem.device, problem.dtype)
        length = torch.linalg.vector_norm(vector)
        if not (torch.isfinite(length) and length > 0):
            raise ValueError(f"expected a direction of finite length above 0, got {float(length)}")
        return vector / length, 0.0
    from towtank.curvature import Hessian
    from towtank.linalg import eigsh

    hessian = Hessian(problem)
    pairs = eigsh(hessian, 1, which="LA", tol=1e-3, generator=seed, progress=False)
    hessian.release()
    if not pairs.converged:
        raise CannotTell(f"expected the top eigenvector to converge, got {pairs}; give direction=")
    return pairs.vectors[:, 0], pairs.products * hessian.cost


def _checked_change(change: Tensor, place_n: Tensor, every: int) -> Tensor:
    if change.shape != (every,):
        raise ValueError(f"expected a loss change of each of {every} examples, got shape {tuple(change.shape)}")
    change_n = change.detach().double().cpu()[place_n]
    if not bool(torch.isfinite(change_n).all()):
        raise CannotTell(
            "expected finite changes of the losses, got others; measure across a step before the divergence"
        )
    return change_n


def _tails(order_n: Tensor, k: int) -> tuple[list[int], list[int]]:
    n = len(order_n)
    if k < 2:
        raise ValueError(f"expected groups of at least 2 examples, got k = {k}")
    if n < 4 * k:
        raise CannotTell(
            f"expected at least {4 * k} examples for groups of {k}, got {n}; give a larger batch or a smaller k"
        )
    order = order_n.argsort(stable=True).tolist()
    down, up = order[:k], order[: -k - 1 : -1]
    if not (order_n[up[-1]] > 0 > order_n[down[-1]]):
        raise CannotTell(f"expected at least {k} examples on either side, got fewer: all pull the same way")
    return up, down


def _gradients(examples: ExampleGradients, members: list[int]) -> Tensor:
    """The gradients of some examples, (members, P), in the order asked for."""
    place = {i: row for row, i in enumerate(members)}
    rows: list[Tensor] = [torch.empty(0)] * len(members)
    start = 0
    for chunk in examples.chunks():
        for i in range(start, start + len(chunk)):
            if i in place:
                rows[place[i]] = chunk[i - start].clone()  # a view would keep the chunk
        start += len(chunk)
    return torch.stack(rows)


def _cosine(gram: Tensor, k: int) -> tuple[float, float]:
    # from inner products (2k, 2k), first group, then second: the cosine of the means, and its jackknife error
    members = torch.eye(2 * k, dtype=gram.dtype, device=gram.device)
    groups = torch.zeros(2, 2 * k, dtype=gram.dtype, device=gram.device)
    groups[0, :k], groups[1, k:] = 1, 1

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return (a @ gram @ b) / ((a @ gram @ a) * (b @ gram @ b)).sqrt()

    value = float(cosine(*groups))
    if not math.isfinite(value):
        raise CannotTell("expected mean gradients that are not zero, got one that is; there is no direction to compare")
    left_out = [torch.stack([cosine(*(groups * (1 - e))) for e in part]) for part in members.split(k)]
    variance = sum(float((k - 1) / k * (c - c.mean()).square().sum()) for c in left_out)
    return value, math.sqrt(variance)


def _alignment_test(order_n: Tensor, norm_n: Tensor, members: list[int], draw: torch.Generator) -> tuple[float, float]:
    usable = norm_n > 0
    if int(usable.sum()) < len(members):
        raise CannotTell(f"expected gradients other than zero of {len(members)} examples, got {int(usable.sum())}")
    a_n = torch.where(usable, order_n / norm_n.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    middle, scale = (float(x) for x in _middle_and_scale(a_n[usable]))
    if not scale > 0:  # the bulk does not see the direction at all: whatever does is special
        return math.inf, 1 / (_DRAWS + 1)
    seen = float(((a_n[members] - middle) / scale).square().mean())
    z_dn = torch.randn(_DRAWS, len(order_n), generator=draw, dtype=torch.float64)
    ordered_dn = norm_n * (middle + scale * z_dn)
    k = len(members) // 2
    chosen = torch.cat([ordered_dn.topk(k).indices, ordered_dn.topk(k, largest=False).indices], dim=1)
    middles, scales = _middle_and_scale(z_dn[:, usable])  # each draw is judged by its own bulk, as the data are
    null_d = ((z_dn.gather(1, chosen) - middles) / scales).square().mean(dim=1)
    return seen, _p(null_d, seen)


def _middle_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    middle = x.median(dim=-1, keepdim=True).values
    return middle, 1.4826 * (x - middle).abs().median(dim=-1, keepdim=True).values


def _share_test(part_n: Tensor, seen: float, size: int, draw: torch.Generator) -> float:
    chosen = torch.rand(_DRAWS, len(part_n), generator=draw, dtype=torch.float64).topk(size).indices
    return _p(part_n[chosen].sum(dim=1), seen)


def _p(null: Tensor, seen: float) -> float:
    return float(1 + (null >= seen).sum()) / (len(null) + 1)


@dataclass(frozen=True, kw_only=True)
class _OpposingProbe:
    k: int | None
    level: float

    def __call__(self, step: Step) -> Mapping[str, float]:
        signals = opposing_signals(separable(step.problem), k=self.k, level=self.level)
        return {
            "data/opposing_cosine": signals.cosine,
            "data/opposing_cosine_error": signals.cosine_error,
            "data/opposing_share": signals.share if signals.found else 0.0,
        }

    def cost(self, problem: Problem) -> float:
        """Expected cost of one call in gradients of the probe batch: about 20 products for the eigenvector, and the examples."""
        return 2.0 * _PRODUCTS + _passes(separable(problem))


def opposing_signals_probe(*, k: int | None = None, level: float = 0.01) -> _OpposingProbe:
    """A probe of opposing signals on the probe batch, along the top eigenvector.

    Its readings are data/opposing_cosine with _error, and data/opposing_share, the share of the sharpness that the two groups
    carry: 0 where they are not significant. Where normalization couples the examples, it uses its running statistics.

    Args:
        k: examples of a group; default 5 % of the batch, at least 2.
        level: of significance.

    Example:
        >>> opposing_signals_probe(k=4)
        _OpposingProbe(k=4, level=0.01)
    """
    return _OpposingProbe(k=k, level=level)
