"""Slices of the loss against quadratics, and directions against their definitions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests import worlds
from tests.state import fingerprint
from towtank.curvature.landscape import landscape
from towtank.problem import Problem

F64 = torch.float64


def network() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)).train()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=torch.Generator().manual_seed(p.numel()))
    x = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return Problem(model, F.cross_entropy, (x, torch.arange(6) % 2))


def direct(problem: Problem, theta: Tensor) -> float:
    parts = problem.unflatten(theta)
    model = problem.model.eval()
    out = torch.func.functional_call(model, parts, (problem.data[0],))
    model.train()
    return float(F.cross_entropy(out, problem.data[1]))


def theta(problem: Problem) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in problem.model.parameters()])


def test_eigenvectors_of_a_bowl_give_its_parabolas() -> None:
    world = worlds.quadratic_bowl(torch.tensor([5.0, 3.0, -1.0, 0.5], dtype=F64))
    found = landscape(world.model, world.loss, world.data, kind="eigen", dims=2, span=2.0, points=5)
    # Within 1e-2 |lambda| of an eigenvalue, as asked of the eigenvectors
    assert found.curvature == pytest.approx([5.0, 3.0], rel=1e-2)
    D, w = found.directions, world.model.weight.detach()[0]
    for i, b in enumerate(found.y):
        for j, a in enumerate(found.x):
            point = w + a * D[:, 0] + b * D[:, 1]
            assert found.loss[i][j] == pytest.approx(float(point @ world.hessian @ point) / 2, rel=1e-12)
    assert found.centre == pytest.approx(found.loss[2][2], rel=1e-12)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("kind", ["filter", "random"])
def test_every_point_is_the_loss_there(kind: str, dims: int) -> None:
    problem = network()
    found = landscape(problem, kind=kind, dims=dims, points=3, span=0.5, generator=1)
    assert len(found.loss) == (3 if dims == 2 else 1) and found.x == (-0.5, 0.0, 0.5)
    for i, b in enumerate(found.y or (0.0,)):
        for j, a in enumerate(found.x):
            moved = theta(problem) + a * found.directions[:, 0] + (b * found.directions[:, 1] if dims == 2 else 0)
            assert found.loss[i][j] == pytest.approx(
                direct(problem, moved), rel=1e-5
            )  # float32, summed in another order


def test_filters_are_as_long_as_the_weights_and_biases_stay() -> None:
    problem = network()
    d = problem.unflatten(landscape(problem, points=2).directions[:, 0])
    for name, p in problem.model.named_parameters():
        if p.ndim < 2:
            assert not d[name].any(), name
        else:
            assert torch.allclose(d[name].flatten(1).norm(dim=1), p.flatten(1).norm(dim=1)), name
    whole = landscape(problem, points=2, kind="random").directions[:, 0]
    weights = torch.cat([p.detach().flatten() for p in problem.model.parameters() if p.ndim > 1])
    assert float(whole.norm()) == pytest.approx(float(weights.norm()), rel=1e-6)


def test_a_trajectory_in_a_plane_is_drawn_true() -> None:
    problem = network()
    centre, plane = theta(problem), torch.randn(2, problem.size, generator=torch.Generator().manual_seed(2))
    where = torch.tensor([[3.0, 0.5], [2.0, -0.5], [1.0, 0.2], [0.0, 0.0]])
    states = [{n: t.clone() for n, t in problem.unflatten(centre + s @ plane).items()} for s in where]
    found = landscape(problem, kind="trajectory", dims=2, points=3, checkpoints=states)
    path = torch.tensor(found.path)
    assert torch.allclose(
        torch.cdist(path, path).float(), torch.cdist(where @ plane, where @ plane), rtol=1e-4, atol=1e-3
    )
    assert sum(found.explained) == pytest.approx(1.0, abs=1e-6)
    assert max(map(abs, path.flatten().tolist())) < found.x[-1]
    with pytest.raises(ValueError, match="span 2"):
        landscape(problem, kind="trajectory", dims=2, checkpoints=states[:1])
    with pytest.raises(ValueError, match="without 0.weight"):
        landscape(problem, kind="trajectory", checkpoints=[{}])


def test_losses_that_are_not_finite_are_data() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    found = landscape(model, lambda z, y: z.log().mean(), (torch.ones(1, 1), torch.ones(1, 1)), span=2, points=3)
    assert math.isnan(found.loss[0][0]) or math.isnan(found.loss[0][2])
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert None in plain["loss"][0] and plain["centre"] == 0.0
    json.loads(found.figure().to_json())


def test_figures_hold_the_numbers() -> None:
    problem = network()
    line = landscape(problem, points=3)
    assert tuple(line.figure().data[0].y) == line.loss[0]
    plane = landscape(problem, points=3, dims=2)
    z = torch.tensor(plane.figure().data[0].z)
    loss = torch.tensor(plane.loss)
    logs = float(loss.max()) > 30 * float(loss.min())
    assert torch.allclose(z, loss.log10() if logs else loss)


def test_the_seed_decides_and_nothing_is_changed() -> None:
    problem = network()
    before = fingerprint(problem.model)
    a, b, c = (landscape(problem, dims=2, points=2, generator=s).loss for s in (0, 0, 1))
    landscape(problem, kind="eigen", points=2)
    assert a == b != c
    assert fingerprint(problem.model) == before


def test_bad_input() -> None:
    problem = network()
    for given in (
        {"kind": "straight"},
        {"dims": 3},
        {"points": 1},
        {"span": 0.0},
        {"span": math.nan},
        {"kind": "trajectory"},
    ):
        with pytest.raises(ValueError, match="expected"):
            landscape(problem, **given)
    with pytest.raises(ValueError, match="only biases"):
        landscape(problem.restrict(["0.bias"]))
