"""The monitor in plain loops: the training is the same bit for bit, and whatever happens no hook is left."""

from __future__ import annotations

import copy
import gc
import io
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.signals.loops import Checkpointed, Loop, adamw, cnn, equal, failures, gpt, hooks, mlp, rows, train_step
from tests.state import fingerprint
from towtank.optim import Lion
from towtank.signals.cadence import attribute
from towtank.signals.defaults import default_probes
from towtank.signals.monitor import Monitor
from towtank.signals.step import Step

EVERYTHING = {"every": 1, "budget": 1.0}  # all default probes, the dear ones as often as they can be


def bf16() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True)


def lion(parameters: Any) -> torch.optim.Optimizer:
    return Lion(parameters, lr=1e-3)


LOOPS: dict[str, Loop] = {
    "mlp": Loop(make=mlp),
    "mlp-sgd": Loop(make=mlp, optimizer=sgd, clip=0.1),
    "mlp-lion": Loop(make=mlp, optimizer=lion),
    "mlp-parts": Loop(make=mlp, parts=3, steps=5),
    "mlp-bf16": Loop(make=mlp, around=bf16),
    "cnn": Loop(make=cnn, kind="cnn", steps=6),
    "cnn-parts-bf16": Loop(make=cnn, kind="cnn", parts=2, around=bf16, steps=4),
    "gpt": Loop(make=gpt, kind="gpt", steps=5),
    "gpt-bf16": Loop(make=gpt, kind="gpt", around=bf16, steps=3),
    "checkpointed": Loop(make=partial(Checkpointed, False), parts=2, steps=5),
    "checkpointed-reentrant": Loop(make=partial(Checkpointed, True), parts=2, steps=5),
    "compiled": Loop(make=mlp, wrap=partial(torch.compile, backend="eager"), steps=4),
}


@pytest.mark.parametrize("name", list(LOOPS))
def test_the_training_is_the_same_bit_for_bit(name: str) -> None:
    """Dropout draws the same numbers, so the random state is untouched too; `check` hashes everything around each look."""
    bare, watched = copy.copy(LOOPS[name]), copy.copy(LOOPS[name])
    watched.watch, watched.check = EVERYTHING, lambda model, optimizer: watched_state(model, optimizer)
    assert equal(bare.run(), watched.run())
    assert watched.monitor is not None and watched.monitor.number == watched.steps
    assert not failures(watched.monitor)
    assert watched.monitor.slots and all(slot.runs or slot.refusals for slot in watched.monitor.slots)


def watched_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """All but the monitor's own hooks, which change at every look."""
    saved = {}
    for module in model.modules():
        for kind in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks_with_kwargs",
            "_forward_hooks_always_called",
        ):
            saved[module, kind] = module.__dict__[kind]
            module.__dict__[kind] = {}
    tensors = {p: p._backward_hooks for p in model.parameters()}
    try:
        for p in tensors:
            p._backward_hooks = None
        return fingerprint(model, optimizer)
    finally:
        for (module, kind), hooked in saved.items():
            module.__dict__[kind] = hooked
        for p, hooked in tensors.items():
            p._backward_hooks = hooked


def test_hooks_are_there_only_for_steps_that_need_them() -> None:
    """All but one on the optimizer, which tells whether it moved."""
    model = mlp()
    optimizer = adamw(model.parameters())
    probes = [probe for probe in default_probes(optimizer) if attribute(probe, "cost") is None]
    with Monitor(model, optimizer, loss=F.cross_entropy, every=4, probes=probes) as monitor:
        hooked = []
        for step in range(8):
            hooked.append(bool(hooks(model)))
            train_step(model, optimizer, monitor, seed=step)
    assert hooked == [True, False, False, True, False, False, False, True]
    assert hooks(model, optimizer) == []


# A loop that raises


