"""The probe batch in parts gives the loss and curvature of the whole, and takes less memory to measure."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from towtank.curvature import Hessian
from towtank.problem import Problem
from towtank.signals.probe_batch import PARTS, probe_data


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, generator=g, dtype=torch.float64), torch.randint(4, (count,), generator=g)


@pytest.mark.parametrize("count", [2, 5, 8, 11])
def test_parts_are_the_batch(count: int) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    whole = batch(count)
    parts = probe_data(whole, model, train=True, given=False)
    assert isinstance(parts, list) and len(parts) <= PARTS
    assert torch.equal(torch.cat([x for x, _ in parts]), whole[0])
    assert max(len(x) for x, _ in parts) == -(-count // PARTS)
    a, b = (Problem(model, F.cross_entropy, data, checks=False) for data in (whole, parts))
    torch.testing.assert_close(Hessian(b).dense(), Hessian(a).dense(), rtol=1e-10, atol=1e-12)


def test_padded_tokens_keep_their_weights() -> None:
    model = nn.Embedding(6, 4)
    tokens = torch.arange(8).remainder(6).view(4, 2)
    labels = torch.tensor([[1, -100], [-100, -100], [2, 3], [0, -100]])
    parts = probe_data((tokens, labels), model, train=True, given=False)
    loss = lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())  # noqa: E731
    values = [Problem(model, loss, data, checks=False).value() for data in ((tokens, labels), parts)]
    assert values[1] == pytest.approx(values[0], rel=1e-6)


def test_coupled_examples_stay_together() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    whole = batch(64)
    quarter = probe_data(whole, model, train=True, given=False)
    assert len(quarter[0]) == 16 and torch.equal(quarter[0], whole[0][:16])
    assert len(probe_data(whole, model, train=True, given=True)[0]) == 64  # the user's choice
    assert len(probe_data(whole, model, train=False, given=False)) == PARTS


def test_it_is_a_copy_and_iterables_are_left_alone() -> None:
    whole = batch(4)
    parts = probe_data({"x": whole[0], "labels": whole[1]}, nn.Linear(3, 4), train=True, given=True)
    kept = parts[0]["x"].clone()
    whole[0].zero_()
    assert torch.equal(parts[0]["x"], kept)
    source = [batch(2), batch(3)]
    assert probe_data(source, nn.Linear(3, 4), train=True, given=True) is source
