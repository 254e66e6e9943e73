"""What an optimizer refuses, in one clear line."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import towtank.optim as optim


def test_sparse_gradients_are_refused_with_the_remedy_before_anything_moves() -> None:
    embedding, w = nn.Embedding(5, 3, sparse=True), nn.Parameter(torch.ones(2))
    for options in ({}, {"clip": 1.0}, {"nonfinite": "skip"}):
        optimizer = optim.Lion([("w", w), ("table", embedding.weight)], **options)
        embedding(torch.tensor([1])).sum().backward()
        w.grad = torch.ones(2)
        with pytest.raises(TypeError, match=r"table: expected a dense gradient.*sparse=False"):
            optimizer.step()
        assert (w == 1).all() and not optimizer.state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, r"lr = -0\.1: expected a finite number >= 0"),
        ({"lr": math.nan}, "lr = nan: expected a finite number"),
        ({"lr": torch.tensor(math.inf)}, "lr = .*: expected a finite number"),
        ({"weight_decay": -1.0}, "weight_decay = -1.0"),
        ({"betas": (0.9, 1.0)}, r"betas = \(0.9, 1.0\): expected numbers in \[0, 1\)"),
        ({"variant": "mine"}, "Lion: variant = 'mine': expected one of paper"),
        ({"engine": "fast"}, "engine = 'fast': expected one of auto, native, eager, compile"),
        ({"decay": "strong"}, "decay = 'strong': expected one of decoupled, independent, coupled"),
        ({"rounding": "up"}, "rounding = 'up': expected one of nearest, stochastic, compensated"),
        ({"nonfinite": "ignore"}, "nonfinite = 'ignore': expected one of raise, skip"),
        ({"clip": 0.0}, "clip = 0.0: expected a positive number, or None"),
        ({"clip_each": math.nan}, "clip_each = nan: expected a positive number"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optim.Lion([nn.Parameter(torch.ones(2))], **options)


def test_bad_groups_are_refused_and_not_kept() -> None:
    optimizer = optim.Lion([nn.Parameter(torch.ones(2))])
    for options, message in (({"role": "body"}, "role = 'body': expected one of embedding"), ({"lr": -1.0}, "lr = -1")):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **options})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="adamp decays by itself"):
        optim.AdamP([nn.Parameter(torch.ones(2))], decay="independent")
    with pytest.raises(TypeError, match="differentiable"):
        optim.Lion([nn.Parameter(torch.ones(2))], differentiable=True)
    with pytest.raises(TypeError, match="at most 2 numbers"):
        optim.Lion([nn.Parameter(torch.ones(2))], 0.1, (0.9, 0.99), 3)
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="no parameter is called 'v'"):
        optim.SophiaH([("w", p)]).observe_curvature({"v": torch.ones(2)})
