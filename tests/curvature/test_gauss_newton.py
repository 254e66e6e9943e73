"""Gauss-Newton products against J^T H J put together row by row in float64."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.curvature import dense
from tests.curvature.cases import BY_NAME, CASES, Case, per_token, tokens
from tests.curvature.reference import doubled, in_float64
from tests.state import fingerprint
from towtank.curvature import output_matrix
from towtank.curvature.fisher import Fisher
from towtank.curvature.gauss_newton import GaussNewton
from towtank.linalg.trace import trace
from towtank.problem import Problem


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


def directions(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(size, count, generator=torch.Generator().manual_seed(3))


def made(name: str, **options) -> Problem:
    model, loss, batch = dense.wide(BY_NAME[name])
    return Problem(model, loss, batch, **options)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_products_of_every_layer(case: Case):
    model, loss, batch = case.make()
    before = fingerprint(model)
    problem = Problem(model, loss, batch, **case.options)
    V, wanted = directions(problem.size), dense.of_case(case)
    for retain in (True, False):
        G = GaussNewton(problem, retain=retain)
        assert G.semidefinite
        assert relative(G @ V, wanted @ V.double()) < 1e-5  # the gate in float32
        assert relative(G @ V[:, 0], wanted @ V[:, 0].double()) < 1e-5
    assert fingerprint(model) == before

    for retain in (True, False):
        G = GaussNewton(Problem(in_float64(model), loss, doubled(batch), **case.options), retain=retain)
        assert relative(G @ V.double(), wanted @ V.double()) < 1e-10  # the gate in float64


def test_a_loss_that_is_not_convex_is_said_and_right():
    model, _, batch = dense.wide(BY_NAME["squared"])
    loss = lambda z, t: ((z - t).square() - 1).square().mean()  # noqa: E731
    G = GaussNewton(Problem(model, loss, batch))
    wanted = dense.gauss_newton(model(batch[0]), lambda z: loss(z, batch[1]), list(model.parameters()))
    assert torch.linalg.eigvalsh(wanted)[0] < -1e-3
    assert not G.semidefinite and "indefinite" in G.convention
    assert relative(G.dense(), wanted) < 1e-12
    assert G.exact_diagonal() is None
    assert_unbiased(G.trace_samples(400, 0)[0], wanted.trace())


def test_a_loss_of_no_known_form_is_right():
    model, _, batch = dense.wide(BY_NAME["tanh"])
    loss = lambda z, t: F.cross_entropy(z, t) + 0.1 * z.logsumexp(-1).square().mean()  # noqa: E731
    wanted = dense.gauss_newton(model(batch[0]), lambda z: loss(z, batch[1]), list(model.parameters()))
    for retain in (True, False):
        assert relative(GaussNewton(Problem(model, loss, batch), retain=retain).dense(), wanted) < 1e-12


@pytest.mark.parametrize("name, cuts", [("tanh", (1, 4, 6)), ("squared", (2, 6)), ("silu", (5, 6))])
def test_ragged_batches_give_the_same_matrix(name, cuts):
    problem = made(name)
    x, y = problem.data
    ragged = [(x[a:b], y[a:b]) for a, b in zip((0, *cuts), cuts)]
    split = problem.replace(data=ragged[::-1])
    whole = GaussNewton(problem)
    V = directions(problem.size).double()
    for options in ({"retain": True}, {"retain": False}, {"budget": 1500.0}):
        assert relative(GaussNewton(split, **options) @ V, whole @ V) < 1e-13  # sums of 6 terms in another order


def test_padded_tokens_count_for_nothing():
    model, loss, (ids, targets) = dense.wide(BY_NAME["embedding"])
    masked = targets.clone()
    masked[0, 2:], masked[2, :5] = -100, -100
    problem = Problem(model, per_token, [(ids[:1], masked[:1]), (ids[1:], masked[1:])])
    kept = masked.flatten() != -100
    outputs = model(ids).flatten(0, 1)[kept]
    wanted = dense.gauss_newton(outputs, lambda z: F.cross_entropy(z, masked.flatten()[kept]), list(model.parameters()))
    assert relative(GaussNewton(problem).dense(), wanted) < 1e-12


def test_blocks_of_tokens_equal_the_whole(monkeypatch):
    problem = made("tied")
    whole = GaussNewton(problem).dense()
    monkeypatch.setattr(output_matrix, "CHUNK", 30)  # 18 tokens of 11 classes in 9 blocks
    assert torch.equal(GaussNewton(problem).dense(), whole)


def test_restriction_is_the_block():
    problem = made("tied")
    G = GaussNewton(problem)
    block = G.restrict(["embedding.weight"])
    at = problem.slices["embedding.weight"]
    assert block.shape == (44, 44) and isinstance(block, GaussNewton)
    assert relative(block.dense(), G.dense()[at, at]) < 1e-13
    assert relative(G.restrict([3, 1]).dense(), G.dense()[[3, 1]][:, [3, 1]]) < 1e-13


def test_parameters_that_move_are_seen():
    problem = made("tanh")
    for retain in (True, False):
        G = GaussNewton(problem, retain=retain)
        _ = G @ torch.ones(problem.size)
        with torch.no_grad():
            problem.model[0].weight.mul_(1.1)
        x, y = problem.data
        wanted = dense.gauss_newton(
            problem.model(x), lambda z, y=y: F.cross_entropy(z, y), list(problem.model.parameters())
        )
        assert relative(G.dense(), wanted) < 1e-12


def assert_unbiased(samples: torch.Tensor, wanted: torch.Tensor):
    """The mean within 4 standard errors: a chance of 6e-5 that a right estimator fails, were the seed not fixed."""
    stderr = samples.std() / len(samples) ** 0.5
    assert (samples.mean() - wanted).abs() < 4 * stderr
    assert stderr < 0.1 * wanted.abs()  # else the test would see nothing


@pytest.mark.parametrize("name", ["tanh", "squared", "silu", "embedding"])
def test_trace_samples_are_unbiased(name):
    wanted = dense.of_case(BY_NAME[name])
    model, loss, batch = BY_NAME[name].make()
    samples, cost = GaussNewton(Problem(model, loss, batch)).trace_samples(400, torch.Generator().manual_seed(1))
    assert samples.dtype == torch.float64 and samples.shape == (400,) and cost < 1
    assert_unbiased(samples, wanted.trace())


def test_trace_samples_vary_as_theory_says():
    """Signs e of one example: |J^T (D^1/2 - p sqrt(p)^T) e|^2, D = diag(p), summed over the eight e there are."""
    model, loss, (x, y) = dense.wide(BY_NAME["linear"])
    problem = Problem(model, loss, (x[:1], y[:1]))
    p, size = model(x[:1]).softmax(-1).detach()[0], x[0].square().sum() + 1  # weights see |x|^2, the bias 1
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=p.dtype)
    values = size * (signs @ (p.sqrt().diag() - torch.outer(p.sqrt(), p))).square().sum(-1)
    mean, variance = values.mean(), values.var(correction=0)
    samples = GaussNewton(problem).trace_samples(1000, 0)[0]
    torch.testing.assert_close(GaussNewton(problem).dense().trace(), mean)
    assert (samples.mean() - mean).abs() < 4 * (variance / 1000) ** 0.5
    fourth = (values - mean).pow(4).mean()
    assert (samples.var() - variance).abs() < 4 * ((fourth - variance**2) / 1000) ** 0.5


@pytest.mark.parametrize("confidence", [9.2, 12.0, 40.0])  # p = 0.999, 0.99995, 1 - 4e-17
def test_the_trace_of_a_model_that_is_sure_is_honest(confidence):
    """Drawn labels would miss rare classes in nearly every draw, and agree on a trace that is far too small."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(64, 8, generator=generator), torch.randint(10, (64,), generator=generator)
    model = nn.Linear(8, 10, bias=False)
    nn.init.zeros_(model.weight)
    sure = confidence * F.one_hot(labels, 10)
    forward = lambda m, batch: m(batch[0]) + sure  # noqa: E731
    others = 9 * torch.exp(torch.tensor(-confidence, dtype=torch.float64))
    rare = others / 9 / (1 + others)
    top = others / (1 + others)  # 1 - p of the sure class
    terms = top * (1 - top) + 9 * rare * (1 - rare)  # sum of p (1 - p)
    truth = float(terms * x.double().square().sum(1).mean())
    fisher = Fisher(Problem(model, F.cross_entropy, (x, labels), forward=forward))
    found = [trace(fisher, rtol=0.05, generator=seed) for seed in range(25)]
    within = sum(abs(e.value - truth) <= 2 * e.stderr for e in found)
    assert all(e.converged for e in found) and within >= 19  # 95 % of 25: fewer with probability 1e-3
    assert sum(e.products for e in found) < 25 * 20


