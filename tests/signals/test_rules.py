"""Rules raise what they should on series made by hand, and stay silent on healthy ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from towtank.signals.alarm import Alarm
from towtank.signals.history import CAPACITY, History
from towtank.signals.rules import RULES, Limit, Rule
from towtank.signals.step import Step


def step(number: int, *, stepped: bool = True) -> Step:
    return Step(number=number, loss=torch.zeros(()), model=nn.Identity(), stepped=stepped)


def raised(series: dict[str, list[float]], rules: tuple[Rule, ...] = RULES, **options: bool) -> list[Alarm]:
    """Alarms of readings that come together, one a step."""
    history, found = History(), []
    for i in range(max(map(len, series.values()))):
        history.add(i + 1, {k: v[i] for k, v in series.items() if i < len(v)})
        found += [alarm for rule in rules for alarm in rule(history, step(i + 1, **options))]
    return found


def test_healthy_series_raise_nothing() -> None:
    rng = np.random.default_rng(0)
    n = 300
    loss = 2.3 * np.exp(-np.arange(n) / 100) + 0.3 + 0.05 * rng.standard_normal(n)
    healthy = {
        "train/loss": loss.tolist(),
        "grad/norm": np.exp(0.3 * rng.standard_normal(n)).tolist(),
        "attention/max_logit": (8 + rng.standard_normal(n)).tolist(),
        "stability/sharpness_ratio": (1 + 0.15 * rng.standard_normal(n)).tolist(),  # the edge of stability
        "stability/epsilon_ratio/w": (1e4 * np.exp(0.3 * rng.standard_normal(n))).tolist(),
        "update/ratio_median": [1e-3] * n,
        "output/collapse": [0.0] * n,
        "output/log_z_mean": [5.5] * n,
        "activation/dead/0": [0.4] * n,
        "grad/rms/w": [1e-3] * n,
    }
    assert raised(healthy) == []


@pytest.mark.parametrize(
    ("key", "values", "name", "first"),
    [
        ("attention/max_logit", [10.0, 2e4], "attention logits", 2),
        ("stability/preconditioned_ratio", [0.5, 1.7, 1.7], "learning rate", 3),
        ("stability/sharpness_ratio", [2.0, 1.0, 2.0, 2.0], "learning rate", 4),
        ("update/ratio_median", [0.5, 0.5], "learning rate", 2),
        ("update/ratio_median", [2.0], "learning rate", 1),
        ("stability/epsilon_ratio/w", [9.0, 9.0], "epsilon", 2),
        ("activation/dead/mlp", [1.0, 1.0], "dead layer", 2),
        ("grad/rms/w", [0.0, 0.0, 0.0], "dead layer", 3),
        ("output/collapse", [0.3, 0.3, 0.3], "softmax collapse", 3),
        ("output/log_z_mean", [-150.0, 1.0, -150.0, -150.0], "output logits", 4),
        ("train/loss", [1.0, math.nan], "divergence", 2),
        ("train/loss", [1.0] * 10 + [2.0] * 10, "divergence", 20),
    ],
)
def test_planted_series(key: str, values: list[float], name: str, first: int) -> None:
    found = raised({key: values})
    assert found and found[0].name == name and found[0].step == first and found[0].key == key
    assert found[0].suggestion and found[0].source and found[0].message
    assert found[0].to_json()["value"] == (None if math.isnan(found[0].value) else found[0].value)


def test_a_forecast_tells_when() -> None:
    """Logits that double every 20 steps from 4 reach 1e4 at step 226."""
    found = raised({"attention/max_logit": [4 * 2 ** (s / 20) for s in range(1, 150)]})
    assert found[0].severity == "warning" and found[0].lead is not None
    truth = 20 * math.log2(1e4 / 4)
    last = found[-1].lead
    assert last is not None and last.low - 2 <= truth <= last.high + 2
    assert "attention logits cross 10000 at about step" in found[-1].message


def test_an_early_peak_of_the_fisher_trace() -> None:
    """A peak of 10 times the start that falls again; a plain decrease is none."""
    s = np.arange(100.0)
    peaked = (1 + 9 * np.exp(-(((s - 20) / 8) ** 2))).tolist()
    found = raised({"curvature/fisher_trace": peaked})
    assert found and {a.name for a in found} == {"Fisher explosion"} and 20 < found[0].step < 60
    assert "at step 21" in found[-1].message
    assert raised({"curvature/fisher_trace": (1 + 9 * np.exp(-s / 20)).tolist()}) == []


def test_overflow_counts_skipped_steps_in_a_row() -> None:
    """A gradient scaler skips single steps to find its scale; three in a row are an alarm. Without one, one is."""
    losses = [1.0] * 6
    assert raised({"train/loss": losses, "grad/norm": [math.inf, 1, math.inf, math.inf, 1, 1]}, stepped=False) == []
    found = raised({"train/loss": losses, "grad/norm": [1, math.inf, math.inf, math.inf, 1, 1]}, stepped=False)
    assert [(a.name, a.step) for a in found] == [("overflow", 4)]
    assert [(a.name, a.step) for a in raised({"train/loss": losses, "grad/norm": [1, math.inf, 1, 1, 1, 1]})] == [
        ("overflow", 2)
    ]


def test_a_reading_that_did_not_come_raises_nothing() -> None:
    """An old reading beyond a limit is judged once, not at every later step."""
    history = History()
    rule = Limit(name="x", key="k", limit=1.0, message="{value}", suggestion="s", source="s")
    history.add(1, {"k": 2.0})
    assert len(list(rule(history, step(1)))) == 1
    history.add(2, {"train/loss": 1.0})
    assert list(rule(history, step(2))) == []


def test_histories_are_bounded_and_keep_the_recent_half() -> None:
    history = History()
    for s in range(3 * CAPACITY):
        history.add(s, {"k": float(s)})
    steps, values = history["k"]
    assert len(steps) <= CAPACITY and steps[0] == 0 and (steps == values).all() and (np.diff(steps) > 0).all()
    assert history.tail("k", 100) == [float(s) for s in range(3 * CAPACITY - 100, 3 * CAPACITY)]
