"""Curvature samples against dense Hessians and the exact Gauss-Newton matrix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import towtank.optim as optim
from towtank.optim.diagonals import gauss_newton_bartlett_diagonal, hutchinson_diagonal

DRAWS = 2000


def _model() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, torch.randn(5, 3, generator=generator).double(), torch.randint(3, (5,), generator=generator)


def _within_three_errors(samples: torch.Tensor, truth: torch.Tensor) -> None:
    """The mean of independent samples lies within 4.5 standard errors of the truth in every coordinate."""
    error = samples.std(0) / len(samples) ** 0.5
    assert ((samples.mean(0) - truth).abs() <= 4.5 * error + 1e-12).all()  # 31 coordinates: 2e-4 by chance


def test_the_mean_of_hutchinson_samples_is_the_diagonal_of_a_dense_hessian() -> None:
    model, x, y = _model()
    params = list(model.parameters())
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in params]

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = flat.split([s.numel() for s in shapes])
        state = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(model, state, (x,)), y)

    truth = torch.autograd.functional.hessian(loss, torch.cat([p.detach().flatten() for p in params])).diagonal()
    generator = torch.Generator().manual_seed(1)
    samples = []
    for _ in range(DRAWS):
        drawn = hutchinson_diagonal(nn.functional.cross_entropy(model(x), y), params, generator=generator)
        samples.append(torch.cat([d.flatten() for d in drawn]))
    _within_three_errors(torch.stack(samples), truth)
    assert all(p.grad is None for p in params)


def test_the_mean_of_bartlett_samples_times_b_is_the_gauss_newton_diagonal() -> None:
    model, x, _ = _model()
    params = list(model.parameters())
    with torch.no_grad():
        p = model(x).softmax(-1)
    truth = torch.zeros(sum(q.numel() for q in params), dtype=torch.float64)
    for n in range(len(x)):  # sum_n J_n^T (diag p - p p^T) J_n / N, one output at a time
        rows = [torch.autograd.grad(model(x)[n, c], params) for c in range(3)]
        J = torch.stack([torch.cat([g.flatten() for g in r]) for r in rows])
        truth += ((J * ((torch.diag(p[n]) - torch.outer(p[n], p[n])) @ J)).sum(0)) / len(x)
    generator = torch.Generator().manual_seed(1)
    samples = []
    for _ in range(DRAWS):
        drawn = gauss_newton_bartlett_diagonal(model(x), params, generator=generator)
        samples.append(len(x) * torch.cat([d.flatten() for d in drawn]))
    _within_three_errors(torch.stack(samples), truth)


def test_positions_left_out_do_not_count() -> None:
    w = torch.randn(4, 3, requires_grad=True, generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([True, False, True, False])
    (sample,) = gauss_newton_bartlett_diagonal(w, [w], keep=keep)
    assert (sample[~keep] == 0).all() and (sample[keep] > 0).all()


def test_kernels_are_averaged_by_absolute_value() -> None:
    conv = nn.Conv2d(1, 2, 2)
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    raw, averaged = (
        hutchinson_diagonal(
            conv(x).pow(4).mean(),
            list(conv.parameters()),
            generator=torch.Generator().manual_seed(5),
            average_kernels=average,
        )
        for average in (False, True)
    )
    expected = raw[0].abs().mean((2, 3), keepdim=True).expand_as(raw[0])
    torch.testing.assert_close(averaged[0], expected)
    torch.testing.assert_close(averaged[1], raw[1])  # a bias has no kernel


def test_same_generator_same_sample_and_the_global_one_untouched() -> None:
    w = torch.randn(6, requires_grad=True)
    before = torch.random.get_rng_state()
    one, two = (hutchinson_diagonal(w.pow(4).sum(), [w], generator=torch.Generator().manual_seed(3))[0] for _ in "ab")
    assert torch.equal(one, two) and torch.equal(before, torch.random.get_rng_state())


def test_sophia_and_adahessian_descend_a_quadratic_with_their_samples() -> None:
    curvatures = torch.tensor([0.1, 1.0, 10.0])
    for make in (lambda p: optim.AdaHessian(p, lr=0.1), lambda p: optim.SophiaH(p, lr=0.05, rho=0.1)):
        w = nn.Parameter(torch.ones(3))
        optimizer = make([w])
        for _ in range(100):
            optimizer.zero_grad()
            loss = 0.5 * (curvatures * w**2).sum()
            optimizer.observe_curvature(hutchinson_diagonal(0.5 * (curvatures * w**2).sum(), [w]))
            loss.backward()
            optimizer.step()
        assert 0.5 * (curvatures * w**2).sum() < 0.05 * 5.55


def test_bad_input_is_refused() -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="scalar loss"):
        hutchinson_diagonal(w * 2, [w])
    with pytest.raises(ValueError, match="logits with their graph"):
        gauss_newton_bartlett_diagonal(torch.ones(2, 3), [w])
    lion = optim.Lion([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="uses no curvature"):
        lion.observe_curvature([torch.ones(2)])
    p = nn.Parameter(torch.ones(2))
    sophia = optim.SophiaG([("w", p)])
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="sophia-g needs curvature and has observed none for w"):
        sophia.step()
    with pytest.raises(ValueError, match=r"w: expected a diagonal of shape \(2,\), got \(3,\)"):
        sophia.observe_curvature([torch.ones(3)])
    with pytest.raises(FloatingPointError, match="w: the curvature sample is not finite"):
        sophia.observe_curvature({"w": torch.tensor([1.0, float("nan")])})
