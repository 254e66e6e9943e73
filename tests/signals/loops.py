"""Plain training loops with and without a monitor, and what hooks are left in a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from towtank.signals.alarm import Alarm
from towtank.signals.monitor import Monitor
from towtank.train.models.gpt import GPT

Batch = tuple[Tensor, Tensor]


def token_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(64, 4)
    )


def gpt() -> nn.Module:
    return nn.Sequential(GPT(width=16, depth=1, head_dim=8, vocabulary=11, context=8, qk_norm=False), nn.Dropout(0.1))


class Checkpointed(nn.Module):
    """An MLP with dropout whose middle is recomputed in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 16), nn.Sequential(*mlp().children())[1:4], nn.Linear(16, 4)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant))


def rows(kind: str, *, seed: int = 0, size: int = 8) -> Batch:
    g = torch.Generator().manual_seed(seed)
    if kind == "gpt":
        return torch.randint(11, (size, 8), generator=g), torch.randint(11, (size, 8), generator=g)
    shape = (size, 1, 6, 6) if kind == "cnn" else (size, 6)
    return torch.randn(*shape, generator=g), torch.randint(4, (size,), generator=g)


@dataclass(kw_only=True)
class Loop:
    """A training loop as anybody writes it.

    `parts` micro-batches make a step; `around` is the context of the forward pass; `watch` are the options of the monitor,
    None for a run without one; `check` is called around each `monitor.step`.
    """

    make: Callable[[], nn.Module]
    kind: str = "mlp"
    optimizer: Callable[[Any], torch.optim.Optimizer] = lambda p: torch.optim.AdamW(p, lr=1e-2)
    parts: int = 1
    steps: int = 12
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    wrap: Callable[[nn.Module], nn.Module] = lambda m: m
    clip: float | None = None
    watch: dict[str, Any] | None = None
    check: Callable[[nn.Module, torch.optim.Optimizer], Any] | None = None
    monitor: Monitor | None = field(default=None, init=False)

    def run(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.make()
            optimizer = self.optimizer(model.parameters())
            watched = self.wrap(model)
            loss_of = token_loss if self.kind == "gpt" else F.cross_entropy
            if self.watch is not None:
                self.monitor = Monitor(watched, optimizer, **{"loss": loss_of, **self.watch})
            for step in range(self.steps):
                optimizer.zero_grad()
                for part in range(self.parts):
                    x, y = rows(self.kind, seed=step * self.parts + part)
                    with self.around():
                        loss = loss_of(watched(x), y)
                    (loss / self.parts).backward()
                if self.clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), self.clip)
                optimizer.step()
                if self.monitor is not None:
                    before = self.check(model, optimizer) if self.check else None
                    self.monitor.step(loss, (x, y))
                    assert before == (self.check(model, optimizer) if self.check else None)
            if self.monitor is not None:
                self.monitor.close()
        return model


def hooks(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[str]:
    """Every hook in a model and an optimizer, by owner; global module hooks too."""
    return list(_hooks(model, optimizer))


def _hooks(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[str]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for name, module in model.named_modules():
        yield from (f"{name}{kind}" for kind in kinds for _ in getattr(module, kind))
    for name, p in model.named_parameters():
        yield from (f"{name} tensor" for _ in p._backward_hooks or ())
        yield from (f"{name} accumulated" for _ in getattr(p, "_post_accumulate_grad_hooks", None) or ())
    if optimizer is not None:
        for kind in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            yield from (f"optimizer{kind}" for _ in getattr(optimizer, kind))
    everywhere = nn.modules.module
    yield from (
        f"global{k}" for k in ("_global_forward_hooks", "_global_forward_pre_hooks") for _ in getattr(everywhere, k)
    )


def equal(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models hold the same bits."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def failures(monitor: Monitor | None) -> list[str]:
    assert monitor is not None
    return [f"{probe}: {text}" for _, probe, text in monitor.notes if text.startswith("failed")]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, monitor: Monitor, *, seed: int = 0
) -> tuple[Alarm, ...]:
    x, y = rows("mlp", seed=seed)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    raised = monitor.step(loss, (x, y))
    optimizer.zero_grad()
    return raised
