"""Sizes of tensors, their gradients and updates against arithmetic by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.state import fingerprint
from towtank.signals.step import CannotTell, Step
from towtank.signals.tensors import clipping, epsilon, tensors, top_singular


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **recorded: object) -> Step:
    return Step(number=1, loss=torch.zeros(()), model=model, optimizer=optimizer, recorded=recorded)


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rms_by_hand() -> None:
    model = nn.Linear(3, 2)
    x = seeded(4, 3)
    model(x).square().sum().backward()
    update = {n: 0.01 * seeded(*p.shape, seed=7) for n, p in model.named_parameters()}
    before = fingerprint(model)
    found = tensors()(step_of(model, torch.optim.SGD(model.parameters(), lr=0.1), updates=update))
    assert fingerprint(model) == before
    for n, p in model.named_parameters():
        for key, value in (("grad/rms", p.grad), ("parameter/rms", p), ("update/rms", update[n])):
            want = math.sqrt(float(value.detach().double().square().mean()))
            assert float(found[f"{key}/{n}"]) == pytest.approx(want, rel=1e-6)
    old = (model.weight - update["weight"]).detach().double()
    ratio = float(update["weight"].double().norm() / old.norm())
    for key in ("update/ratio/weight", "update/ratio_max", "update/ratio_median"):  # the bias is no matrix
        assert float(found[key]) == pytest.approx(ratio, rel=1e-6)


def test_half_precision_does_not_overflow() -> None:
    """Squares of 300 exceed the range of float16."""
    model = nn.Linear(2, 2, bias=False, dtype=torch.float16)
    with torch.no_grad():
        model.weight.fill_(300.0)
    assert float(tensors()(step_of(model))["parameter/rms/weight"]) == 300.0


def test_frozen_and_unused_parameters_are_left_out() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "frozen": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    model["frozen"].requires_grad_(False)
    model["used"](torch.ones(1, 2)).sum().backward()
    found = tensors()(step_of(model))
    assert "grad/rms/used.weight" in found and "grad/rms/unused.weight" not in found
    assert "parameter/rms/unused.weight" in found and "parameter/rms/frozen.weight" not in found


@pytest.mark.parametrize("steps", [1, 5])
def test_epsilon_is_judged_against_the_corrected_average(steps: int) -> None:
    """A constant gradient g: the corrected v is g^2, whatever the step."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), eps=1e-4)
    for _ in range(steps):
        model.weight.grad = torch.tensor([[3e-3, -4e-3]])
        optimizer.step()
    found = epsilon()(step_of(model, optimizer))
    want = math.sqrt((9e-6 + 16e-6) / 2) / 1e-4
    assert float(found["stability/epsilon_ratio"]) == pytest.approx(want, rel=1e-5)
    assert set(found) == {"stability/epsilon_ratio", "stability/epsilon_ratio/weight"}


def test_epsilon_names_the_worst_tensor_and_skips_the_dead() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.Adam(model.parameters(), eps=1e-8)
    for layer, size in zip(model, (1e-3, 1e-7, 0.0), strict=True):
        layer.weight.grad = torch.full((2, 2), size)
    optimizer.step()
    found = epsilon()(step_of(model, optimizer))
    assert float(found["stability/epsilon_ratio/1.weight"]) == pytest.approx(10.0, rel=1e-4)


def test_epsilon_needs_an_optimizer_that_has_one() -> None:
    model = nn.Linear(2, 1)
    for optimizer in (None, torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.Adam(model.parameters())):
        with pytest.raises(CannotTell, match="expected an optimizer"):
            epsilon()(step_of(model, optimizer))


def test_top_singular_value_comes_from_below_and_is_warm() -> None:
    model = nn.Sequential(nn.Linear(20, 30, bias=False), nn.Conv2d(3, 8, 3))
    kept: dict[str, object] = {}
    step = Step(number=1, loss=torch.zeros(()), model=model, kept=kept)
    exact = {
        n: float(torch.linalg.svdvals(p.detach().flatten(1).double())[0])
        for n, p in model.named_parameters()
        if p.ndim > 1
    }
    values: dict[str, list[float]] = {n: [] for n in exact}
    for _ in range(40):
        found = top_singular()(step)
        for n in exact:
            values[n].append(float(found[f"parameter/top_singular/{n}"]))
    for n, want in exact.items():
        assert all(v <= want * (1 + 1e-6) for v in values[n])  # |W v| of a unit v
        assert values[n][-1] == pytest.approx(want, rel=1e-3) and values[n][-1] >= values[n][0] - 1e-6
    assert set(found) == {f"parameter/top_singular/{n}" for n in exact}  # biases have none


def test_top_singular_value_of_a_zero_matrix() -> None:
    model = nn.Linear(3, 3, bias=False)
    nn.init.zeros_(model.weight)
    assert float(top_singular()(step_of(model))["parameter/top_singular/weight"]) == 0.0


def test_clipping() -> None:
    model = nn.Linear(3, 2)
    model(seeded(4, 3)).square().sum().backward()
    raw = {n: p.grad.norm() for n, p in model.named_parameters()}
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), 0.5))
    found = clipping()(step_of(model, raw_norms=raw))
    assert float(found["grad/norm_before_clip"]) == pytest.approx(norm, rel=1e-6)
    assert float(found["grad/clip_share"]) == pytest.approx(0.5 / norm, rel=1e-5)