class Explosive(nn.Module):
    """Raises in its forward or its backward pass when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.when = mlp(), ""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[:2](x)
        if self.when == "forward":
            raise OSError("forward")
        if self.when == "backward":
            hidden.register_hook(explode)
        return self.net[2:](hidden)


def explode(_: Tensor) -> None:
    raise OSError("backward")


class Bad(torch.optim.SGD):
    """An optimizer that fails when it is told to."""

    when = ""

    def step(self, closure: Any = None) -> Any:
        if self.when == "step":
            raise OSError("step")
        return super().step(closure)


@pytest.mark.parametrize("when", ["forward", "backward", "step"])
@pytest.mark.parametrize("block", [True, False])
def test_a_loop_that_raises_leaves_nothing(when: str, block: bool) -> None:
    model = Explosive()
    optimizer = Bad(model.parameters(), lr=0.1)
    plain = hooks(model, optimizer)
    monitor = Monitor(model, optimizer, loss=F.cross_entropy, every=1)
    train_step(model, optimizer, monitor)
    assert len(hooks(model, optimizer)) > len(plain)  # armed for the step that fails
    model.when = optimizer.when = when
    with pytest.raises(OSError, match=when):
        if block:
            with monitor:
                train_step(model, optimizer, monitor)
        else:
            train_step(model, optimizer, monitor)
    assert not block or monitor.status == "failed"
    del monitor
    gc.collect()
    assert hooks(model, optimizer) == plain
    assert torch.overrides._get_current_function_mode_stack() == []


def test_an_interrupt_in_a_block_is_a_stop() -> None:
    model = mlp()
    with pytest.raises(KeyboardInterrupt), Monitor(model, adamw(model.parameters())) as monitor:
        raise KeyboardInterrupt
    assert monitor.status == "stopped" and hooks(model) == []


def test_copies_and_files_of_a_watched_model_carry_no_hooks() -> None:
    model, probe = mlp(), Sizes()
    optimizer = adamw(model.parameters())
    with Monitor(model, optimizer, loss=F.cross_entropy, every=1, probes=[probe]) as monitor:
        train_step(model, optimizer, monitor)
        average = copy.deepcopy(model)  # as for an average of the weights
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        x, y = rows("mlp")
        for other in (average, loaded):
            F.cross_entropy(other(x), y).backward()  # does not count as a part of the step
            assert torch.equal(other[0].weight, model[0].weight)
        train_step(model, optimizer, monitor)
    assert probe.found == [(8,), (8,)]


class Sizes:
    needs = frozenset({"micro"})

    def __init__(self) -> None:
        self.found: list[Any] = []

    def __call__(self, step: Step) -> dict[str, float]:
        self.found.append(step.micro.sizes)
        return {}


def test_gradients_that_the_loop_takes_for_itself_are_no_parts() -> None:
    """`torch.autograd.grad`, as for a gradient penalty, adds nothing to `.grad`; a loop may also call it before any backward."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4))
    optimizer = adamw(model.parameters())
    found: list[Any] = []

    class Parts:
        needs = frozenset({"micro", "raw_norms"})

        def __call__(self, step: Step) -> dict[str, float]:
            found.append((step.micro, dict(step.raw_norms)))
            return {}

    x, y = rows("mlp")
    with Monitor(model, optimizer, loss=F.cross_entropy, every=1, probes=[Parts()]) as monitor:
        aside = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        torch.autograd.grad(F.cross_entropy(model(-x), y), list(model.parameters()))
        optimizer.step()
        monitor.step(loss, (x, y))
    [(micro, raw)] = found
    by_hand = {n: float(g.norm()) for (n, _), g in zip(model.named_parameters(), aside)}
    assert len(micro.squares) == 1
    assert {n: float(norm) for n, norm in raw.items()} == pytest.approx(by_hand, rel=1e-6)
    assert {n: float(square) ** 0.5 for n, square in micro.squares[0].items()} == pytest.approx(by_hand, rel=1e-6)


def test_a_model_without_the_monitor_can_be_collected() -> None:
    """The monitor's hooks must not keep the model alive once both are dropped."""
    import weakref

    model = mlp()
    optimizer = adamw(model.parameters())
    monitor = Monitor(model, optimizer, loss=F.cross_entropy, every=1)
    train_step(model, optimizer, monitor)
    gone = weakref.ref(model)
    del model, optimizer, monitor
    gc.collect()
    assert gone() is None


# Scaled float16


def test_a_step_that_the_scaler_skips() -> None:
    """65,504 is the largest float16: with a scale of 2^20 the first gradients overflow and steps are skipped until they fit."""
    model = nn.Linear(6, 4)
    nn.init.constant_(model.weight, 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=1000)
    seen: list[tuple[bool, float]] = []

    class Look:
        needs = frozenset({"raw_norms"})

        def __call__(self, step: Step) -> dict[str, float]:
            seen.append((step.stepped, float(torch.stack(list(step.raw_norms.values())).norm())))
            return {}

    moved: list[bool] = []
    exact: list[float] = []
    x, y = rows("mlp")
    with Monitor(model, optimizer, scaler=scaler, probes=[Look()], every=1, rules=[]) as monitor:
        for _ in range(8):
            before = model.weight.detach().clone()
            gradient = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
            exact.append(float(torch.cat([g.reshape(-1) for g in gradient]).norm()))
            with torch.autocast("cpu", dtype=torch.float16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            monitor.step(loss, (x, y))
            moved.append(not torch.equal(before, model.weight))
            optimizer.zero_grad()
    assert moved[0] is False and moved[-1] is True
    assert [stepped for stepped, _ in seen] == moved
    # float16 has eps 2^-10: logits, their softmax and two products are rounded
    for (stepped, raw), true in zip(seen, exact):
        assert not stepped or raw == pytest.approx(true, rel=4 * 2**-10)


def test_overflow_is_an_alarm_only_when_it_goes_on() -> None:
    model = nn.Linear(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    raised: list[list[str]] = []
    x, y = rows("mlp")
    with Monitor(model, optimizer, scaler=scaler, loss=F.cross_entropy, probes=[]) as monitor:
        for factor in (1.0, math.inf, 1.0, math.inf, math.inf, math.inf):
            loss = F.cross_entropy(model(x), y)
            scaler.scale(loss * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            raised.append([alarm.name for alarm in monitor.step(loss, (x, y))])
            optimizer.zero_grad()
    assert raised == [[], [], [], [], [], ["overflow"]]
