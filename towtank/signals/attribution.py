"""On a spike: was it the batch or the model, which tensors, and which signal moved first.

n: examples of the batch that spiked; m: examples of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from towtank.problem import Batch, Problem
from towtank.problem.data import is_mapping, target_key
from towtank.signals.along import counted_losses, places, separable
from towtank.signals.spikes import LEAST, LOSS, band, spike
from towtank.signals.step import CannotTell

Verdict = Literal["model", "inputs", "labels", "none"]
_FAR = 4.0  # times the largest of the reference: an input of another scale, whatever the distribution
_WORST = 8


@dataclass(frozen=True, kw_only=True)
class BatchBlame:
    """What made a batch's loss high.

    Args:
        verdict: "model": the reference is worse than it was, too. "inputs": this batch alone, and its inputs are not like the
            reference's. "labels": this batch alone, with inputs like the reference's: wrong targets, or examples of a kind that
            the reference lacks. "none": its losses are like the reference's, and those are like before.
        reason: the verdict in a sentence with its numbers.
        loss: mean loss of the examples of the batch.
        reference_loss: mean loss of the examples of the reference.
        reference_z: robust standard deviations of it over the past; NaN without a past.
        share: of the examples whose loss exceeds the 99th percentile of the reference; not finite counts as exceeding.
        share_p: how often as many exceed it if both come from the same distribution.
        profile: {what of the inputs: (median over the batch, median over the reference)}.
        odd: {what of the inputs: examples of the batch that lie outside the reference}, where it is too many or too far.
        worst: examples of the batch by loss, worst first: at most 8.
        losses: theirs.
    """

    verdict: Verdict
    reason: str
    loss: float
    reference_loss: float
    reference_z: float
    share: float
    share_p: float
    profile: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    odd: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    worst: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}"


def blame_batch(
    problem_of: Callable[[Any], Problem],
    batch: Any,
    reference: Any,
    *,
    past: Sequence[float] = (),
    params: Mapping[str, Tensor] | None = None,
    level: float = 1e-3,
) -> BatchBlame:
    """Whether the model moved or the data of a batch are to blame for its loss, and what of the data.

    Both batches run through the model at the same parameters; batch normalization uses its running statistics. In order: (1) the loss of the reference is not finite, or a spike
    against `past`: the model. (2) As many losses of the batch exceed the r-th largest of the reference, r = max(1, m / 100),
    as happens by chance with probability <= level, or its mean loss is a spike against the past or not finite: the data. Then
    the inputs, where some are not finite, or the size (root mean square) of some is over 4 times the largest of the reference,
    or more of them lie outside the reference's range than happens with probability <= level; else the labels. (3) None.

    The chance is exact whatever the distribution: that X of n exceed the r-th largest of m has
    P(X >= x) = P(Hypergeometric(n + m, n, x + r - 1) >= x).

    Args:
        problem_of: makes the `Problem` of a batch, as `Step.problem_of`.
        batch: that spiked.
        reference: a healthy batch, not seen by the model since it was healthy, at least as large as the batch if it can be.
        past: losses of healthy batches before the spike, at least 20: of the reference, or of training. Without them the
            model is blamed only where the loss of the reference is not finite, and a batch only for the number of its high losses, not for a
            few of enormous ones.
        params: {name: tensor} in place of the parameters as they are: those before the step, since a bad batch that was
            stepped on has moved the model.
        level: probability of blaming the data of a batch like the reference, for each of the tests.

    Raises:
        CannotTell: if examples cannot be told apart.
        ValueError: if the level is not between 0 and 1.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> x = torch.linspace(-1, 1, 16)[:, None]
        >>> problem_of = lambda batch: Problem(model, nn.functional.mse_loss, batch)
        >>> blame_batch(problem_of, (x, -x - 1), (x, x + 0.1)).verdict
        'labels'
        >>> blame_batch(problem_of, (100 * x, x), (x, x + 0.1)).verdict
        'inputs'
    """
    if not 0 < level < 1:
        raise ValueError(f"expected a level between 0 and 1, got {level}")
    problem, healthy = separable(problem_of(batch)), separable(problem_of(reference))
    loss_n, loss_m = (_counted(counted_losses(p, params)) for p in (problem, healthy))
    numbers = _numbers(loss_n, loss_m, past)
    numbers["worst"] = tuple(places(problem)[0][list(numbers["worst"])].tolist())
    if not math.isfinite(numbers["reference_loss"]) or _spiked(past, numbers["reference_loss"]):
        reason = f"the loss of the reference is {numbers['reference_loss']:.4g}, and was {_typical(past)}"
        return BatchBlame(verdict="model", reason=reason, **numbers)
    if numbers["share_p"] > level and not _spiked(past, numbers["loss"]) and math.isfinite(numbers["loss"]):
        reason = f"its loss is {numbers['loss']:.4g}, that of the reference {numbers['reference_loss']:.4g}"
        return BatchBlame(verdict="none", reason=reason, **numbers)
    sizes, others = _sizes(problem, params), _sizes(healthy, params)
    shared = [k for k in sizes if k in others]
    odd = {k: _odd(sizes[k], others[k], level / (2 * len(shared))) for k in shared}
    numbers |= {
        "profile": {k: (float(sizes[k].median()), float(others[k].median())) for k in shared},
        "odd": {k: found for k, found in odd.items() if found},
    }
    if numbers["odd"]:
        what, found = max(numbers["odd"].items(), key=lambda item: len(item[1]))
        reason = f"{len(found)} of {len(loss_n)} examples lie outside the reference in the size of {what}"
        return BatchBlame(verdict="inputs", reason=reason, **numbers)
    reason = (
        f"{numbers['share']:.0%} of the examples exceed the 99th percentile of the reference, with inputs like its own"
    )
    return BatchBlame(verdict="labels", reason=reason, **numbers)


def _counted(losses: Tensor) -> Tensor:
    if len(losses) < 2:
        raise CannotTell(f"expected at least 2 examples in either batch, got {len(losses)}")
    return losses


def _numbers(loss_n: Tensor, loss_m: Tensor, past: Sequence[float]) -> dict[str, Any]:
    high_n = torch.where(loss_n.isnan(), math.inf, loss_n)
    r = max(1, len(loss_m) // 100)
    finite_m = loss_m[loss_m.isfinite()]
    limit = float(finite_m.sort(descending=True).values[min(r, len(finite_m)) - 1]) if len(finite_m) else math.inf
    exceed = int((high_n > limit).sum())
    worst = high_n.argsort(descending=True, stable=True)[:_WORST]
    mean = float(loss_m.mean())
    return {
        "loss": float(loss_n.mean()),
        "reference_loss": mean,
        "reference_z": band(past).z(mean) if _enough(past) else math.nan,
        "share": exceed / len(loss_n),
        "share_p": _chance(exceed, len(loss_n), len(loss_m), r),
        "worst": tuple(worst.tolist()),
        "losses": tuple(loss_n[worst].tolist()),
    }


def _chance(x: int, n: int, m: int, r: int) -> float:
    """P(at least x of n exceed the r-th largest of m), all from one continuous distribution."""
    if x == 0:
        return 1.0
    top = x + r - 1
    if top > n + m:
        return 0.0
    whole = math.comb(n + m, top)
    return sum(math.comb(n, i) * math.comb(m, top - i) for i in range(x, min(n, top) + 1) if top - i <= m) / whole


def _enough(past: Sequence[float]) -> bool:
    return sum(math.isfinite(v) for v in past) >= LEAST


def _spiked(past: Sequence[float], loss: float) -> bool:
    return _enough(past) and math.isfinite(loss) and spike(past, loss, step=0, rule=LOSS) is not None


def _typical(past: Sequence[float]) -> str:
    return f"expected to be {band(past).high:.4g}" if _enough(past) else "finite when it was healthy"


def _sizes(problem: Problem, params: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Root mean square of each example: of every real input, and of what the first layer makes of them; (n,) float64."""
    first = next((n for n, m in problem.network.named_modules() if _layer(m)), None)
    parts = [_sizes_of(problem, batch, params, first) for batch in problem.batches()]
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0] if all(k in p for p in parts)}


