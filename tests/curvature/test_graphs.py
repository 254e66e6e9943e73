"""Graphs that are kept: how many, for how long, and that nothing of them is left."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.curvature.test_problem import drawn, network
from tests.state import fingerprint
from towtank.curvature.gradient_graph import GradientGraph
from towtank.curvature.hessian import Hessian
from towtank.curvature.products import graph_bytes
from towtank.problem import Problem


def problem_of(model: nn.Module, parts: int = 3) -> Problem:
    x, y = drawn()
    return Problem(model, F.cross_entropy, list(zip(x.chunk(parts), y.chunk(parts))))


def fresh(problem: Problem) -> torch.Tensor:
    """The matrix, by graphs made for it alone."""
    return Hessian(problem, retain=False, check=False).dense()


def test_graphs_are_kept_within_the_budget():
    problem = problem_of(network(nn.Tanh()))
    want = fresh(problem)
    every = Hessian(problem, retain=True, check=False)
    every.dense()
    sizes = [graph_bytes(graph.roots) for graph in every.graphs._kept.values()]
    for budget, kept in ((0, 0), (sizes[0], 1), (sum(sizes), 3), (None, 3)):
        H = Hessian(problem, budget=budget, check=False)
        for _ in range(2):  # built, and again from what was kept
            assert torch.allclose(H.dense(), want, rtol=1e-5, atol=1e-7)
            assert H.graphs.kept == kept
        H.release()
        assert H.graphs.kept == 0
    assert Hessian(problem, retain=False).graphs.kept == 0
    with pytest.raises(ValueError, match="retain"):
        Hessian(problem, retain="yes")


def test_kept_graphs_read_no_data():
    class Once(list):
        reads = 0

        def __iter__(self):
            self.reads += 1
            return super().__iter__()

    x, y = drawn()
    data = Once(zip(x.chunk(3), y.chunk(3)))
    H = Hessian(Problem(network(nn.Tanh()), F.cross_entropy, data))
    H @ torch.ones(H.shape[0])
    reads = data.reads
    H @ torch.ones(H.shape[0])
    assert data.reads == reads


def changes(model: nn.Module):
    yield lambda: nn.init.normal_(model[0].weight)
    yield lambda: model[0].weight.data.mul_(2)  # invisible to the version counter
    yield lambda: setattr(model[2], "weight", nn.Parameter(torch.randn(3, 4)))

    def step():
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        x, y = drawn()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    yield step


def test_graphs_are_rebuilt_when_parameters_move():
    model = network(nn.Tanh())
    problem = problem_of(model)
    H = Hessian(problem, retain=True)
    before = H.dense()
    for change in changes(model):
        change()
        now = H.dense()
        assert torch.allclose(now, fresh(problem), rtol=1e-5, atol=1e-7)
        assert not torch.allclose(now, before, rtol=1e-3)
        before = now


def test_memory_returns_without_the_garbage_collector():
    released: list[str] = []

    class Tracked(torch.autograd.Function):
        """Identity whose graph nodes tell when they die."""

        @staticmethod
        def forward(ctx, x):
            weakref.finalize(ctx, released.append, "node")
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g.clone()

    class Layer(nn.Module):
        def forward(self, x):
            return Tracked.apply(x)

    model = network(Layer(), nn.Tanh())
    problem = problem_of(model)
    gc.collect()
    gc.disable()
    try:
        H = Hessian(problem, retain=True, check=False)
        released.clear()  # those of the first look at the data
        H @ torch.ones(H.shape[0])
        alive = weakref.ref(H)
        assert released == []
        H.release()
        assert len(released) == 3  # one a batch
        H @ torch.ones(H.shape[0])
        del H
        assert alive() is None and len(released) == 6
        Hessian(problem, retain=False, check=False) @ torch.ones(problem.size)
        assert len(released) == 9
        Hessian(problem) @ torch.ones(problem.size)
        assert len(released) > 12  # the self-check's too
        assert all(p.grad is None for p in model.parameters())
    finally:
        gc.enable()


def test_state_is_untouched_by_products_blocks_and_restrictions():
    model = network(nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3)).train()
    optimizer = torch.optim.Adam(model.parameters())
    before = fingerprint(model, optimizer)
    for options in ({}, {"retain": False}, {"method": "finite_difference"}):
        H = Hessian(problem_of(model), **options)
        H @ torch.ones(H.shape[0])
        H @ torch.ones(H.shape[0], 3)
        H.restrict(["0.weight"]) @ torch.ones(20)
        assert fingerprint(model, optimizer) == before
        with torch.inference_mode():
            H @ torch.ones(H.shape[0])
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            again = H @ torch.ones(H.shape[0])
        assert torch.allclose(again, H @ torch.ones(H.shape[0]), rtol=1e-6)
        assert fingerprint(model, optimizer) == before


def test_blocks_are_products_one_by_one():
    small = problem_of(network(nn.LayerNorm(4), nn.GELU()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        large = nn.Sequential(nn.Linear(200, 300), nn.LayerNorm(300), nn.GELU(), nn.Linear(300, 3))
        big = Problem(large, F.cross_entropy, (torch.randn(300, 200), torch.randint(3, (300,))))
    for problem, batched in ((small, True), (big, False)):
        H = Hessian(problem, retain=True)
        V = torch.randn(problem.size, 3, generator=torch.Generator().manual_seed(0))
        block = H @ V
        assert {graph._small for graph in H.graphs._kept.values()} == {batched}  # both ways are taken
        for k in range(3):
            assert (block[:, k] - H @ V[:, k]).norm() <= 1e-6 * block[:, k].norm()
    empty = H @ V[:, :0]
    assert empty.shape == (big.size, 0)


def test_parts_of_a_graph_are_counted_once():
    x = torch.randn(8, 5)
    w, b = torch.randn(4, 5, requires_grad=True), torch.zeros(4, requires_grad=True)
    y = torch.tanh(F.linear(x, w, b))  # keeps its output (8, 4), and the input (8, 5); the weight is not needed
    assert graph_bytes([y, -y]) == 4 * (8 * 4 + 8 * 5)
    assert graph_bytes([x]) == 0


def test_graphs_of_linear_functions_give_zero():
    x = torch.ones(3, requires_grad=True)
    assert torch.equal(GradientGraph(x.sum(), [x]).product(torch.ones(3)), torch.zeros(3))
    with pytest.raises(ValueError, match="depends on the parameters"):
        GradientGraph(torch.tensor(1.0), [x])
