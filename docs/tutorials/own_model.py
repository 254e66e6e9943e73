"""Sweep a model of your own: a residual network with attention over a synthetic retrieval task.

A task is a plain function with keyword arguments: what it needs to build one model, its data and its loss. Its arguments
become keys of the study. Run this file from its folder:

    python own_model.py

or keep the function where it is and write the study as a file (see docs/own_model.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from towtank.losses import cross_entropy
from towtank.train.task import Task


class Retriever(nn.Module):
    """Looks up the value that follows the queried key in a sequence of key-value pairs."""

    def __init__(self, width: int, keys: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2 * keys, width)
        self.positions = nn.Parameter(torch.randn(2 * keys + 1, width) * width**-0.5)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.attention = nn.MultiheadAttention(width, num_heads=width // 8, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, keys)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions
        mixed, _ = self.attention(x[:, -1:], x, x, need_weights=False)
        return self.head(self.norm(x[:, -1] + mixed[:, 0]))


@dataclass(frozen=True)
class Pairs:
    """Shuffled (key, value) pairs and one query; the target is the query's value."""

    keys: int
    size: int
    digest: str = "pairs-v1"  # name what the data are: it is part of every run's identity

    def batch(self, seed: int, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        order = torch.rand(self.size, self.keys, generator=generator).argsort(1)
        values = torch.randint(self.keys, (self.size, self.keys), generator=generator)
        query = torch.randint(self.keys, (self.size, 1), generator=generator)
        target = values.gather(1, (order == query).int().argmax(1, keepdim=True)).squeeze(1)
        pairs = torch.stack((order, values + self.keys), dim=2).flatten(1)
        return torch.cat((pairs, query), dim=1), target

    def heldout(self) -> list[tuple[Tensor, Tensor]]:
        return [self.batch(2**31, step) for step in range(8)]


def retrieval(*, width: int, keys: int = 6, batch: int = 32) -> Task:
    """The task function: one freshly initialized model, its data and its loss (the study sets the seed)."""
    return Task(model=Retriever(width, keys), data=Pairs(keys, batch), loss=cross_entropy, outputs_are_logits=True)


def main(out: Path = Path("runs/retrieval"), steps: int = 150) -> str:
    """Sweep widths and learning rates, and return the answer in a sentence."""
    from towtank import Study, answer, load_records, sweep

    study = Study(
        name="retrieval",
        question="Which learning rate should the retriever of width 64 use?",
        task="own_model:retrieval",
        grid={"width": [8, 16, 32], "lr": {"log2": [-10, -3]}, "seed": [0, 1]},
        fixed={"steps": steps},
    )
    sweep(study, out, workers=1)
    records, _ = load_records(out)
    return answer(records, target=64).sentence


if __name__ == "__main__":
    print(main())