def _layer(module: nn.Module) -> bool:
    return not list(module.children()) and next(module.parameters(), None) is not None


def _sizes_of(
    problem: Problem, batch: Batch, params: Mapping[str, Tensor] | None, first: str | None
) -> dict[str, Tensor]:
    from towtank.signals.capture import capture

    inputs = _inputs(batch.raw)
    found = {f"input {name}".strip(): x for name, x in inputs.items()}
    keep = [first] if first is not None else []
    with problem.measuring(), torch.no_grad(), capture(problem.network, keep, eager=True) as seen:
        problem.outputs(batch, params)
    for _, output in seen.kept.get(first or "", [])[:1]:
        found |= {f"output of {first or 'the model'}": x for x in tree_leaves(output)[:1] if isinstance(x, Tensor)}
    n = next((len(x) for x in tree_leaves(batch.raw) if isinstance(x, Tensor) and x.ndim), 0)
    real = {k: x for k, x in found.items() if x.is_floating_point() and x.ndim and len(x) == n and x.numel()}
    return {k: x.detach().double().cpu().reshape(n, -1).square().mean(dim=1).sqrt() for k, x in real.items()}


def _inputs(raw: Any) -> dict[str, Tensor]:
    if is_mapping(raw):
        named = {str(k): x for k, x in raw.items() if k != target_key(raw)}
    else:
        leaves = tree_leaves(raw[:-1])
        named = {str(i) if len(leaves) > 1 else "": x for i, x in enumerate(leaves)}
    return {k: x for k, x in named.items() if isinstance(x, Tensor)}


