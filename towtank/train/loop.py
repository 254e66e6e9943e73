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

CAUSES = (
    "the loss is not finite",
    "the gradient is not finite",
    "the loss exceeds its limit",
    "the held-out loss is not finite or exceeds its limit",
)


class Fates:
    """When and why members diverged, kept on the device so that no step waits for the host. All tensors are (E,).

    Args:
        members: E.
        device: where.
    """

    def __init__(self, members: int, device: torch.device) -> None:
        self.step = torch.full((members,), -1, device=device)  # the update that went wrong; -1: alive
        self.cause = torch.zeros(members, dtype=torch.long, device=device)  # index into CAUSES
        self.last_loss = torch.full((members,), torch.nan, device=device)  # training loss before that

    @property
    def dead(self) -> Tensor:
        """Members that have diverged."""
        return self.step >= 0

    def mark(self, wrong: Tensor, step: int, cause: int) -> None:
        """Members where `wrong` is true diverged at this step, unless they had before."""
        new = wrong & ~self.dead
        self.step, self.cause = torch.where(new, step, self.step), torch.where(new, cause, self.cause)

    def saw(self, loss: Tensor) -> None:
        """Remember the loss of the living."""
        self.last_loss = torch.where(self.dead, self.last_loss, loss.to(self.last_loss.dtype))


@dataclass(frozen=True)
class Step:
    """The state after `step` updates. All tensors have one entry per member, shape (E,).

    Args:
        step: number of updates made; 0 is the state before the first.
        loss: training loss of the batch of the last update (None at step 0).
        heldout: held-out loss, where it was evaluated at this step.
        fates: who has diverged, when and why.
        signals: by name, where they were recorded at this step.
    """

    step: int
    loss: Tensor | None
    heldout: Tensor | None
    fates: Fates
    signals: dict[str, Tensor]

    @property
    def alive(self) -> Tensor:
        """Members that have not diverged."""
        return ~self.fates.dead


def train(ensemble: Ensemble, training: Training) -> Iterator[Step]:
    """Train all members and yield after every update; ends early when every member has diverged.

    A member diverges when its loss or its gradient is not finite, or a loss exceeds `diverged_at` times its held-out
    loss before training. From then on it is frozen: it keeps its last finite parameters and touches no other member.

    Args:
        ensemble: the members.
        training: what they share.

    Yields:
        `Step` 0 (evaluated, nothing trained), then one per update; the last is evaluated.

    Raises:
        ValueError: if there is no held-out batch, or a batch holds a number that is not finite.
    """
    heldout = [_checked(batch, f"held-out batch {i}") for i, batch in enumerate(ensemble.task.data.heldout())]
    if not heldout:
        raise ValueError("data: expected at least one held-out batch, got none")
    initial = _initial_loss(ensemble, heldout)
    limit, fates = training.diverged_at * initial, Fates(len(ensemble), ensemble.device)
    fates.mark(~initial.isfinite(), 0, 3)
    ensemble.freeze(fates.dead)
    yield Step(0, None, initial, fates, {"state_bytes": torch.full_like(initial, ensemble.state_bytes)})
    for step in range(1, training.steps + 1):
        scale = shape(
            step - 1, training.steps, kind=training.schedule, warmup=training.warmup, final=training.final_lr,
            decay_share=training.decay_share,
        )  # fmt: skip
        last = step == training.steps
        probing = last or step % training.signal_every == 0 or step == 1
        out = ensemble.step(_batch(ensemble, step - 1), scale, probing=probing)
        for cause, wrong in enumerate((~out.loss.isfinite(), ~out.grad_norm.isfinite(), out.loss > limit)):
            fates.mark(wrong, step, cause)
        fates.saw(out.loss)
        losses = None
        if last or (training.eval_every and step % training.eval_every == 0):
            losses = ensemble.evaluate(heldout)
            fates.mark(~(losses <= limit), step, 3)
        ensemble.freeze(fates.dead)
        signals = {"train/loss": out.loss, "grad_norm": out.grad_norm, **out.signals} if probing else {}
        yield Step(step, out.loss, losses, fates, signals)
        if probing and bool(fates.dead.all()):
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
    drawn = {s: _checked(data.batch(s, step), f"batch {step} of seed {s}") for s in dict.fromkeys(seeds)}
    inputs, targets = zip(*(drawn[seed] for seed in seeds), strict=True)
    return torch.stack(inputs), torch.stack(targets)


def _checked(batch: Batch, name: str) -> Batch:
    """The batch, if its numbers are finite: a NaN in the data is no divergence.

    Raises:
        ValueError: naming the batch.
    """
    for what, tensor in zip(("inputs", "targets"), batch, strict=True):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"data: expected finite numbers, got NaN or infinity in the {what} of {name}")
    return batch
