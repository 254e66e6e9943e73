"""The compiled step: one graph for every rule, equal to the eager one."""

from __future__ import annotations

import pytest
import torch

import towtank.optim as optim
from tests.optim.test_rules import NAMES, make, run, tensors
from towtank.optim import engine


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_step_equals_the_eager_one_in_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rule traces without a break, and neither the learning rate nor the step makes a second graph."""
    monkeypatch.setattr(engine, "backend", "eager")
    torch._dynamo.reset()
    engine._compiled.cache_clear()
    torch._dynamo.utils.counters.clear()
    walks = []
    for way in ("compile", "eager"):
        params = tensors(torch.float64)[:1]
        optimizer = make(name, params, engine=way, weight_decay=0.01, clip=0.5)
        for t in range(3):
            optimizer.param_groups[0]["lr"] *= 0.9
            run(optimizer, params, 1, start=t)
        walks.append(params)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"] and not torch._dynamo.utils.counters["recompiles"]
    for p, q in zip(*walks, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)  # float64, numbers in double as well


def test_inductor_compiles_a_step() -> None:
    (w,), (v,) = tensors()[:1], tensors()[:1]
    run(optim.Lion([w], lr=0.01, engine="compile"), [w], 3)
    run(optim.Lion([v], lr=0.01, engine="eager"), [v], 3)
    torch.testing.assert_close(w, v, rtol=1e-6, atol=1e-6)  # three roundings of numbers below 4