def _odd(size_n: Tensor, size_m: Tensor, level: float) -> tuple[int, ...]:
    """Examples outside the reference, if it is too many for chance on either side, or too far."""
    finite_m = size_m[size_m.isfinite()]
    if not len(finite_m):
        return ()
    broken, far = ~size_n.isfinite(), size_n > _FAR * finite_m.max()
    above, below = size_n > finite_m.max(), size_n < finite_m.min()
    chosen = broken | far
    for side in (above, below):
        if _chance(int(side.sum()), len(size_n), len(finite_m), 1) <= level:
            chosen = chosen | side
    return tuple(chosen.nonzero()[:, 0].tolist())


@dataclass(frozen=True, kw_only=True)
class TensorBlame:
    """How far a tensor's number is from its own past.

    Args:
        name: of the tensor.
        value: now.
        expected: by its past, in the same unit.
        z: robust standard deviations of its logarithm: positive above, negative below, infinite if not finite.
    """

    name: str
    value: float
    expected: float
    z: float


def blame_tensors(before: Mapping[str, Sequence[float]], now: Mapping[str, float]) -> tuple[TensorBlame, ...]:
    """Tensors by how far their gradient (or update, or anything positive) is from its own past, farthest first.

    z is that of `band` for the logarithm. Those that are not finite come first. Tensors with fewer than 20 values are left out.

    Args:
        before: {tensor: values before the spike, oldest first}, such as its gradient's root mean square.
        now: {tensor: value at the spike}.

    Raises:
        CannotTell: if no tensor has a past.

    Example:
        >>> steady = [1.0, 1.1, 0.9, 1.05, 0.95] * 5
        >>> [t.name for t in blame_tensors({"a": steady, "b": steady}, {"a": 1.1, "b": 40.0})]
        ['b', 'a']
    """
    found = [_blamed(name, before[name], value) for name, value in now.items() if _enough(_logs(before.get(name, ())))]
    if not found:
        raise CannotTell(f"expected at least {LEAST} earlier positive values of a tensor, got none; wait")
    return tuple(sorted(found, key=lambda t: -abs(t.z)))


