"""The shared table of small problems: a task function per architecture, on data made here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from towtank.losses import cross_entropy, squared_error
from towtank.train import corpus as corpora
from towtank.train.models.cnn import CNN
from towtank.train.models.gpt import GPT
from towtank.train.models.mlp import MLP
from towtank.train.task import Batch, Task
from towtank.train.tasks import Windows


class Numbers(NamedTuple):
    lr: float
    seed: int


@dataclass(frozen=True)
class Synthetic:
    """Gaussian inputs; targets from a fixed random teacher (classes or values); a NaN where asked."""

    shape: tuple[int, ...]
    classes: int = 10
    size: int = 16
    regression: bool = False
    poison: tuple[int, int] | None = None  # (seed, step) of a batch with a NaN
    digest: str = "synthetic"
    heldout_count: int = 2

    def batch(self, seed: int, step: int) -> Batch:
        generator = torch.Generator().manual_seed(1_000 * seed + step)
        x = torch.randn(self.size, *self.shape, generator=generator)
        if self.poison == (seed, step):
            x.view(-1)[0] = torch.nan
        teacher = torch.randn(x[0].numel(), self.classes, generator=torch.Generator().manual_seed(7))
        scores = x.flatten(1) @ teacher
        return x, (scores if self.regression else scores.nan_to_num().argmax(-1))

    def heldout(self) -> list[Batch]:
        return [self.batch(10_000, s) for s in range(self.heldout_count)]


def tiny_text(seed: int = 0, tokens: int = 4_000) -> corpora.Corpus:
    """A corpus with structure: each byte follows from the one before, with some noise."""
    rng = np.random.default_rng(seed)
    text = np.zeros(tokens, dtype=np.uint8)
    for i in range(1, tokens):
        text[i] = (5 * int(text[i - 1]) + 3 + (rng.integers(0, 8) == 0)) % 64
    return corpora.Corpus(text[: tokens * 9 // 10], text[tokens * 9 // 10 :], 64, f"tiny{seed}", 1)


def _seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def gpt_task(*, width: int = 16, seed: int = 0, qk_norm: bool = True) -> Task:
    text = tiny_text()
    model = _seeded(seed, lambda: GPT(width=width, depth=2, head_dim=8, vocabulary=64, context=12, qk_norm=qk_norm))
    return Task(model=model, data=Windows(text, 4, 12, 3), loss=cross_entropy, outputs_are_logits=True)


def mlp_task(*, seed: int = 0, width: int = 12) -> Task:
    data = Synthetic((6,), classes=3, regression=True)
    return Task(model=_seeded(seed, lambda: MLP(inputs=6, width=width, outputs=3)), data=data, loss=squared_error)


def cnn_task(*, seed: int = 0, width: int = 8) -> Task:
    data = Synthetic((1, 6, 6), classes=4, size=8)
    model = _seeded(seed, lambda: CNN(channels=1, width=width, outputs=4))
    return Task(model=model, data=data, loss=cross_entropy, outputs_are_logits=True)


def digits_task(*, seed: int = 0, width: int = 16) -> Task:
    data = Synthetic((20,), classes=5)
    model = _seeded(seed, lambda: MLP(inputs=20, width=width, outputs=5))
    return Task(model=model, data=data, loss=cross_entropy, outputs_are_logits=True)


def poisoned_task(*, seed: int = 0, heldout: int = 2) -> Task:
    data = Synthetic((20,), classes=5, poison=(1, 3), heldout_count=heldout)
    model = _seeded(seed, lambda: MLP(inputs=20, width=16, outputs=5))
    return Task(model=model, data=data, loss=cross_entropy, outputs_are_logits=True)


def batch_norm_task(*, seed: int = 0) -> Task:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(20, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))

    data = Synthetic((20,), classes=5)
    return Task(model=_seeded(seed, make), data=data, loss=cross_entropy, outputs_are_logits=True)


def dropout_task(*, seed: int = 0) -> Task:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(20, 16), nn.Dropout(0.5), nn.Linear(16, 5))

    return Task(model=_seeded(seed, make), data=Synthetic((20,), classes=5), loss=cross_entropy)


def seeded_data_task(*, seed: int = 0) -> Task:
    data = Synthetic((20,), classes=5, digest=f"of seed {seed}")
    return Task(model=_seeded(seed, lambda: nn.Linear(20, 5)), data=data, loss=cross_entropy)


def renamed_size_task(*, dim: int, seed: int = 0) -> Task:
    return gpt_task(width=dim, seed=seed)


class Recurrent(nn.Module):
    """A model that vmap has no rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(4, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


def recurrent_task(*, seed: int = 0) -> Task:
    data = Synthetic((5, 4), classes=3)
    return Task(model=_seeded(seed, Recurrent), data=data, loss=cross_entropy, outputs_are_logits=True)


class Branching(nn.Module):
    """A model that looks at its numbers in Python, which vmap refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > -1e9 else x


def branching_task(*, seed: int = 0) -> Task:
    return Task(model=_seeded(seed, Branching), data=Synthetic((20,), classes=5), loss=cross_entropy)


def broken_task(*, seed: int = 0) -> Task:
    return Task(model=_seeded(seed, lambda: nn.Linear(7, 5)), data=Synthetic((20,), classes=5), loss=cross_entropy)


PROBLEMS: dict[str, Callable[..., Task]] = {"gpt": gpt_task, "mlp": mlp_task, "cnn": cnn_task, "digits": digits_task}
