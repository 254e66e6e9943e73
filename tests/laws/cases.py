"""One generated world for every parametric law of the loss."""

import numpy as np

from tests.laws.contract import LawCase
from towtank.laws.loss import Chinchilla, OverTraining, Power, PowerFloor, Saturating
from towtank.laws.reward import AnnealedSize, ComputeSigmoid, PrunedData


def product(**axes):
    """All combinations; runs are the values of the first axis."""
    mesh = np.meshgrid(*axes.values(), indexing="ij")
    group = np.broadcast_to(np.arange(mesh[0].shape[0]).reshape(-1, *[1] * (len(axes) - 1)), mesh[0].shape)
    return {name: m.ravel() for name, m in zip(axes, mesh, strict=True)}, group.ravel()


def along(name, low, high, runs, points):
    """Runs of a few points each, spread over a decade or so of one variable: neighbours overlap."""
    start = np.geomspace(low, high, runs)
    x = (start[:, None] * np.geomspace(1, 3, points)).ravel()
    return {name: x}, np.repeat(np.arange(runs), points)


def case(law, truth, design, at, sd):
    x, group = design
    return LawCase(law=law, truth=truth, x=x, group=group, at=at, sd=sd)


CASES = [
    case(Power(), {"A": 12.0, "b": -0.08}, along("x", 1e6, 3e8, 16, 3), {"x": 3e9}, 0.003),
    case(PowerFloor(), {"E": 1.7, "A": 60.0, "b": 0.25}, along("x", 1e4, 1e9, 24, 3), {"x": 1e10}, 0.003),
    case(
        Saturating(), {"a": 30.0, "b": 2e5, "c": -0.3, "d": 0.2}, along("x", 1e4, 1e9, 30, 3), {"x": 1e10}, 0.003
    ),
    case(
        Chinchilla(), {"A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37, "E": 1.8},
        product(N=np.geomspace(4e7, 1.6e10, 40), D=np.geomspace(4e8, 3e11, 3)), {"N": 7e10, "D": 1.4e12}, 0.003,
    ),
    case(
        OverTraining(), {"a": 166.0, "beta": 367.0, "b": -0.273, "E": 1.84},
        product(N=np.geomspace(1e7, 1e9, 16), M=np.array([5.0, 20.0, 80.0, 320.0])), {"N": 7e9, "M": 20.0}, 0.003,
    ),
    case(
        ComputeSigmoid(), {"R0": 0.1, "A": 0.62, "Cmid": 2e3, "B": 0.9},
        along("C", 30, 6e4, 20, 3), {"C": 1e6}, 0.01,
    ),
    case(
        PrunedData(), {"E": 0.8, "A": 30.0, "beta": 0.3, "gamma": 0.12},
        product(D=np.geomspace(1e4, 1e7, 16), f=np.array([0.1, 0.25, 0.5, 1.0])), {"D": 1e8, "f": 0.3}, 0.003,
    ),
    case(
        AnnealedSize(), {"E": 1.9, "A": 0.5, "alpha": 0.5, "B": 120.0, "beta": 0.25, "C": 0.4},
        product(N=np.geomspace(1e7, 3e9, 20), S1=np.array([0.5, 2.0, 8.0]), S2=np.array([0.0, 0.5])),
        {"N": 2e10, "S1": 16.0, "S2": 0.5}, 0.003,
    ),
]  # fmt: skip
BY_NAME = {c.law.name: c for c in CASES}
