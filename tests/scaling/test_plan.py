"""The table of muP against the published rules, written out here as exponents of the width."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from towtank.scaling import plan as plans
from towtank.train.cells import build_ensemble
from towtank.train.models.cnn import CNN
from towtank.train.models.gpt import GPT
from towtank.train.models.mlp import MLP

# Yang et al. 2022, table 8, Adam column: exponent of the width in (init std, learning rate, forward multiplier).
TABLE_8 = {
    "embedding": (0.0, 0.0, 0.0),
    "matrix": (-0.5, -1.0, 0.0),
    "head": (0.0, 0.0, -1.0),
    "vector": (0.0, 0.0, 0.0),
}
DRAWN = {"embedding": -0.5, "matrix": -0.5, "head": -0.5, "vector": 0.0}  # exponent the models here draw with


@pytest.mark.parametrize("width", [32, 64, 512])
@pytest.mark.parametrize("role", sorted(TABLE_8))
def test_exponents_of_table_8(role: str, width: int) -> None:
    base = 32
    shape = {"embedding": (256, width), "matrix": (4 * width, width), "head": (256, width), "vector": (width,)}[role]
    small = {"embedding": (256, base), "matrix": (4 * base, base), "head": (256, base), "vector": (base,)}[role]
    m = plans.multipliers("mup", role, shape, small)
    init, rate, forward = TABLE_8[role]
    ratio = width / base
    assert m.init * ratio ** DRAWN[role] == pytest.approx(ratio**init)
    assert m.lr == pytest.approx(ratio**rate)
    assert m.forward == pytest.approx(ratio**forward)
    assert m.weight_decay == 1


def test_standard_parametrization_multiplies_by_one() -> None:
    for role, shape in (("matrix", (64, 64)), ("vector", (8,))):
        assert plans.multipliers("sp", role, shape, (4,) * len(shape)) == plans.Multipliers()


def test_coupled_decay_keeps_rate_times_decay() -> None:
    m = plans.multipliers("mup", "matrix", (128, 128), (32, 32), decay="coupled")
    assert m.lr * m.weight_decay == pytest.approx(1)


def test_first_layer_of_an_mlp_keeps_its_rate() -> None:
    """Its fan-in is the data's, not the width's: an input weight in the table's terms."""
    table = plan_of(MLP(inputs=6, width=64, outputs=3), MLP(inputs=6, width=16, outputs=3))
    assert table["layers.0.weight"].lr == 1
    assert table["layers.1.weight"].lr == 0.25
    assert table["head.weight"].forward == 0.25


def plan_of(model: nn.Module, base: nn.Module) -> plans.Plan:
    return plans.plan("mup", plans.shapes(model), plans.shapes(base), plans.roles(model), decay="independent")


def test_roles_of_the_models() -> None:
    gpt = plans.roles(GPT(width=32, depth=1))
    assert gpt["embedding.weight"] == "embedding" and gpt["head.weight"] == "head"
    assert gpt["blocks.0.attention.qkv.weight"] == "matrix" and gpt["norm.weight"] == "vector"
    cnn = plans.roles(CNN(channels=1, width=8, outputs=2))
    assert cnn["convolutions.0.weight"] == "matrix" and cnn["head.bias"] == "vector"


def test_models_of_other_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks\.1"):
        plan_of(GPT(width=64, depth=2), GPT(width=32, depth=1))
    with pytest.raises(ValueError, match="sp | mup"):
        plans.multipliers("ntk", "matrix", (2, 2), (2, 2))
    with pytest.raises(ValueError, match="rank"):
        plans.multipliers("mup", "matrix", (2, 2), (2,))


def test_a_model_drawn_otherwise_is_refused_not_mistaken() -> None:
    torch.manual_seed(0)
    wide, narrow = GPT(width=128), GPT(width=32)
    plans.require_comparable(wide, narrow, plans.roles(wide))
    nn.init.normal_(wide.embedding.weight)  # torch's own default: does not fall with width
    with pytest.raises(ValueError, match=r"embedding\.weight"):
        plans.require_comparable(wide, narrow, plans.roles(wide))


def test_output_of_mup_at_initialization_shrinks_with_width() -> None:
    """Coordinate check at step 0: logits ~ 1/m x sqrt(fan_in) x const std = m^-1/2 under muP, constant under SP."""
    cell = {"task": "tests.problems:gpt_task", "lr": 1e-3, "steps": 1, "warmup": 0.0}
    rms: dict[str, list[float]] = {"sp": [], "mup": []}
    for kind, values in rms.items():
        for width in (16, 64, 256):
            ensemble, _ = build_ensemble(
                [{**cell, "width": width, "parametrization": kind, "base_width": 16, "seed": 0}]
            )
            model = ensemble.task.model
            parameters = {n: p[0] * ensemble.plan[n].forward for n, p in ensemble.params.items()}
            tokens = ensemble.task.data.batch(0, 0)[0]
            values.append(torch.func.functional_call(model, parameters, (tokens,)).square().mean().sqrt().item())
    slopes = {k: math.log2(v[-1] / v[0]) / 4 for k, v in rms.items()}
    assert slopes["sp"] == pytest.approx(0, abs=0.1)
    assert slopes["mup"] == pytest.approx(-0.5, abs=0.1)


def test_the_size_key_need_not_be_called_width() -> None:
    cell = {"lr": 1e-2, "steps": 1, "parametrization": "mup", "base_width": 16}
    named = build_ensemble([{**cell, "task": "tests.problems:gpt_task", "width": 32}])[0].plan
    other = build_ensemble([{**cell, "task": "tests.problems:renamed_size_task", "dim": 32, "size_key": "dim"}])[0].plan
    assert other == named and any(m.lr == 0.5 for m in other.values())
    with pytest.raises(ValueError, match="size_key = 'width'"):
        build_ensemble([{**cell, "task": "tests.problems:renamed_size_task", "dim": 32}])


class Tied(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, width)
        self.head = nn.Linear(width, 9, bias=False)
        self.head.weight = self.embedding.weight


class Positions(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(12, width))
        self.head = nn.Linear(width, 9)


class Unnamed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.readout = nn.Linear(width, 9)


@pytest.mark.parametrize(
    ("kind", "message"), [(Tied, "tied"), (Positions, "positions: .*fan-out"), (Unnamed, "Task.head")]
)
def test_models_whose_roles_cannot_be_told_are_refused(kind: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_of(kind(64), kind(16))