@pytest.mark.parametrize("name", ["tanh", "squared", "conv2d", "batchnorm_train", "tied"])
def test_the_exact_diagonal_is_exact(name):
    case = BY_NAME[name]
    model, loss, batch = case.make()
    found, cost = GaussNewton(Problem(model, loss, batch, **case.options)).exact_diagonal()
    assert cost > 0
    # each entry is a sum of squares, so nothing cancels: the error is that of J in float32
    torch.testing.assert_close(found.double(), dense.of_case(case).diagonal(), rtol=1e-4, atol=1e-9)


def test_the_exact_diagonal_over_ragged_batches():
    problem = made("tanh")
    x, y = problem.data
    split = problem.replace(data=[(x[:4], y[:4]), (x[4:], y[4:])])
    torch.testing.assert_close(GaussNewton(split).exact_diagonal()[0], GaussNewton(problem).dense().diagonal())


def test_nothing_is_left_behind():
    problem = made("softmax_attention")
    for retain in (True, False):
        gc.collect()
        gc.disable()  # a reference cycle would now stay
        try:
            G = GaussNewton(problem, retain=retain)
            _ = G @ torch.ones(problem.size)
            seen = []
            G._sandwich.each(lambda j, m, seen=seen: seen.append(weakref.ref(j.graph)))
            assert seen[0]() is not None if retain else seen[0]() is None
            del G
            assert seen[0]() is None
        finally:
            gc.enable()
    assert all(p.grad is None for p in problem.model.parameters())


