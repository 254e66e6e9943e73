"""The tangent kernel against loops of autograd, and its motion against closed forms of linear networks."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.state import fingerprint
from tests.worlds import F64, generator, normal
from towtank.curvature.ntk import NTK
from towtank.problem import Problem
from towtank.signals.kernel import Kernel, cka, compare_kernels, cosine, kernel_drift, tangent_kernel, target_kernel
from towtank.signals.step import CannotTell, Step


def brute_force(model, x):
    """sum_c <grad f_c(x_i), grad f_c(x_j)>, one output of one example at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(x)):
        outputs = model(x[i : i + 1]).flatten()
        grads = [torch.autograd.grad(o, parameters, retain_graph=True, allow_unused=True) for o in outputs]
        rows.append(
            [
                torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(g_, parameters)])
                for g_ in grads
            ]
        )
    n = len(x)
    K = torch.zeros(n, n, dtype=F64)
    for i in range(n):
        for j in range(n):
            K[i, j] = sum(float(a @ b) for a, b in zip(rows[i], rows[j]))
    return K


def net(seed=0, sizes=(4, 5, 3), dtype=F64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b, dtype=dtype), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def problem(model, x, C=3, **kwargs):
    return Problem(model, F.mse_loss, (x, torch.zeros(len(x), C, dtype=x.dtype)), **kwargs)


def step(model, x, y, loss=F.mse_loss, number=1, kept=None):
    return Step(
        number=number,
        loss=torch.zeros(()),
        model=model,
        problem_of=lambda batch: Problem(model, loss, batch),
        probe_batch=(x, y),
        kept={} if kept is None else kept,
    )


# The kernel


def test_against_brute_force():
    model, x = net(), normal(6, 4, seed=1)
    before = fingerprint(model)
    K = tangent_kernel(problem(model, x))
    assert fingerprint(model) == before and K.exact
    truth = brute_force(model, x)
    # sums of P = 43 products of three outputs
    torch.testing.assert_close(K.matrix, truth, rtol=1e-13, atol=1e-13 * float(truth.norm()))
    split = Problem(model, F.mse_loss, [(x[:2], torch.zeros(2, 3, dtype=F64)), (x[2:], torch.zeros(4, 3, dtype=F64))])
    torch.testing.assert_close(tangent_kernel(split).matrix, truth, rtol=1e-13, atol=1e-13 * float(truth.norm()))


def test_it_is_the_partial_trace_of_the_full_kernel():
    model, x = net(), normal(6, 4, seed=1)
    full = NTK(problem(model, x)).dense().view(6, 3, 6, 3)
    torch.testing.assert_close(tangent_kernel(problem(model, x)).matrix, torch.einsum("icjc->ij", full))


def test_coupled_examples_go_as_a_whole():
    model = nn.Sequential(nn.Linear(4, 5, dtype=F64), nn.BatchNorm1d(5, dtype=F64), nn.Linear(5, 3, dtype=F64))
    x = normal(6, 4, seed=1)
    coupled = problem(model, x, mode="train")
    full = NTK(coupled).dense().view(6, 3, 6, 3)
    torch.testing.assert_close(tangent_kernel(coupled).matrix, torch.einsum("icjc->ij", full))


def test_frozen_tied_and_half():
    model, x = net(), normal(6, 4, seed=1)
    model[0].weight.requires_grad_(False)
    torch.testing.assert_close(tangent_kernel(problem(model, x)).matrix, brute_force(model, x))
    tied = nn.Sequential(nn.Linear(4, 4, dtype=F64), nn.Tanh(), nn.Linear(4, 4, dtype=F64))
    tied[2].weight = tied[0].weight
    torch.testing.assert_close(tangent_kernel(problem(tied, x, 4)).matrix, brute_force(tied, x))
    half = net().to(torch.bfloat16)
    wide = copy.deepcopy(half).double()
    found = tangent_kernel(problem(half, x.bfloat16())).matrix
    torch.testing.assert_close(found, brute_force(wide, x.bfloat16().double()), rtol=1e-5, atol=1e-4)


def test_random_directions_are_unbiased():
    model, x = net(sizes=(4, 5, 20)), normal(6, 4, seed=1)
    truth = brute_force(model, x)
    found = tangent_kernel(problem(model, x, 20), directions=300)
    error = found.parts_Snn.std(dim=0) / 300**0.5
    assert not found.exact and found.parts_Snn.shape == (300, 6, 6)
    # 21 different entries: 4.5 standard errors are exceeded with chance 1e-4
    assert ((found.matrix - truth).abs() < 4.5 * error + 1e-9).all()
    again = tangent_kernel(problem(model, x, 20), directions=3, seed=5)
    assert torch.equal(again.parts_Snn, tangent_kernel(problem(model, x, 20), directions=3, seed=5).parts_Snn)


