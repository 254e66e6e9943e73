"""Neural collapse on exact simplices, against closed forms of perturbed ones, and by brute force in numpy."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.state import fingerprint
from tests.worlds import F64, generator, normal, orthogonal
from towtank.problem import Problem
from towtank.signals.neural_collapse import (
    CollapseStatistics,
    collapse_of,
    measure_collapse,
    neural_collapse,
    neural_collapse_probe,
)
from towtank.signals.step import CannotTell, Step


def simplex(K, d, seed=0):
    """K rows of unit norm with cosines -1 / (K - 1), in d dimensions."""
    E = math.sqrt(K / (K - 1)) * (torch.eye(K, dtype=F64) - 1 / K)
    return E @ orthogonal(d, seed)[:K]


def brute_force(H, y, W, guess):
    """Every definition as it is written in the paper, example by example."""
    H, y, W, guess = (x.numpy().astype(np.float64 if x.is_floating_point() else int) for x in (H, y, W, guess))
    K, d, N = len(W), H.shape[1], len(H)
    mu = np.stack([H[y == c].mean(0) for c in range(K)])
    center = sum(mu) / K
    S_W, S_B = np.zeros((d, d)), np.zeros((d, d))
    for h, c in zip(H, y):
        S_W += np.outer(h - mu[c], h - mu[c]) / N
    for m in mu:
        S_B += np.outer(m - center, m - center) / K

    def norms(V):
        size = [math.sqrt((v**2).sum()) for v in V]
        return np.std(size) / np.mean(size)

    def angles(V):
        pairs = [(a, b) for a in range(K) for b in range(K) if a != b]
        cos = [V[a] @ V[b] / math.sqrt((V[a] @ V[a]) * (V[b] @ V[b])) for a, b in pairs]
        return np.mean([abs(c + 1 / (K - 1)) for c in cos])

    M = mu - center
    nearest = [min(range(K), key=lambda c: ((h - mu[c]) ** 2).sum()) for h in H]
    return dict(
        nc1=np.trace(S_W @ np.linalg.pinv(S_B, rcond=1e-10)) / K,
        equinorm_features=norms(M),
        equinorm_weights=norms(W),
        equiangle_features=angles(M),
        equiangle_weights=angles(W),
        nc3=np.linalg.norm(W / np.linalg.norm(W) - M / np.linalg.norm(M)),
        nc4=np.mean([n != g for n, g in zip(nearest, guess)]),
    )


def cloud(seed=0, K=5, d=7, N=60):
    y = torch.cat([torch.arange(K), torch.randint(0, K, (N - K,), generator=generator(seed))])
    H = normal(K, d, seed=seed + 1)[y] + 0.7 * normal(N, d, seed=seed + 2) + 3
    return H, y, normal(K, d, seed=seed + 3), torch.randint(0, K, (N,), generator=generator(seed + 4))


@pytest.mark.parametrize("counts", [[6, 6, 6, 6], [1, 2, 9, 30]], ids=["balanced", "imbalanced"])
def test_a_simplex_is_collapsed(counts):
    """Also when classes are imbalanced and features are shifted."""
    E = simplex(4, 9)
    y = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    found = neural_collapse(3 * E[y] + 2, y, 0.5 * E, y)
    values = [found.nc1, found.equinorm_features, found.equinorm_weights, found.equiangle_features]
    values += [found.equiangle_weights, found.nc3, found.nc4]
    assert max(values) < 100 * torch.finfo(F64).eps  # sums of under 100 rounded terms of size 1
    assert (found.classes, found.examples, found.smallest) == (4, sum(counts), min(counts))


def test_noise_of_known_size():
    """h = mu + a (+-e_j) for all j: S_W = a^2 / d I, S_B = r^2 / (K - 1) on its span: NC1 = (K - 1)^2 a^2 / (d r^2 K)."""
    K, d, a, r = 4, 9, 0.3, 2.0
    noise = a * torch.cat([torch.eye(d, dtype=F64), -torch.eye(d, dtype=F64)])
    y = torch.repeat_interleave(torch.arange(K), 2 * d)
    H = r * simplex(K, d)[y] + noise.repeat(K, 1)
    found = neural_collapse(H, y, simplex(K, d), y)
    assert found.nc1 == pytest.approx((K - 1) ** 2 * a**2 / (d * r**2 * K), rel=1e-12)
    assert found.nc3 < 1e-14


def test_weights_of_known_shape():
    """Orthogonal rows of norms 1 and 3; and self-duality |u - v| = sqrt(2 - 2 cos) of unit matrices."""
    K = 2
    y = torch.tensor([0, 1])
    H = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    W = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    found = neural_collapse(H, y, W, y)
    assert found.equinorm_weights == pytest.approx(0.5) and found.equiangle_weights == pytest.approx(1 / (K - 1))
    assert found.nc3 == pytest.approx(math.sqrt(2 - 2 * 1 / (math.sqrt(2) * math.sqrt(10))))


@pytest.mark.parametrize("seed", range(4))
def test_against_brute_force(seed):
    H, y, W, guess = cloud(seed)
    found = neural_collapse(H, y, W, guess)
    for key, value in brute_force(H, y, W, guess).items():
        assert getattr(found, key) == pytest.approx(value, rel=1e-10), key


def test_more_classes_than_features():
    H, y, W, guess = cloud(K=9, d=4)
    found, truth = neural_collapse(H, y, W, guess), brute_force(H, y, W, guess)
    assert found.nc1 == pytest.approx(truth["nc1"], rel=1e-10)


def test_any_order_of_batches_and_processes():
    H, y, W, _ = cloud()
    whole = CollapseStatistics.empty(5, 7).update(H, y)
    order = torch.randperm(len(H), generator=generator(9))
    parts = [CollapseStatistics.empty(5, 7) for _ in range(3)]
    for i, index in enumerate(order.split(7)):
        parts[i % 3] = parts[i % 3].update(H[index], y[index])
    merged = parts[2].merge(parts[0].merge(parts[1]))
    for a, b in zip(
        (whole.counts_K, whole.means_Kd, whole.scatter_dd), (merged.counts_K, merged.means_Kd, merged.scatter_dd)
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert merged.measures(W).nc1 == pytest.approx(whole.measures(W).nc1, rel=1e-11)


def test_a_large_offset_does_not_cancel():
    """Features at 1e8 hold 8 digits after it; a sum of squares would hold none."""
    H, y, *_ = cloud()
    shifted = H + 1e8
    found = CollapseStatistics.empty(5, 7)
    for a, b in zip(shifted.split(11), y.split(11)):
        found = found.update(a, b)
    truth = CollapseStatistics.empty(5, 7).update(shifted - 1e8, y)
    # each feature minus its mean is off by a few eps 1e8 = 2e-8 out of numbers of size 1
    torch.testing.assert_close(found.scatter_dd, truth.scatter_dd, rtol=0, atol=60 * 3 * 4 * 2.3e-8)


def test_empty_batches_change_nothing():
    H, y, *_ = cloud()
    one = CollapseStatistics.empty(5, 7).update(H, y)
    two = one.update(H[:0], y[:0])
    assert torch.equal(one.means_Kd, two.means_Kd) and torch.equal(one.scatter_dd, two.scatter_dd)


def test_what_cannot_be_told():
    H, y, W, guess = cloud()
    with pytest.raises(CannotTell, match=r"none of \[3\]"):
        neural_collapse(H[y != 3], y[y != 3], W, guess[y != 3])
    with pytest.raises(CannotTell, match="finite features"):
        neural_collapse(H * math.nan, y, W, guess)
    with pytest.raises(CannotTell, match="differ"):
        neural_collapse(torch.full_like(H, 0.1), y, W, guess)
    with pytest.raises(CannotTell, match="two classes"):
        neural_collapse(H, 0 * y, W[:1], guess)
    with pytest.raises(CannotTell, match="none of"):
        neural_collapse(H[:0], y[:0], W, guess[:0])
    with pytest.raises(ValueError, match="labels from 0 to 4"):
        neural_collapse(H, y + 1, W, guess)
    with pytest.raises(ValueError, match="weights"):
        CollapseStatistics.empty(5, 7).update(H, y).measures(W.T)


# Models


class Net(nn.Module):
    """The head is neither the last child nor the last to be called, and dropout would spoil the features."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.side = nn.Linear(6, 3)

    def forward(self, x):
        h = self.body(x)
        logits = self.head(h)
        self.side(h)
        return logits


