"""The monitor in loops of Accelerate: prepared models and optimizers, accumulation, mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.nn import functional as F

from tests.signals.loops import equal, hooks, mlp, rows
from tests.state import fingerprint
from towtank.integrations import AccelerateMonitor
from towtank.signals.monitor import Monitor

STEPS, PARTS = 4, 2


@pytest.fixture(autouse=True)
def accelerator_state() -> Iterator[None]:
    """Accelerate keeps its state in class attributes; each test has its own."""
    with torch.random.fork_rng():
        yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def train(
    accelerator: Accelerator, *, watch: bool, parts: int = PARTS, **options: Any
) -> tuple[nn.Module, Any, list[float]]:
    """A loop as Accelerate's documentation writes it; the losses are those of the parts."""
    torch.manual_seed(0)
    net = mlp()
    model, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
    monitor = AccelerateMonitor(accelerator, model, optimizer, loss=F.cross_entropy, **options) if watch else None
    losses: list[float] = []
    for part in range(STEPS * parts):
        x, y = rows("mlp", seed=part)
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(x), y)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            if monitor is not None:
                before = fingerprint(net, optimizer.optimizer) if parts > 1 and not accelerator.sync_gradients else None
                monitor.step(loss, (x, y))
                assert before is None or before == fingerprint(net, optimizer.optimizer)
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if monitor is not None:
        monitor.close()
        assert hooks(net, optimizer.optimizer) == []
    return net, monitor, losses


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_steps_are_counted_as_the_optimizer_counts_them(parts: int, precision: str) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts, mixed_precision=precision)
    net, watching, losses = train(accelerator, watch=True, parts=parts, every=1, budget=1.0)
    bare, _, _ = train(accelerator, watch=False, parts=parts)
    monitor = watching.monitor
    assert equal(net, bare)
    assert monitor.number == STEPS and type(monitor.optimizer) is torch.optim.AdamW
    means = torch.tensor(losses, dtype=torch.float64).view(STEPS, parts).mean(dim=1).tolist()
    assert monitor.history["train/loss"][1].tolist() == pytest.approx(means, rel=1e-6)  # float32
    assert max(monitor.history["grad/norm"][1]) == pytest.approx(0.1, rel=1e-3)  # clipping divides by norm + 1e-6
    assert not [text for _, _, text in monitor.notes if text.startswith("failed")], monitor.notes


def test_the_parts_of_a_step_are_the_parts_that_were_accumulated() -> None:
    sizes: list[Any] = []

    class Sizes:
        needs = frozenset({"micro"})

        def __call__(self, step: Any) -> dict[str, float]:
            sizes.append(step.micro.sizes)
            return {}

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    train(accelerator, watch=True, every=1, probes=[Sizes()])
    assert sizes == [(8, 8)] * STEPS


def test_the_scaler_of_a_prepared_optimizer_is_found() -> None:
    """float16 on a CPU: the first scale overflows, the step is skipped, and the monitor knows."""
    accelerator = Accelerator(cpu=True)
    net = nn.Linear(4, 2)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    accelerator.scaler = scaler
    optimizer = type(optimizer)(optimizer.optimizer, scaler=scaler)
    stepped: list[bool] = []
    monitor = Monitor(
        model, optimizer, loss=F.mse_loss, every=1, probes=[lambda step: stepped.append(step.stepped) or {}]
    )
    x, y = torch.ones(3, 4), torch.zeros(3, 2)
    for factor in (1.0, float("inf"), 1.0):
        loss = F.mse_loss(model(x), y)
        scaler.scale(loss * factor).backward()
        optimizer.step()
        monitor.step(loss, (x, y))
        optimizer.zero_grad()
    monitor.close()
    assert stepped == [True, False, True]
    assert optimizer.step_was_skipped is False and hooks(net, optimizer.optimizer) == []


def test_norms_before_clipping_are_in_the_unit_of_the_loss() -> None:
    net = nn.Linear(4, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = torch.ones(3, 4), torch.zeros(3, 2)
    by_hand = torch.autograd.grad(F.mse_loss(net(x), y), list(net.parameters()))
    accelerator = Accelerator(cpu=True)
    optimizer = accelerator.prepare(torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.scaler = scaler
    optimizer = type(optimizer)(optimizer.optimizer, scaler=scaler)
    found: dict[str, Tensor] = {}

    class Raw:
        needs = frozenset({"raw_norms"})

        def __call__(self, step: Any) -> dict[str, float]:
            found.update(step.raw_norms)
            return {}

    with Monitor(net, optimizer, probes=[Raw()], every=1) as monitor:
        scaler.scale(F.mse_loss(net(x), y)).backward()
        optimizer.step()
        monitor.step(0.0)
    # the scale is a power of two: scaling is exact, but sums may be rounded in another order
    assert [float(found[n]) for n, _ in net.named_parameters()] == pytest.approx(
        [float(g.norm()) for g in by_hand], rel=1e-6
    )


def test_sharded_parameters_are_refused() -> None:
    sharded: Any = SimpleNamespace(distributed_type=SimpleNamespace(name="FSDP"))
    with pytest.raises(ValueError, match="expected whole parameters in every process, got FSDP"):
        AccelerateMonitor(sharded, nn.Linear(1, 1))


def test_a_loop_that_fails_ends_the_record_as_failed() -> None:
    accelerator = Accelerator(cpu=True)
    net = nn.Linear(6, 4)
    model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(OSError, match="disk"), AccelerateMonitor(accelerator, model, optimizer) as watching:
        model(rows("mlp")[0]).sum().backward()
        raise OSError("the disk is full")
    assert watching.monitor.status == "failed" and hooks(net, optimizer.optimizer) == []
