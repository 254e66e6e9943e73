"""The training loop, top to bottom: batch, gradient, update, divergence, evaluation, once for all members."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from towtank.optim.schedules import shape
from towtank.train.ensemble import Ensemble
from towtank.train.settings import Training
from towtank.train.task import Batch


@dataclass(frozen=True)
class Step:
    """The state after `step` updates. All tensors have one entry per member, shape (E,).

    Args:
        step: number of updates made; 0 is the state before the first.
        loss: training loss of the batch of the last update (None at step 0).
        heldout: held-out loss, where it was evaluated at this step.
        alive: members that have not diverged.
        signals: by name, where they were recorded at this step.
    """

    step: int
    loss: Tensor | None
    heldout: Tensor | None
    alive: Tensor
    signals: dict[str, Tensor]


def train(ensemble: Ensemble, training: Training) -> Iterator[Step]:
    """Train all members and yield after every update; ends early when every member has diverged.

    A member diverges when its loss or its gradient is not finite, or its loss exceeds `diverged_at` times its held-out
    loss before training. From then on it is frozen: it keeps its last finite parameters and touches no other member.

    Args:
        ensemble: the members.
        training: what they share.

    Yields:
        `Step` 0 (evaluated, nothing trained), then one per update; the last is evaluated.
    """
    heldout = list(ensemble.task.data.heldout())
    initial = _initial_loss(ensemble, heldout)
    ensemble.freeze(~initial.isfinite())
    yield Step(0, None, initial, ensemble.alive, {})
    for step in range(training.steps):
        scale = shape(
            step, training.steps, kind=training.schedule, warmup=training.warmup, final=training.final_lr,
            decay_share=training.decay_share,
        )  # fmt: skip
        last = step + 1 == training.steps
        probing = last or (step + 1) % training.signal_every == 0 or step == 0
        out = ensemble.step(_batch(ensemble, step), scale, probing=probing)
        ensemble.freeze(~out.moved | (out.loss > training.diverged_at * initial))
        evaluating = last or (training.eval_every and (step + 1) % training.eval_every == 0)
        signals = {"train/loss": out.loss, "grad_norm": out.grad_norm, **out.signals} if probing else {}
        yield Step(step + 1, out.loss, ensemble.evaluate(heldout) if evaluating else None, ensemble.alive, signals)
        if probing and not bool(ensemble.alive.any()):
            return


def _initial_loss(ensemble: Ensemble, heldout: Sequence[Batch]) -> Tensor:
    """Held-out loss before training: members of one seed start alike, so one of each is evaluated."""
    seeds = [m.seed for m in ensemble.members]
    distinct = list(dict.fromkeys(seeds))
    losses = ensemble.evaluate(heldout, [seeds.index(seed) for seed in distinct])
    return losses[[distinct.index(seed) for seed in seeds]]


def _batch(ensemble: Ensemble, step: int) -> Batch:
    """Each member's own batch, (E, B, ...): members of one seed see the same one."""
    data = ensemble.task.data
    seeds = [m.seed for m in ensemble.members]
    drawn = {seed: data.batch(seed, step) for seed in dict.fromkeys(seeds)}
    inputs, targets = zip(*(drawn[seed] for seed in seeds), strict=True)
    return torch.stack(inputs), torch.stack(targets)
