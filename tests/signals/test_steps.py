"""What a monitor is given at a step, and probes of the user: whatever they are, the training goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.signals.loops import adamw, failures, hooks, mlp, rows, token_loss, train_step
from towtank.signals.alarm import Alarm, Stop
from towtank.signals.cadence import every, log_spaced
from towtank.signals.monitor import Monitor
from towtank.signals.step import CannotTell, Step

EVERYTHING = {"every": 1, "budget": 1.0}  # all default probes, the dear ones as often as they can be


@pytest.mark.parametrize(
    "form", [tuple, list, lambda b: {"input": b[0], "targets": b[1]}], ids=["tuple", "list", "mapping"]
)
def test_forms_of_a_batch(form: Callable[[Any], Any]) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(6, 4)

        def forward(self, input: Tensor) -> Tensor:
            return self.net(input)

    model = Named()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: list[tuple[float, float]] = []

    def curvature(step: Step) -> dict[str, float]:
        x, y = rows("mlp", seed=0)
        found.append((step.problem.value(), float(F.cross_entropy(step.model(x), y))))
        return {}

    with Monitor(model, optimizer, loss=F.cross_entropy, probes=[curvature], every=1) as monitor:
        for seed in range(2):
            batch = rows("mlp", seed=seed)
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            monitor.step(loss, form(batch))
            optimizer.zero_grad()
    assert not monitor.notes, monitor.notes
    assert len(found) == 2 and all(a == pytest.approx(b, rel=1e-5) for a, b in found)  # on the first batch both times


def test_a_step_without_a_batch_says_what_is_missing() -> None:
    model = mlp()
    optimizer = adamw(model.parameters())
    with Monitor(model, optimizer, every=1, budget=1.0) as monitor:
        for seed in range(3):
            x, y = rows("mlp", seed=seed)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            monitor.step(float(loss.detach()))
            optimizer.zero_grad()
    assert monitor.history["train/loss"][1].tolist()[-1] == float(loss.detach())
    assert any("monitor.step(loss, batch)" in text for _, _, text in monitor.notes)
    assert not failures(monitor)


def test_a_loss_that_is_not_told() -> None:
    model = mlp()
    with Monitor(model, adamw(model.parameters()), probes=[]) as monitor:
        assert monitor.step(None) == ()
    assert "train/loss" not in monitor.history and monitor.status == "done"


@pytest.mark.parametrize("loss", [math.nan, torch.tensor(math.inf)])
def test_a_loss_that_is_not_finite_is_an_alarm_and_a_diverged_run(loss: Any) -> None:
    model = mlp()
    with Monitor(model, adamw(model.parameters()), probes=[]) as monitor:
        [alarm] = monitor.step(loss)
        assert alarm.name == "divergence" and alarm.severity == "critical"
        assert monitor.step(loss) == ()  # it goes on
    assert monitor.status == "diverged" and math.isfinite(float(loss)) is False


def test_a_closed_monitor_refuses() -> None:
    model = mlp()
    monitor = Monitor(model, adamw(model.parameters()))
    monitor.close()
    monitor.close()
    with pytest.raises(RuntimeError, match="expected a monitor that is running, got one that is done"):
        monitor.step(1.0)
    assert hooks(model) == []


def test_frozen_parameters_are_left_alone() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    frozen = model[0].weight.detach().clone()
    with Monitor(model, optimizer, loss=F.cross_entropy, **EVERYTHING) as monitor:
        for seed in range(3):
            train_step(model, optimizer, monitor, seed=seed)
    assert torch.equal(model[0].weight, frozen) and model[0].weight.grad is None
    assert not failures(monitor)
    assert not any(key.startswith("grad/rms/0.") for key, _ in monitor.history.items())


def test_a_model_that_is_not_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="expected .* require"):
        Monitor(mlp().requires_grad_(False))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("model",), TypeError, "expected a torch.nn.Module as model, got str"),
        ((nn.Linear(1, 1), "adam"), TypeError, "expected a torch.optim.Optimizer, got str"),
    ],
)
def test_wrong_kinds_are_refused(arguments: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        Monitor(*arguments)


@pytest.mark.parametrize("options", [{"every": 0}, {"budget": 0.0}, {"budget": 1.5}])
def test_wrong_numbers_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        Monitor(nn.Linear(1, 1), **options)


# Probes of the user


def test_probes_that_fail_or_cannot_tell_do_not_end_the_training() -> None:
    runs = {"wrong": 0, "unsure": 0}

    def wrong(step: Step) -> dict[str, float]:
        runs["wrong"] += 1
        raise ZeroDivisionError("no\nluck")

    def unsure(step: Step) -> dict[str, float]:
        runs["unsure"] += 1
        raise CannotTell("too few examples")

    model = mlp()
    optimizer = adamw(model.parameters())
    with Monitor(model, optimizer, probes=[wrong, unsure, lambda step: {"lr": step.lr}], every=1) as monitor:
        for seed in range(6):
            train_step(model, optimizer, monitor, seed=seed)
    assert monitor.history["lr"][1].tolist() == [1e-2] * 6
    assert runs == {"wrong": 3, "unsure": 6}  # who fails three times is asked no more
    assert sorted((probe, text) for _, probe, text in monitor.notes) == [
        ("unsure", "too few examples"),
        ("wrong", "failed: ZeroDivisionError: no luck"),
    ]


def test_probes_at_steps_of_their_own() -> None:
    model = mlp()
    optimizer = adamw(model.parameters())
    probes = [
        every(5, lambda step: {"five": step.loss}),
        log_spaced(lambda step: {"log": step.number}, per_decade=3),
        every(1, lambda step: {"update": sum(u.square().sum() for u in step.updates.values())}),
    ]
    with Monitor(model, optimizer, probes=probes, every=100) as monitor:
        for seed in range(12):
            train_step(model, optimizer, monitor, seed=seed)
    assert monitor.history["five"][0].tolist() == [1, 5, 10]
    assert monitor.history["log"][0].tolist() == [1, 3, 5, 10]
    assert monitor.history["update"][0].tolist() == list(range(2, 13))  # what it needs is known after its first try
    assert not monitor.notes


def test_an_alarm_can_stop_the_loop_and_call_back() -> None:
    def drill(history: Any, step: Step) -> Any:
        yield Alarm(
            name="drill", step=step.number, message="m", source="s", suggestion="x", key="k", value=1.0, limit=0.0
        )

    heard: list[Alarm] = []
    model = mlp()
    with Monitor(model, adamw(model.parameters()), probes=[], rules=[drill], on_alarm=heard.append) as monitor:
        assert list(monitor.step(1.0)) == heard
        assert monitor.may_stop  # for all it knows
    with pytest.raises(Stop, match="drill"), Monitor(model, probes=[], rules=[drill], on_alarm={"": "stop"}) as monitor:
        monitor.step(1.0)
    assert monitor.status == "stopped" and hooks(model) == []


def test_tied_tokens_and_a_token_loss() -> None:
    """A language model whose head is its embedding: tied parameters count once."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens))

    model = Tied()
    optimizer = adamw(model.parameters())
    x, y = rows("gpt")
    with Monitor(model, optimizer, loss=token_loss, **EVERYTHING) as monitor:
        for _ in range(3):
            loss = token_loss(model(x), y)
            loss.backward()
            optimizer.step()
            monitor.step(loss, (x, y))
            optimizer.zero_grad()
    assert [key for key, _ in monitor.history.items() if key.startswith("parameter/rms/")] == [
        "parameter/rms/embedding.weight"
    ]
    assert not failures(monitor)