def test_convolutions_are_differentiated_by_duals_and_attention_by_a_tape():
    for name, way in (("conv2d", "dual"), ("softmax_attention", "tape")):
        G = GaussNewton(made(name), retain=True)
        _ = G @ torch.ones(G.shape[0])
        assert set(G._sandwich.jacobians._ways.values()) == {way}


class NoTangent(torch.autograd.Function):
    """Doubles; with a second derivative, without a forward one."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


class Wrong(torch.autograd.Function):
    """A forward derivative that is not that of the backward pass, and a backward pass that cannot be derived."""

    @staticmethod
    def forward(x):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad

    @staticmethod
    def jvp(ctx, tangent):
        return 3 * ctx.saved_tensors[0] * tangent


class Through(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.inner, self.function = nn.Linear(5, 3), function

    def forward(self, x):
        return self.function.apply(self.inner(x))


def test_the_other_way_is_taken_where_one_is_missing():
    model = Through(NoTangent).double()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    G = GaussNewton(Problem(model, F.cross_entropy, (x, y)), retain=False)
    wanted = dense.gauss_newton(2 * model.inner(x), lambda z: F.cross_entropy(z, y), list(model.parameters()))
    assert relative(G.dense(), wanted) < 1e-12


def test_a_wrong_derivative_is_found_out():
    problem = Problem(Through(Wrong), F.cross_entropy, (torch.randn(4, 5), torch.tensor([0, 1, 2, 0])))
    for retain in (True, False):
        with pytest.raises(NotImplementedError, match="neither a second derivative nor a forward one"):
            _ = GaussNewton(problem, retain=retain) @ torch.ones(problem.size)


def test_bad_input_is_named():
    model, loss, batch = BY_NAME["tanh"].make()
    with pytest.raises(TypeError, match="one floating-point tensor"):
        GaussNewton(Problem(model, lambda z, t: loss(z[0], t), batch, forward=lambda m, b: (m(b[0]), 1)))
    with pytest.raises(ValueError, match="linear"):
        GaussNewton(Problem(nn.Sequential(model, nn.LogSoftmax(-1)), F.nll_loss, batch))
    with pytest.raises(ValueError, match="depend on the parameters"):
        GaussNewton(Problem(model, loss, batch, forward=lambda m, b: m(b[0]).detach()))
    with pytest.raises(ValueError, match="finite"):
        GaussNewton(Problem(model, loss, (batch[0] * torch.nan, batch[1])))
    with pytest.raises(ValueError, match="retain"):
        GaussNewton(Problem(model, loss, batch), retain="often")


def test_a_large_vocabulary():
    ids, _ = tokens()
    model = nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 5000))
    G = GaussNewton(Problem(model, per_token, (ids, ids)))
    v = torch.randn(G.shape[0], generator=torch.Generator().manual_seed(0))
    z = model(ids)
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        duals = {
            n: torch.autograd.forward_ad.make_dual(p.detach(), v[G.slices[n]].view_as(p))
            for n, p in model.named_parameters()
        }
        tangent = torch.autograd.forward_ad.unpack_dual(torch.func.functional_call(model, duals, (ids,))).tangent
    p = z.detach().softmax(-1)
    u = p * (tangent - (p * tangent).sum(-1, keepdim=True)) / ids.numel()
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(z, list(model.parameters()), u)])
    assert relative(G @ v, wanted.double()) < 1e-5
