"""Small training runs for the tests of the monitor: four healthy tasks, and faults planted in them.

A run yields every step after the monitor has looked at it; the loss that counts is that of a held-out batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from tests.problems import tiny_text
from towtank.signals import Alarm, Monitor
from towtank.train.models.gpt import GPT

Batch = tuple[Tensor, Tensor]
Fault = Callable[["Run", int, Batch], Batch]


def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@dataclass
class Run:
    """A model, its optimizer, its loss, and the batch of each step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: Callable[[int], Batch]
    heldout: Batch
    fault: Fault | None = None
    options: dict[str, Any] = field(default_factory=dict)
    monitor: Monitor | None = None
    losses: list[float] = field(default_factory=list)  # held-out, after each step

    def go(self, steps: int) -> list[Alarm]:
        """Train and return the alarms in order."""
        self.losses = [self._heldout()]
        raised: list[Alarm] = []
        options = {"loss": self.loss, "on_alarm": raised.append} | self.options
        with Monitor(self.model, self.optimizer, **options) as self.monitor:
            for step in range(1, steps + 1):
                batch = self.batch(step)
                if self.fault is not None:
                    batch = self.fault(self, step, batch)
                loss = self.loss(self.model(batch[0]), batch[1])
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.monitor.step(loss, batch)
                self.losses.append(self._heldout())
        return raised

    @torch.no_grad()
    def _heldout(self) -> float:
        mode = self.model.training
        self.model.eval()
        value = float(self.loss(self.model(self.heldout[0]), self.heldout[1]))
        self.model.train(mode)
        return value

    def doubled(self) -> int:
        """The first step after which the held-out loss is twice its lowest value so far, or one past the end."""
        lowest = self.losses[0]
        for step, loss in enumerate(self.losses):
            if not loss <= 2 * lowest:
                return step
            lowest = min(lowest, loss)
        return len(self.losses)


class Residual(nn.Module):
    """A residual multilayer perceptron: it learns even where a block is dead."""

    def __init__(self, inputs: int = 64, width: int = 48, outputs: int = 10) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 16, 10),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.view(-1, 1, 8, 8))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def batches(x: Tensor, y: Tensor, size: int, seed: int = 0) -> Callable[[int], Batch]:
    def batch(step: int) -> Batch:
        rows = torch.randint(len(x), (size,), generator=torch.Generator().manual_seed(1_000_003 * seed + step))
        return x[rows], y[rows]

    return batch


def digits_mlp(*, lr: float = 0.1, seed: int = 0, **options: Any) -> Run:
    """SGD with momentum on digits, batch 64."""
    x, y = digits()
    model = seeded(Residual, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return Run(
        model, optimizer, F.cross_entropy, batches(x[:1500], y[:1500], 64, seed), (x[1500:], y[1500:]), **options
    )


def digits_cnn(*, lr: float = 3e-3, seed: int = 0, **options: Any) -> Run:
    """Adam on digits as images, batch normalization."""
    x, y = digits()
    model = seeded(ConvNet, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    return Run(
        model, optimizer, F.cross_entropy, batches(x[:1500], y[:1500], 64, seed), (x[1500:], y[1500:]), **options
    )


def text_gpt(*, lr: float = 5e-3, seed: int = 0, qk_norm: bool = True, eps: float = 1e-8, **options: Any) -> Run:
    """AdamW with warm-up on text, a transformer of two layers."""
    text = torch.from_numpy(tiny_text().train.astype("int64"))
    model = seeded(lambda: GPT(width=32, depth=2, head_dim=8, vocabulary=64, context=16, qk_norm=qk_norm), seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), eps=eps, weight_decay=0.1)

    def batch(step: int) -> Batch:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / 20)
        starts = torch.randint(len(text) - 17, (8,), generator=torch.Generator().manual_seed(1_000_003 * seed + step))
        rows = torch.stack([text[s : s + 17] for s in starts])
        return rows[:, :-1], rows[:, 1:]

    return Run(model, optimizer, token_loss, batch, batch(10_000_000), **options)


def full_batch_descent(*, lr: float = 0.5, seed: int = 0, **options: Any) -> Run:
    """Gradient descent on all of 400 digits: it goes to the edge of stability and stays there."""
    x, y = digits()
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 40), nn.Tanh(), nn.Linear(40, 10)), seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return Run(model, optimizer, F.cross_entropy, lambda step: (x[:400], y[:400]), (x[:400], y[:400]), **options)


HEALTHY: dict[str, Callable[..., Run]] = {
    "digits_mlp": digits_mlp, "digits_cnn": digits_cnn, "text_gpt": text_gpt, "full_batch_descent": full_batch_descent,
}  # fmt: skip
