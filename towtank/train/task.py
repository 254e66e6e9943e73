"""What a study trains: one member's model, its data and its loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


class Data(Protocol):
    """Batches that depend on nothing but the seed and the step, and a fixed held-out set."""

    @property
    def digest(self) -> str:
        """Hash of the data: part of the identity of every run made on it."""
        ...

    def batch(self, seed: int, step: int) -> Batch:
        """Inputs and targets of one step; the same tensors for the same (seed, step)."""
        ...

    def heldout(self) -> Iterable[Batch]:
        """Held-out batches of one common size."""
        ...


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its data and its loss, as made by a task function for one cell of a study.

    Args:
        model: one freshly initialized member (drawn from torch's default generator, which the study seeds).
        data: see `Data`.
        loss: `loss(outputs, targets) -> scalar`, a mean, made of torch operations that `vmap` can batch. One that also
            takes `log_z` is handed the logsumexp of the logits where the z-loss or the signals need it anyway (or None).
        outputs_are_logits: the last axis of the outputs holds class logits: log Z is recorded and the z-loss may be used.
        head: name of the module that makes the outputs, for the parametrization's table.

    Example:
        >>> from towtank.train.tasks import gpt
        >>> gpt(width=32).model(gpt(width=32).data.batch(0, 0)[0]).shape
        torch.Size([8, 64, 256])
    """

    model: nn.Module
    data: Data
    loss: Callable[..., Tensor]
    outputs_are_logits: bool = False
    head: str = "head"
