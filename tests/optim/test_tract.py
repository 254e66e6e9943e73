"""TrAct and the Fisher penalty against dense formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from towtank.optim.fisher_penalty import FisherPenalty
from towtank.optim.tract import tract


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _grads(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.tanh(model(x)).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("rows", [3, 40])  # fewer and more than the 6 inputs
def test_a_linear_layer_gets_the_dense_formula_and_the_rest_its_own_gradient(rows: int) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = _random(rows, 6)
    plain = _grads(model, x)
    with tract(model, damping=0.3) as name:
        told = _grads(model, x)
    assert name == "0"
    expected = plain["0.weight"] @ torch.linalg.inv(x.T @ x / rows + 0.3 * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(told["0.weight"], expected, rtol=0, atol=1e-11)
    for other in ("0.bias", "2.weight", "2.bias"):
        assert torch.equal(told[other], plain[other])
    assert torch.equal(_grads(model, x)["0.weight"], plain["0.weight"])  # the hooks are gone


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize(
    ("padding", "mode", "stride"),
    [(0, "zeros", 1), ((2, 1), "zeros", 2), ("same", "reflect", 1), (1, "circular", (1, 2)), ("valid", "replicate", 1)],
)
def test_a_convolution_gets_the_formula_over_its_patches(padding, mode: str, stride, dilation: int) -> None:
    conv = nn.Conv2d(2, 3, (3, 2), stride=stride, padding=padding, padding_mode=mode, dilation=dilation).double()
    x = _random(2, 2, 7, 6)
    plain = _grads(conv, x)
    with tract(conv):
        told = _grads(conv, x)
    # patches without unfold: the response of the layer to each unit kernel is one column of X
    columns = []
    probe = nn.Conv2d(2, 1, (3, 2), stride=stride, padding=padding, padding_mode=mode, dilation=dilation, bias=False)
    probe = probe.double().requires_grad_(False)
    for i in range(probe.weight.numel()):
        probe.weight.zero_()
        probe.weight.view(-1)[i] = 1
        columns.append(probe(x).flatten())
    X = torch.stack(columns, 1)
    inverse = torch.linalg.inv(X.T @ X / len(X) + 0.1 * torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(told["weight"].flatten(1), plain["weight"].flatten(1) @ inverse, rtol=0, atol=1e-11)
    assert torch.equal(told["bias"], plain["bias"])


def test_passes_of_one_backward_are_one_batch_and_others_do_not_count() -> None:
    layer = nn.Linear(5, 2).double()
    x = _random(8, 5)
    with tract(layer):
        merged = _grads(layer, x)["weight"]
        layer.zero_grad()
        layer(_random(9, 5, seed=1))  # never differentiated
        with torch.no_grad():
            layer(_random(9, 5, seed=2))
        (torch.tanh(layer(x[:3])).square().sum() + torch.tanh(layer(x[3:])).square().sum()).backward()
        torch.testing.assert_close(layer.weight.grad, merged, rtol=0, atol=1e-12)
        y = x.clone().requires_grad_()
        torch.autograd.grad(layer(y).sum(), y)  # a backward that does not reach the weight
        torch.testing.assert_close(_grads(layer, x)["weight"], merged, rtol=0, atol=1e-12)


def test_bfloat16_is_solved_in_float32() -> None:
    layer, exact = nn.Linear(4, 3).bfloat16(), nn.Linear(4, 3).double()
    exact.load_state_dict(layer.state_dict())
    x = _random(16, 4).bfloat16()
    with tract(layer):
        layer(x).sum().backward()
    with tract(exact):
        exact(x.double()).sum().backward()
    assert layer.weight.grad.dtype == torch.bfloat16
    # G^T X is rounded to bfloat16 (2^-9) before the solve, which amplifies by the condition, below 1 / 0.1, and after it
    x = x.double()
    bound = 2**-8 * (x.sum(0).norm() * 10 + exact.weight.grad.abs().max())
    assert (layer.weight.grad.double() - exact.weight.grad).abs().max() < bound


def test_layers_that_cannot_be_meant_are_refused_by_name() -> None:
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    text = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    for model, options, message in (
        (grouped, {}, "layer '0' is a convolution of 2 groups"),
        (text, {}, "layer '0': expected an nn.Linear or nn.Conv2d, got Embedding"),
        (nn.ReLU(), {}, "no layer that is an nn.Linear or nn.Conv2d"),
        (text, {"layer": "7"}, "no layer '7'"),
        (text, {"layer": "1", "damping": 0.0}, "damping = 0.0: expected a positive number"),
    ):
        with pytest.raises(ValueError, match=message), tract(model, **options):
            pass
    with tract(text, layer="1") as name:
        assert name == "1"


def _by_hand(W: torch.Tensor, x: torch.Tensor, labels: torch.Tensor, alpha: float) -> torch.Tensor:
    """Alpha ||X^T (p - y) / N||^2 of softmax regression."""
    residual = (x @ W).softmax(-1) - nn.functional.one_hot(labels, W.shape[1])
    return alpha * (x.T @ residual / len(x)).square().sum()


def test_the_penalty_and_its_gradient_equal_softmax_regressions_closed_form() -> None:
    x, W = _random(6, 4), _random(4, 3, seed=1).requires_grad_()
    penalty = FisherPenalty([W], alpha=0.7, every=3, generator=torch.Generator().manual_seed(5))
    labels = torch.multinomial((x @ W).detach().softmax(-1), 1, generator=torch.Generator().manual_seed(5))[:, 0]
    term = penalty(x @ W)
    torch.testing.assert_close(term, _by_hand(W.detach(), x, labels, 0.7), rtol=0, atol=1e-14)
    (gradient,) = torch.autograd.grad(term, [W])
    differences = torch.zeros_like(gradient)
    h = 1e-5  # central differences: an error of h^2, 1e-10, and rounding of 1e-16 / h
    for i in range(12):
        move = torch.zeros(12, dtype=torch.float64)
        move[i] = h
        up, down = (_by_hand(W.detach() + s * move.view(4, 3), x, labels, 0.7) for s in (1, -1))
        differences.view(-1)[i] = (up - down) / (2 * h)
    torch.testing.assert_close(gradient, differences, rtol=0, atol=1e-9)
    assert W.grad is None


def test_the_penalty_is_kept_between_refreshes_and_the_loss_can_use_the_same_logits() -> None:
    x, W = _random(6, 4), _random(4, 3, seed=1).requires_grad_()
    penalty = FisherPenalty([W], alpha=0.5, every=2, generator=torch.Generator().manual_seed(0))
    told = []
    for _ in range(4):
        logits = x @ W
        term = penalty(logits)
        told.append((term.item(), torch.autograd.grad(term, [W], retain_graph=True)[0]))
        (logits.square().mean() + term).backward()  # the graph of the logits is still there
        with torch.no_grad():
            W -= 0.1 * W.grad
            W.grad = None
    for a, b in ((0, 1), (2, 3)):
        assert told[a][0] == told[b][0] and torch.equal(told[a][1], told[b][1])
    assert told[0][0] != told[2][0] and not torch.equal(told[0][1], told[2][1])
    with pytest.raises(ValueError, match="alpha >= 0 and every >= 1"):
        FisherPenalty([W], alpha=-1.0)