def _logs(values: Sequence[float]) -> list[float]:
    return [math.log(v) if v > 0 and math.isfinite(v) else math.nan for v in values]


def _blamed(name: str, before: Sequence[float], value: float) -> TensorBlame:
    where = band(_logs(before))
    expected = math.exp((where.low + where.high) / 2)
    if value <= 0:  # a gradient that vanished has no logarithm
        return TensorBlame(name=name, value=value, expected=expected, z=-math.inf)
    return TensorBlame(name=name, value=value, expected=expected, z=where.z(_logs([value])[0]))


@dataclass(frozen=True, kw_only=True)
class Moved:
    """A signal that left its own past before a spike.

    Args:
        key: of the signal.
        step: the first step from which on it stayed outside.
        lead: steps before the spike.
        value: at that step.
        expected: by its past.
        z: robust standard deviations outside, at that step.
    """

    key: str
    step: int
    lead: int
    value: float
    expected: float
    z: float


def moved_first(
    history: Mapping[str, Iterable[tuple[int, float]]],
    step: int,
    window: int = 50,
    *,
    z: float = 6.0,
    change: float = 0.1,
) -> tuple[Moved, ...]:
    """Signals in the order in which they left their own past before a spike, first one first.

    The past of a signal is what it showed before the window, carried forward as a robust line whose error grows with distance.
    A signal has moved from the first step of the window on after which every value up to the spike lies outside by more than z
    robust standard deviations on the same side, and by more than a tenth of the expected value; values that are not finite are
    outside. A single value is enough only at the spike itself, so with at least two values a single outlier does not count.

    Args:
        history: {key: [(step, value)]} in order of steps.
        step: of the spike.
        window: steps before it that are searched.
        z: robust standard deviations that count as outside.
        change: relative change that counts.

    Raises:
        CannotTell: if no signal has 20 values before the window.
        ValueError: if the window is not positive.

    Example:
        >>> noise = [0.01, -0.01, 0.02, -0.02, 0.0]
        >>> steady = [(t, 1.0 + noise[t % 5]) for t in range(60)]
        >>> jumped = [(t, v + (t >= 52)) for t, v in steady]
        >>> [(m.key, m.step, m.lead) for m in moved_first({"a": steady, "b": jumped}, 59, window=20)]
        [('b', 52, 7)]
    """
    if window < 1:
        raise ValueError(f"expected a window of at least 1 step, got {window}")
    known, found = 0, []
    for key, series in history.items():
        points = [(int(s), float(v)) for s, v in series if s <= step]
        past = [v for s, v in points if s < step - window]
        if not _enough(past):
            continue
        known += 1
        recent = [p for p in points if p[0] >= step - window]
        found += _moved(key, past, recent, step, (z, change))
    if not known:
        raise CannotTell(
            f"expected a signal with {LEAST} values before step {step - window}, got none; take a smaller window"
        )
    return tuple(sorted(found, key=lambda m: (m.step, -abs(m.z))))


def _moved(
    key: str, past: list[float], recent: list[tuple[int, float]], step: int, limits: tuple[float, float]
) -> list[Moved]:
    first: Moved | None = None
    side = 0.0
    for ahead, (at, value) in reversed(list(enumerate(recent, start=1))):
        where = band(past, ahead=ahead)
        score, expected = where.z(value), (where.low + where.high) / 2
        far = not math.isfinite(value) or abs(value - expected) > limits[1] * abs(expected)
        direction = float(np.sign(score))
        if abs(score) <= limits[0] or not far or (side and direction != side and math.isfinite(value)):
            break
        side = side or (direction if math.isfinite(value) else 0.0)
        first = Moved(key=key, step=at, lead=step - at, value=value, expected=expected, z=score)
    return [first] if first else []
