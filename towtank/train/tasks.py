"""Built-in tasks: functions from a cell's keys to a `Task` (torch is imported inside, so that signatures can be read fast)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from towtank.train import corpus as corpora

if TYPE_CHECKING:
    from towtank.train.task import Batch, Task


def gpt(
    *,
    width: int,
    depth: int = 2,
    head_dim: int = 32,
    qk_norm: bool = True,
    context: int = 64,
    batch: int = 8,
    heldout_batches: int = 32,
    corpus: str = "builtin",
) -> Task:
    """Next-byte prediction with the proxy decoder (2309.14322's recipe at byte level).

    Args:
        width: model width, a multiple of `head_dim`.
        depth: number of blocks.
        head_dim: dimension of a head.
        qk_norm: LayerNorm over each head's query and key.
        context: tokens in a window.
        batch: windows in a batch.
        heldout_batches: held-out batches behind every held-out loss.
        corpus: `builtin`, a file, folder or glob of text, or a `.bin` file of uint16 tokens.

    Raises:
        ValueError: if a number is below 1, or the corpus cannot be had.
    """
    from towtank.losses import cross_entropy
    from towtank.train.models.gpt import GPT
    from towtank.train.task import Task

    for name, value in {"depth": depth, "context": context, "batch": batch, "heldout_batches": heldout_batches}.items():
        if value < 1:
            raise ValueError(f"{name} = {value}: expected 1 or more")
    text = _corpus(corpus)
    model = GPT(
        width=width, depth=depth, head_dim=head_dim, vocabulary=text.vocabulary, context=context, qk_norm=qk_norm
    )
    data = Windows(text, batch, context, heldout_batches)
    return Task(model=model, data=data, loss=cross_entropy, outputs_are_logits=True)


def digits(*, width: int, depth: int = 2, batch: int = 64) -> Task:
    """Classification of scikit-learn's 1797 images of digits with a multilayer perceptron.

    Args:
        width: of the hidden layers.
        depth: number of hidden layers.
        batch: images in a batch.

    Raises:
        ValueError: if a number is below 1.
        ImportError: if scikit-learn is not installed.
    """
    from towtank.losses import cross_entropy
    from towtank.train.digits import MLP, Digits
    from towtank.train.task import Task

    for name, value in {"width": width, "depth": depth, "batch": batch}.items():
        if value < 1:
            raise ValueError(f"{name} = {value}: expected 1 or more")
    return Task(model=MLP(width, depth), data=Digits(batch), loss=cross_entropy, outputs_are_logits=True)


@lru_cache(maxsize=4)
def _corpus(source: str) -> corpora.Corpus:
    return corpora.load(source)


@dataclass(frozen=True)
class Windows:
    """Random windows of a corpus as (inputs, targets) of shape (size, context)."""

    corpus: corpora.Corpus
    size: int
    context: int
    heldout_count: int

    @property
    def digest(self) -> str:
        """The corpus' digest."""
        return self.corpus.digest

    def batch(self, seed: int, step: int) -> Batch:
        """The batch of a step."""
        import torch

        inputs, targets = corpora.batch(self.corpus, seed, step, size=self.size, context=self.context)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def heldout(self) -> list[Batch]:
        """Evenly spread held-out windows."""
        import torch

        pairs = corpora.heldout_batches(self.corpus, batches=self.heldout_count, size=self.size, context=self.context)
        return [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in pairs]
