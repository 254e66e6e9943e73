"""Healthy runs raise no alarm; each planted fault raises the right one first, before the held-out loss doubles."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.signals.runs import (
    HEALTHY,
    Batch,
    Residual,
    Run,
    batches,
    digits,
    digits_cnn,
    digits_mlp,
    full_batch_descent,
    seeded,
    text_gpt,
)

STEPS = 160


@pytest.mark.parametrize("name", HEALTHY)
@pytest.mark.parametrize("seed", [0, 1])
def test_healthy_runs_raise_no_alarm(name: str, seed: int) -> None:
    run = HEALTHY[name](seed=seed)
    raised = run.go(STEPS)
    assert raised == [], [str(a) for a in raised]
    assert run.losses[-1] < 0.6 * run.losses[0]  # healthy it is
    assert run.monitor is not None
    failed = [text for _, _, text in run.monitor.notes if "failed" in text]
    assert not failed, failed


def first_alarm(run: Run, steps: int = STEPS, *, planted: int = 1) -> tuple[str, int]:
    """Name and step of the first alarm, having seen that it came in time."""
    raised = run.go(steps)
    assert raised, "no alarm"
    assert raised[0].step >= planted, str(raised[0])
    assert raised[0].step <= run.doubled(), (str(raised[0]), run.doubled())
    return raised[0].name, raised[0].step


@pytest.mark.parametrize(
    "make",
    [
        lambda: full_batch_descent(lr=30.0),
        lambda: digits_mlp(lr=5.0),
        lambda: text_gpt(lr=2.0),
        lambda: digits_cnn(lr=0.1),
    ],
    ids=["descent", "momentum", "adamw", "adam"],
)
def test_too_large_a_learning_rate(make: Callable[[], Run]) -> None:
    name, step = first_alarm(make())
    assert name == "learning rate"


def test_a_learning_rate_that_is_raised_while_training() -> None:
    def fault(run: Run, step: int, batch: Batch) -> Batch:
        if step == 100:
            for group in run.optimizer.param_groups:
                group["lr"] *= 60
        return batch

    # the budget is what decides how soon a rise is seen; here every step is measured
    name, step = first_alarm(full_batch_descent(fault=fault, options={"budget": 1.0}), planted=100)
    assert name == "learning rate" and step <= 110


def test_a_bad_batch() -> None:
    def fault(run: Run, step: int, batch: Batch) -> Batch:
        return (100 * batch[0], batch[1]) if step == 100 else batch

    name, step = first_alarm(digits_mlp(lr=0.02, fault=fault), planted=100)
    assert (name, step) == ("bad batch", 100)


def test_a_label_noise_burst() -> None:
    def fault(run: Run, step: int, batch: Batch) -> Batch:
        x, y = batch
        noise = torch.randint(10, y.shape, generator=torch.Generator().manual_seed(step))
        return (x, noise) if 100 <= step < 105 else batch

    name, step = first_alarm(digits_mlp(lr=0.02, fault=fault), planted=100)
    assert (name, step) == ("label noise", 100)


def test_half_precision_overflow() -> None:
    """Gradients in float16 beyond 65504: the loss is scaled up by 2^24 from step 30 on, with no scaler to find out."""
    x, y = digits()
    model = seeded(Residual).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    scale = {"now": 1.0}

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs.float(), targets) * scale["now"]

    def fault(run: Run, step: int, batch: Batch) -> Batch:
        scale["now"] = 2.0**24 if step == 30 else 1.0
        return batch

    run = Run(model, optimizer, loss, batches(x[:1500].half(), y[:1500], 64), (x[1500:].half(), y[1500:]), fault=fault)
    raised = run.go(31)
    assert raised and raised[0].step == 30
    assert {a.name for a in raised if a.step == 30} >= {"overflow"}


def test_too_large_an_epsilon() -> None:
    name, step = first_alarm(text_gpt(eps=1.0))
    assert name == "epsilon" and step <= 20


def test_a_dead_layer() -> None:
    def dead() -> nn.Module:
        model = Residual()
        with torch.no_grad():
            model.blocks[1][0].bias.fill_(-100.0)
        return model

    run = digits_mlp()
    run.model = seeded(dead)
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    name, step = first_alarm(run)
    assert name == "dead layer" and step <= 20
    assert run.monitor is not None and "blocks.1" in run.monitor.alarms[0].message


def test_attention_logits_are_forecast_without_qk_norm() -> None:
    """Queries and keys that grow by 3 % a step: logits by 6 %, from about 1 to 1e4 in some 150 steps."""

    def fault(run: Run, step: int, batch: Batch) -> Batch:
        with torch.no_grad():
            for name, p in run.model.named_parameters():
                if "query" in name or "key" in name or "qkv" in name:
                    p.mul_(1.03)
        return batch

    run = text_gpt(qk_norm=False, lr=1e-4, fault=fault)
    raised = [a for a in run.go(STEPS) if a.name == "attention logits"]
    assert raised and raised[0].lead is not None and raised[0].severity == "warning"
    assert "cross 10000 at about step" in raised[0].message
    crossed = next((int(s) for s, v in zip(*run.monitor.history["attention/max_logit"], strict=True) if v > 1e4), None)
    assert crossed is None or raised[0].step < crossed
    assert math.isfinite(raised[0].lead.value)
