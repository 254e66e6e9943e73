"""Fisher matrices against sums of outer products of single gradients in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.curvature import dense
from tests.curvature.cases import BY_NAME, per_token
from tests.state import fingerprint
from towtank.curvature.fisher import Fisher
from towtank.curvature.gauss_newton import GaussNewton
from towtank.problem import Problem


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


def made(name: str, **options) -> Problem:
    model, loss, batch = dense.wide(BY_NAME[name])
    return Problem(model, loss, batch, **options)


def outer(losses: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """Mean of g g^T over terms, each differentiated by itself."""
    total = 0
    for term in losses:
        g = torch.cat([p.flatten() for p in torch.autograd.grad(term, parameters, retain_graph=True)])
        total = total + torch.outer(g, g) / len(losses)
    return total


def logistic() -> tuple[Problem, Tensor, Tensor]:
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
    y = (x[:, :1] > 0).double()
    return Problem(model, F.binary_cross_entropy_with_logits, (x, y)), x, (x @ model.weight.detach().T).sigmoid()


def test_logistic_regression_has_trace_mean_p_1_p_x2():
    problem, x, p = logistic()
    wanted = (p * (1 - p) * x.square().sum(1, keepdim=True)).mean()
    fisher = Fisher(problem)
    torch.testing.assert_close(fisher.dense().trace(), wanted)
    torch.testing.assert_close(fisher.exact_diagonal()[0].sum(), wanted)
    torch.testing.assert_close(fisher.dense(), (p * (1 - p) * x).T @ x / len(x))


@pytest.mark.parametrize("name", ["tanh", "squared", "silu", "tied"])
def test_exact_is_the_expectation_over_the_models_labels(name):
    problem = made(name)
    fisher = Fisher(problem, "exact")
    assert fisher.semidefinite and "Fisher" in fisher.convention
    V = torch.randn(problem.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative(fisher @ V, GaussNewton(problem) @ V) < 1e-13


def test_exact_by_enumerating_labels():
    problem = made("tanh")
    x, _ = problem.data
    logits, parameters = problem.model(x), list(problem.model.parameters())
    p = logits.softmax(-1).detach()
    wanted = 0
    for label in range(3):
        terms = F.cross_entropy(logits, torch.full((6,), label), reduction="none")
        for i, term in enumerate(terms):
            g = torch.cat([q.flatten() for q in torch.autograd.grad(term, parameters, retain_graph=True)])
            wanted = wanted + p[i, label] * torch.outer(g, g) / 6
    assert relative(Fisher(problem).dense(), wanted) < 1e-12


@pytest.mark.parametrize("name", ["tanh", "squared"])
def test_sampled_has_the_exact_mean(name):
    """v^T F v of 100 matrices with one draw a term: their mean lies within its own standard error."""
    problem = made(name)
    exact = Fisher(problem).dense()
    probes = torch.randn(4, len(exact), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    many = torch.stack(
        [((Fisher(problem, "sampled", generator=seed) @ probes.T) * probes.T).sum(0) for seed in range(100)]
    )
    error = many.mean(0) - ((exact @ probes.T) * probes.T).sum(0)
    assert (error.abs() < 4 * many.std(0) / 10).all()  # 4 values: chance 5e-4, were the seeds not fixed
    assert (many.std(0) > 0).all()


def test_sampled_is_one_fixed_matrix():
    problem = made("tanh")
    V = torch.randn(problem.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept, fresh = (Fisher(problem, "sampled", samples=3, generator=5, retain=retain) for retain in (True, False))
    assert relative(kept @ V, fresh @ V) < 1e-13
    assert relative(kept @ V, kept @ V) == 0
    assert relative(Fisher(problem, "sampled", samples=3, generator=6) @ V, kept @ V) > 1e-3
    source = torch.Generator().manual_seed(1)
    first, second = (Fisher(problem, "sampled", generator=source) for _ in range(2))
    assert relative(first @ V, second @ V) > 1e-3
    name = problem.names[0]
    at = problem.slices[name]
    assert relative(kept.restrict([name]).dense(), kept.dense()[at, at]) < 1e-13


def test_many_samples_are_nearer():
    problem = made("tanh")
    exact = Fisher(problem).dense()
    errors = [relative(Fisher(problem, "sampled", samples=m, generator=2).dense(), exact) for m in (1, 100)]
    assert errors[1] < errors[0] / 3  # 1 / sqrt(100) = 1/10, with room for a lucky single draw


def test_sampled_blocks_are_outer_products():
    model, loss, (x, y) = dense.wide(BY_NAME["tanh"])
    matrix = Fisher(Problem(model, loss, (x[:1], y[:1])), "sampled").dense()
    assert torch.linalg.matrix_rank(matrix) == 1  # one term, one draw


@pytest.mark.parametrize("name", ["tanh", "layernorm", "gpt2"])
def test_empirical_is_the_mean_of_outer_products(name):
    problem = made(name)
    model, parameters = problem.model, list(problem.model.parameters())
    if isinstance(problem.data, dict):
        logits = model(input_ids=problem.data["input_ids"], attention_mask=problem.data["attention_mask"]).logits
        z, y = logits[:, :-1].flatten(0, 1), problem.data["labels"][:, 1:].flatten()
    else:
        z, y = model(problem.data[0]), problem.data[1]
    terms = list(F.cross_entropy(z, y, reduction="none")[y != -100])
    V = torch.randn(problem.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert relative(Fisher(problem, "empirical") @ V, outer(terms, parameters) @ V) < 1e-12


@pytest.mark.parametrize("name", ["squared", "silu"])
def test_empirical_of_single_outputs_is_by_example(name):
    problem = made(name)
    x, y = problem.data
    terms = [problem.loss(z[None], t[None]) for z, t in zip(problem.model(x), y)]
    assert relative(Fisher(problem, "empirical").dense(), outer(terms, list(problem.model.parameters()))) < 1e-12


@pytest.mark.parametrize("name, kind", [("tanh", "empirical"), ("squared", "empirical"), ("tanh", "exact")])
def test_ragged_batches_give_the_same_matrix(name, kind):
    problem = made(name)
    x, y = problem.data
    ragged = problem.replace(data=[(x[:1], y[:1]), (x[1:], y[1:])])
    assert relative(Fisher(ragged, kind).dense(), Fisher(problem, kind).dense()) < 1e-13


def test_ignored_tokens_are_no_terms():
    model, _, (ids, targets) = dense.wide(BY_NAME["embedding"])
    masked = targets.clone()
    masked[0, 1:] = -100
    fisher = Fisher(Problem(model, per_token, (ids, masked)), "empirical")
    kept = masked.flatten() != -100
    terms = list(F.cross_entropy(model(ids).flatten(0, 1)[kept], masked.flatten()[kept], reduction="none"))
    assert relative(fisher.dense(), outer(terms, list(model.parameters()))) < 1e-12
    assert "rows of the softmax" in fisher.convention


def test_empirical_of_any_loss():
    model, _, (x, y) = dense.wide(BY_NAME["squared"])
    for loss in (F.l1_loss, F.huber_loss, lambda z, t: (z - t).norm(dim=-1).mean()):
        terms = [loss(z[None], t[None]) for z, t in zip(model(x), y)]
        found = Fisher(Problem(model, loss, (x, y)), "empirical").dense()
        assert relative(found, outer(terms, list(model.parameters()))) < 1e-12


@pytest.mark.parametrize("kind", ["exact", "sampled", "empirical"])
def test_traces_and_diagonals(kind):
    model, loss, batch = BY_NAME["tanh"].make()
    before = fingerprint(model)
    fisher = Fisher(Problem(model, loss, batch), kind, samples=2 if kind == "sampled" else 1)
    matrix = fisher.dense().double()
    samples, cost = fisher.trace_samples(400, 3)
    assert cost < 1
    assert (samples.mean() - matrix.trace()).abs() < 4 * samples.std() / 20
    torch.testing.assert_close(fisher.exact_diagonal()[0].double(), matrix.diagonal(), rtol=1e-4, atol=1e-8)
    assert torch.linalg.eigvalsh(matrix)[0] > -1e-6 * matrix.norm()
    assert fingerprint(model) == before


def test_what_is_no_likelihood_is_refused():
    model, _, batch = dense.wide(BY_NAME["squared"])
    for loss in (F.huber_loss, lambda z, t: (z - t).cosh().log().mean()):
        far = (batch[0], 3 * batch[1])
        for kind in ("exact", "sampled"):
            with pytest.raises(ValueError, match="negative log-likelihood"):
                Fisher(Problem(model, loss, far), kind)
    coupled = lambda z, t: F.cross_entropy(z @ z.T, torch.arange(len(z)))  # noqa: E731
    with pytest.raises(ValueError, match="depends on other examples"):
        Fisher(Problem(model, coupled, batch, weight=lambda b: 6), "empirical")
    with pytest.raises(ValueError, match="kind"):
        Fisher(made("tanh"), "mean")
    with pytest.raises(ValueError, match="sample"):
        Fisher(made("tanh"), "sampled", samples=0)