def data(N=30, seed=0):
    torch_generator = generator(seed)
    x = torch.randn(N, 4, generator=torch_generator)
    return x, torch.cat([torch.arange(3), torch.randint(0, 3, (N - 3,), generator=torch_generator)])


def net(seed=0, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**kwargs)


def by_hand(model, x, y):
    """In evaluation mode, on a copy."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        h = model.body(x)
        return brute_force(h.double(), y, model.head.weight.double(), model.head(h).argmax(1))


def agree(found, truth):
    for key, value in truth.items():  # float32 features of size 1, of which 30 are averaged
        assert getattr(found, key) == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_a_model_on_batches():
    model, (x, y) = net(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = fingerprint(model, optimizer)
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    found = measure_collapse(model, batches)
    assert fingerprint(model, optimizer) == before
    agree(found, by_hand(model, x, y))
    assert measure_collapse(model, batches[::-1], head="head").nc1 == pytest.approx(found.nc1, rel=1e-6)
    assert measure_collapse(model, batches, head="side").nc3 != found.nc3


def test_frozen_half_precision_ignored_and_one_hot():
    model, (x, y) = net(), data()
    truth = measure_collapse(model, (x, y))
    for p in [*model.body.parameters(), model.head.weight]:
        p.requires_grad_(False)
    assert measure_collapse(model, (x, y)) == truth
    extra = torch.cat([y, torch.full((5,), -100)])
    assert measure_collapse(model, (torch.cat([x, x[:5]]), extra)).nc1 == pytest.approx(truth.nc1, rel=1e-6)
    assert measure_collapse(model, (x, nn.functional.one_hot(y, 3).float())) == truth
    half = measure_collapse(net().to(torch.bfloat16), (x.bfloat16(), y))
    assert half.nc1 == pytest.approx(truth.nc1, rel=0.1)  # weights rounded to 8 bits


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(3, 5), nn.Linear(5, 3, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens):
            return self.out(self.embed(tokens).cumsum(1))

    with torch.random.fork_rng():
        model = Tied()
    tokens = torch.randint(0, 3, (8, 6), generator=generator(0))
    found = measure_collapse(model, (tokens, tokens.roll(1, 1)))
    h = model.embed(tokens).cumsum(1).detach().flatten(0, 1)
    W = model.embed.weight.detach()
    agree(found, brute_force(h.double(), tokens.roll(1, 1).flatten(), W.double(), (h @ W.T).argmax(1)))


def test_models_that_cannot_be_told():
    x, y = data()
    with pytest.raises(CannotTell, match="nn.Linear that makes"):
        measure_collapse(nn.Sequential(nn.Linear(4, 5), nn.Conv1d(1, 1, 3), nn.Tanh()), (x[:, None], y))
    with pytest.raises(CannotTell, match="to name"):
        measure_collapse(net(), (x, y), head="tail")
    with pytest.raises(CannotTell, match="one-hot"):
        measure_collapse(net(), (x, x[:, :3]))
    with pytest.raises(CannotTell, match="below 3"):
        measure_collapse(net(), (x, y + 1))


def test_global_minimum_of_a_linear_network_is_collapsed():
    """Features that are free, squared loss and decay: Dang et al. 2023, theorem 3.1, orthogonal means of equal norm.

    With one-hot targets and no bias the class means are an orthogonal frame, so after centering they are a simplex; the
    classifier is proportional to the means that are not centered, hence cos(W, M) = sqrt((K - 1) / K).
    """
    K, d, n, decay = 3, 6, 4, 0.02
    with torch.random.fork_rng():
        torch.manual_seed(1)
        H = nn.Parameter(0.5 * torch.randn(K * n, d, dtype=F64))
        W = nn.Parameter(0.5 * torch.randn(K, d, dtype=F64))
    y = torch.arange(K).repeat_interleave(n)
    Y = nn.functional.one_hot(y, K).to(F64)
    optimizer = torch.optim.LBFGS(
        [H, W], max_iter=600, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (H @ W.T - Y).square().sum() / len(Y) + decay / 2 * (W.square().sum() + H.square().sum() / n)
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    assert max(float(H.grad.abs().max()), float(W.grad.abs().max())) < 1e-9
    found = neural_collapse(H.detach(), y, W.detach(), (H @ W.T).argmax(1))
    # the gradient is below 1e-9 and the flattest direction has curvature of about decay / n
    assert found.nc1 < 1e-10 and max(found.equinorm_features, found.equiangle_features, found.equinorm_weights) < 1e-6
    assert found.nc3 == pytest.approx(math.sqrt(2 - 2 * math.sqrt((K - 1) / K)), abs=1e-6)
    assert found.equiangle_weights == pytest.approx(1 / (K - 1), abs=1e-6) and found.nc4 == 0


# The probe


def step(model, x, y, **kwargs):
    return Step(
        number=1,
        loss=torch.zeros(()),
        model=model,
        problem_of=lambda batch: Problem(model, nn.functional.cross_entropy, batch),
        probe_batch=(x, y),
        **kwargs,
    )


def test_the_probe():
    model, (x, y) = net(), data()
    before = fingerprint(model)
    found = neural_collapse_probe()(step(model, x, y))
    assert fingerprint(model) == before
    truth = by_hand(model, x, y)
    assert set(found) == {
        f"representation/{k}" for k in ("nc1", "nc2_features", "nc2_weights", "nc2_angles", "nc3", "nc4")
    }
    assert found["representation/nc1"] == pytest.approx(truth["nc1"], rel=1e-4)
    assert found["representation/nc2_angles"] == pytest.approx(truth["equiangle_features"], rel=1e-4)
    batches = [(x[:20], y[:20]), (x[20:], y[20:])]
    elsewhere = neural_collapse_probe(batches, head="head")
    assert elsewhere(step(model, x[:3], y[:3])) == pytest.approx(found, rel=1e-5)
    alone = Step(number=1, loss=torch.zeros(()), model=model)
    assert elsewhere(alone) == pytest.approx(found, rel=1e-5)


def test_the_cost_is_told():
    model, (x, y) = net(), data()
    problem = step(model, x[:10], y[:10]).problem
    assert neural_collapse_probe().cost(problem) == pytest.approx(1.0)
    assert neural_collapse_probe([(x, y)], head="head").cost(problem) == pytest.approx(2.0)


def test_a_classifier_of_zeros_leaves_its_numbers_out():
    model, (x, y) = net(), data()
    nn.init.zeros_(model.head.weight)
    found = neural_collapse_probe(head="head")(step(model, x, y))
    assert set(found) == {
        "representation/nc1",
        "representation/nc2_features",
        "representation/nc2_angles",
        "representation/nc4",
    }


def test_hooks_are_gone_when_the_model_raises():
    model, (x, y) = net(), data()
    problem = Problem(model, nn.functional.cross_entropy, (x, y))
    _ = problem.survey
    before = fingerprint(model)
    with pytest.raises(RuntimeError):
        collapse_of(problem.replace(data=(x[:, :2], y), checks=False))
    assert fingerprint(model) == before