def test_two_layer_linear_network():
    """K = |W2|^2 X X^T + C X W1^T W1 X^T, at two settings: what training could do to it."""
    x = normal(7, 4, seed=1)
    kernels, by_hand = [], []
    for seed in (2, 3):
        model = nn.Sequential(nn.Linear(4, 5, bias=False, dtype=F64), nn.Linear(5, 3, bias=False, dtype=F64))
        W1, W2 = normal(5, 4, seed=seed), normal(3, 5, seed=seed + 10)
        model[0].weight.data.copy_(W1), model[1].weight.data.copy_(W2)
        kernels.append(tangent_kernel(problem(model, x)))
        by_hand.append(W2.square().sum() * x @ x.T + 3 * x @ W1.T @ W1 @ x.T)
        torch.testing.assert_close(kernels[-1].matrix, by_hand[-1], rtol=1e-12, atol=1e-11)
    motion = compare_kernels(kernels[1], kernels[0])
    start, now = by_hand
    assert motion.drift == pytest.approx(float((now - start).norm() / start.norm()), rel=1e-10)
    assert motion.cosine == pytest.approx(float((now * start).sum() / now.norm() / start.norm()), rel=1e-10)


# Its motion


def test_a_linear_model_has_no_drift():
    model, x = nn.Linear(4, 1, dtype=F64), normal(10, 4, seed=1)
    start = tangent_kernel(problem(model, x, 1))
    torch.testing.assert_close(start.matrix, x @ x.T + 1)
    with torch.no_grad():
        model.weight.add_(7)
    motion = compare_kernels(tangent_kernel(problem(model, x, 1)), start, x[:, 0])
    assert motion.drift == 0 and motion.verdict == "lazy" and motion.cosine == pytest.approx(1, abs=1e-15)
    assert motion.alignment == motion.start_alignment == pytest.approx(cka(x @ x.T, torch.outer(x[:, 0], x[:, 0])))


def test_only_the_scale():
    K = normal(5, 5, seed=0)
    K = K @ K.T
    motion = compare_kernels(Kernel(3 * K[None], exact=True), Kernel(K[None], exact=True))
    assert motion.drift == pytest.approx(2) and motion.cosine == pytest.approx(1) and motion.cka == pytest.approx(1)
    assert motion.verdict == "rich" and motion.alignment is None


def test_alignment():
    y = normal(8, 2, seed=0)
    assert cka(y @ y.T, y @ y.T) == pytest.approx(1, abs=1e-14)
    assert cka(4 + 3 * y @ y.T, y @ y.T) == pytest.approx(1, abs=1e-14)  # neither offset nor scale matters
    signs = torch.tensor([1, -1, 1, 1, -1])
    labels = torch.tensor([1, 0, 1, 1, 0])
    assert cka(target_kernel(labels), target_kernel(signs.double()[:, None])) == pytest.approx(1, abs=1e-14)
    one_hot = F.one_hot(labels).double()
    assert torch.equal(target_kernel(labels), one_hot @ one_hot.T)
    H = torch.eye(8, dtype=F64) - 1 / 8
    K, L = y @ y.T, normal(8, 3, seed=4) @ normal(8, 3, seed=4).T
    brute = torch.trace(H @ K @ H @ L) / ((H @ K @ H).norm() * (H @ L @ H).norm())
    assert cka(K, L) == pytest.approx(float(brute), rel=1e-12)
    assert math.isnan(cka(torch.ones(8, 8), K)) and math.isnan(cosine(torch.zeros(2, 2), torch.eye(2)))


def train(alpha, steps=60):
    """Gradient descent on alpha (f - f_0) with the rate divided by alpha^2 (Chizat, Oyallon, Bach 2019)."""
    model, x = net(sizes=(4, 16, 1)), normal(8, 4, seed=1)
    y = torch.sin(x.sum(1, keepdim=True))
    origin = copy.deepcopy(model)
    start = tangent_kernel(problem(model, x, 1))
    for _ in range(steps):
        loss = F.mse_loss(alpha * (model(x) - origin(x).detach()), y)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads):
                p -= 0.3 / alpha**2 * g
    return compare_kernels(tangent_kernel(problem(model, x, 1)), start, y)


def test_a_larger_output_scale_is_lazier():
    """The parameters move by O(1 / alpha), and with them the kernel; the next order is smaller by 1 / alpha again."""
    drift = {alpha: train(alpha).drift for alpha in (0.5, 10, 100, 1000)}
    assert drift[0.5] > drift[10] > drift[100] > drift[1000]
    assert drift[100] / drift[1000] == pytest.approx(10, rel=10 * drift[100])
    assert train(1000).verdict == "lazy" and train(0.5).verdict == "rich"


def test_rich_learning_aligns_the_kernel():
    motion = train(0.5, steps=150)
    assert motion.alignment > motion.start_alignment


def test_jackknife_of_the_drift():
    """With one entry and K_0 = 1 the drift is |mean(parts) - 1|: its standard error is that of a mean."""
    parts = 3 + normal(40, seed=0)
    ones = torch.ones(40, 1, 1, dtype=F64)
    motion = compare_kernels(Kernel(parts[:, None, None], exact=False), Kernel(ones, exact=False))
    assert motion.drift_error == pytest.approx(float(parts.std() / 40**0.5), rel=1e-10)


def test_what_cannot_be_told():
    eye = Kernel(torch.eye(3)[None], exact=True)
    with pytest.raises(CannotTell, match="not zero"):
        compare_kernels(eye, Kernel(0 * eye.parts_Snn, exact=True))
    with pytest.raises(CannotTell, match="finite"):
        compare_kernels(Kernel(math.nan * eye.parts_Snn, exact=True), eye)
    with pytest.raises(ValueError, match="same examples"):
        compare_kernels(Kernel(torch.eye(4)[None], exact=True), eye)
    with pytest.raises(ValueError, match="at least one direction"):
        tangent_kernel(problem(net(), normal(2, 4, seed=0)), directions=0)
    assert compare_kernels(eye, eye, torch.zeros(3, dtype=torch.long)).alignment is None


# The probe


def test_the_probe():
    model, x, y = net(), normal(40, 4, seed=1), torch.randint(0, 3, (40,), generator=generator(2))
    probe, kept = kernel_drift(examples=8), {}
    before = fingerprint(model)
    first = probe(step(model, x, y, F.cross_entropy, kept=kept))
    assert fingerprint(model) == before and first["representation/ntk_drift"] == 0
    start = brute_force(model, x[:8])
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    second = probe(step(model, x, y, F.cross_entropy, 2, kept))
    now = brute_force(model, x[:8])
    assert second["representation/ntk_drift"] == pytest.approx(float((now - start).norm() / start.norm()), rel=1e-10)
    assert second["representation/ntk_cosine"] == pytest.approx(cosine(now, start), rel=1e-10)
    assert second["representation/ntk_alignment"] == pytest.approx(cka(now, target_kernel(y[:8])), rel=1e-10)
    assert set(second) == {f"representation/ntk_{k}" for k in ("drift", "cosine", "alignment")}


def test_the_probe_of_many_outputs_tells_its_error():
    model, x, y = net(sizes=(4, 30, 60)), normal(6, 4, seed=1), normal(6, 60, seed=2)
    kept, probe = {}, kernel_drift(outputs=8)
    probe(step(model, x, y, kept=kept))
    start = brute_force(model, x)
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    found, now = probe(step(model, x, y, kept=kept)), brute_force(model, x)
    truth = float((now - start).norm() / start.norm())
    error = found["representation/ntk_drift_error"]
    # a jackknife of 8 has a relative error of about 1/4: 5 of its standard errors are safe
    assert 0 < error < 0.5 * truth and abs(found["representation/ntk_drift"] - truth) < 5 * error


def test_the_cost_is_told():
    x = normal(40, 4, seed=1)
    own = problem(net(), x)
    assert kernel_drift(examples=8).cost(own) == pytest.approx((1 + 2 * 3) / 3 * 8 / 40)
    many = problem(net(sizes=(4, 5, 60)), x, 60)
    assert kernel_drift(examples=40, outputs=8).cost(many) == pytest.approx((1 + 2 * 8) / 3)


def test_another_probe_batch_is_refused():
    model, x, y = net(), normal(9, 4, seed=1), normal(9, 3, seed=2)
    kept, probe = {}, kernel_drift()
    probe(step(model, x, y, kept=kept))
    with pytest.raises(CannotTell, match="keep it fixed"):
        probe(step(model, x[:5], y[:5], kept=kept))


def test_one_example():
    model, x = net(), normal(1, 4, seed=1)
    found = kernel_drift()(step(model, x, torch.zeros(1, 3, dtype=F64)))
    assert found == {"representation/ntk_drift": 0.0, "representation/ntk_cosine": pytest.approx(1.0)}
