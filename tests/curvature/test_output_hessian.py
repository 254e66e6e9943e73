"""Closed forms of the loss's second derivative against `torch.autograd.functional.hessian` in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from towtank import losses
from towtank.curvature import output_hessian, output_matrix
from towtank.curvature.output_hessian import Differentiated, Elementwise, Softmax, recognise

LABELS = torch.tensor([2, 0, 4, 1])
MASKED = torch.tensor([2, -100, 4, -100])
MAPS = torch.tensor([[0, 3, -100], [1, 1, 2]])
SOFT = torch.rand(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0], dtype=torch.float64)
VALUES = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(4, 5)
BITS = (VALUES > 0).double()


def shifted(z: Tensor) -> Tensor:
    """As causal language models do: position t predicts label t + 1; the last position has no term."""
    return F.cross_entropy(z[:, :-1].flatten(0, 1), torch.tensor([[1, 2, 0, -100], [4, 4, 3, 1]])[:, 1:].flatten())


def weighed(z: Tensor) -> Tensor:
    """Cross-entropy written out, with a weight for each example, one of them zero."""
    return -(torch.tensor([1.0, 0.0, 0.3, 2.0]).double() * z.log_softmax(-1)[range(4), LABELS]).sum() / 3


SOFTMAX = {
    "mean": (lambda z: F.cross_entropy(z, LABELS), (4, 5)),
    "sum": (lambda z: F.cross_entropy(z, LABELS, reduction="sum"), (4, 5)),
    "ours": (lambda z: losses.cross_entropy(z, LABELS), (4, 5)),
    "module": (lambda z: torch.nn.CrossEntropyLoss(weight=WEIGHTS.to(z.dtype))(z, LABELS), (4, 5)),
    "ignored": (lambda z: F.cross_entropy(z, MASKED), (4, 5)),
    "smooth": (lambda z: F.cross_entropy(z, MASKED, label_smoothing=0.2, weight=WEIGHTS.to(z.dtype)), (4, 5)),
    "soft": (lambda z: F.cross_entropy(z, SOFT.to(z.dtype)), (4, 5)),
    "maps": (lambda z: F.cross_entropy(z, MAPS), (2, 5, 3)),
    "shifted": (shifted, (2, 4, 5)),
    "weighed": (weighed, (4, 5)),
    "one row": (lambda z: F.cross_entropy(z, torch.tensor(1)), (5,)),
}
SINGLE = {
    "mse": (lambda z: F.mse_loss(z, VALUES.to(z.dtype)), (4, 5), "gaussian"),
    "ours mse": (lambda z: losses.squared_error(z, 1e3 * VALUES.to(z.dtype)), (4, 5), "gaussian"),
    "bce": (lambda z: F.binary_cross_entropy_with_logits(z, BITS.to(z.dtype)), (4, 5), "bernoulli"),
    "bce weighted": (
        lambda z: F.binary_cross_entropy_with_logits(z, BITS.to(z.dtype), weight=WEIGHTS.to(z.dtype)),
        (4, 5),
        "bernoulli",
    ),
    "poisson": (lambda z: F.poisson_nll_loss(z, BITS.to(z.dtype)), (4, 5), "poisson"),
    "probabilities": (lambda z: F.binary_cross_entropy(z.clamp(0.01, 0.99), BITS.to(z.dtype)), (4, 5), None),
    "logcosh": (lambda z: (z - VALUES.to(z.dtype)).cosh().log().mean(), (4, 5), None),
    "double well": (lambda z: (z.square() - 1).square().mean(), (4, 5), None),
}
OTHER = {
    "z loss": (lambda z: F.cross_entropy(z, LABELS) + z.logsumexp(-1).square().mean(), (4, 5)),
    "focal": (
        lambda z: ((1 - z.softmax(-1)[range(4), LABELS]) ** 2 * F.cross_entropy(z, LABELS, reduction="none")).mean(),
        (4, 5),
    ),
    "margin": (lambda z: F.cross_entropy(10 * F.normalize(z, dim=-1), LABELS), (4, 5)),
    "coupled": (lambda z: z.square().mean().square(), (4, 5)),
    "one spoilt row": (lambda z: F.cross_entropy(z, LABELS) + 1e-3 * z[3, :2].prod(), (4, 5)),
    "soft cap": (lambda z: F.cross_entropy(30 * (z / 30).tanh(), LABELS), (4, 5)),
}


def outputs(shape: tuple[int, ...], seed: int = 3) -> Tensor:
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(loss, z: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(loss, z.double()).reshape(z.numel(), z.numel())


def as_matrix(form, z: Tensor) -> Tensor:
    eye = torch.eye(z.numel(), dtype=z.dtype).reshape(-1, *z.shape)
    return torch.stack([form.apply(u).flatten() for u in eye], dim=1)


def error(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", SOFTMAX)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_every_cross_entropy_is_softmax_rows(name, dtype, tolerance):
    loss, shape = SOFTMAX[name]
    z = outputs(shape)
    form = recognise(loss, z.to(dtype))
    closed = form.at(loss, z.to(dtype))
    assert isinstance(closed, Softmax) and closed.semidefinite and closed.likelihood == "categorical"
    assert error(as_matrix(closed, z.to(dtype)), dense(loss, z)) <= tolerance


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_a_sum_over_single_outputs_is_diagonal(name, dtype, tolerance):
    loss, shape, likelihood = SINGLE[name]
    z = outputs(shape)
    closed = recognise(loss, z.to(dtype)).at(loss, z.to(dtype))
    assert isinstance(closed, Elementwise) and closed.likelihood == likelihood
    expected = dense(loss, z)
    assert closed.semidefinite == bool((expected.diagonal() >= 0).all())
    assert error(as_matrix(closed, z.to(dtype)), expected) <= tolerance


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_any_other_loss_is_differentiated_twice(name, dtype, tolerance):
    loss, shape = OTHER[name]
    z = outputs(shape)
    general = recognise(loss, z.to(dtype)).at(loss, z.to(dtype))
    assert isinstance(general, Differentiated) and not general.semidefinite
    assert error(as_matrix(general, z.to(dtype)), dense(loss, z)) <= tolerance


def test_a_form_recognised_at_one_point_holds_at_another():
    for loss, shape, *_ in [*SOFTMAX.values(), *SINGLE.values(), *OTHER.values()]:
        form, elsewhere = recognise(loss, outputs(shape)), outputs(shape, seed=4)
        assert error(as_matrix(form.at(loss, elsewhere), elsewhere), dense(loss, elsewhere)) <= 1e-12


def test_blocks_of_rows_change_nothing(monkeypatch):
    loss, z = SOFTMAX["shifted"][0], outputs((2, 4, 5))
    closed, u = recognise(loss, z).at(loss, z), outputs((2, 4, 5), seed=9)
    whole, draw = closed.apply(u), closed.root(torch.Generator().manual_seed(0))
    signs = closed.signs(torch.Generator().manual_seed(0))
    for chunk in (1, 5, 17):
        monkeypatch.setattr(output_matrix, "CHUNK", chunk)
        assert torch.equal(closed.apply(u), whole)
        assert torch.equal(closed.root(torch.Generator().manual_seed(0)), draw)
        assert torch.equal(closed.signs(torch.Generator().manual_seed(0)), signs)


def test_softmax_is_recognised_without_second_derivatives(monkeypatch):
    monkeypatch.setattr(output_hessian, "_differentiated", None)  # it makes ten copies of the outputs
    assert recognise(SOFTMAX["smooth"][0], outputs((4, 5))).kind == "softmax"


def test_a_saturated_row_keeps_its_digits():
    # p = 1 - 4e-6: in float32 the plain p (u - <p, u>) of the sure class loses all but two digits to cancellation.
    z = torch.tensor([[14.0, 0.3, -0.2, 0.9, 0.0]], dtype=torch.float64)
    loss = lambda x: F.cross_entropy(x, torch.tensor([0]))  # noqa: E731
    closed = recognise(loss, z.float()).at(loss, z.float())
    # 5 classes, and a few roundings each, of 2^-24
    assert error(as_matrix(closed, z.float()), dense(loss, z)) <= 30 * 2**-24


@pytest.mark.parametrize("name, how", [("smooth", "root"), ("maps", "root"), ("maps", "signs"), ("shifted", "signs")])
def test_drawn_labels_and_signs_have_the_covariance(name, how):
    loss, shape = SOFTMAX[name]
    z = outputs(shape) / 4  # no class so rare that 2000 draws are not yet normal
    closed = recognise(loss, z).at(loss, z)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([getattr(closed, how)(generator).flatten() for _ in range(2000)])
    squares = draws[:, :, None] * draws[:, None, :]
    error = squares.mean(0) - dense(loss, z)
    stderr = squares.std(0) / 2000**0.5
    # every entry is a mean of 2000 draws: 400 entries stay within 5 standard errors but with probability 2e-4
    assert (error.abs() <= 5 * stderr + 1e-12).all()


def test_drawn_signs_have_the_diagonal_in_every_draw():
    loss, shape, _ = SINGLE["bce weighted"]
    closed = recognise(loss, outputs(shape)).at(loss, outputs(shape))
    draw = closed.root(torch.Generator().manual_seed(0)).flatten()
    torch.testing.assert_close(draw.square(), dense(loss, outputs(shape)).diagonal(), rtol=1e-12, atol=0)


class Fused(torch.autograd.Function):
    """Cross-entropy as fused kernels compute it: differentiated again it gives zero, without an error."""

    @staticmethod
    def forward(ctx, z, labels):
        ctx.save_for_backward(z.softmax(-1) - F.one_hot(labels, z.shape[-1]))
        return F.cross_entropy(z, labels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0] / 4, None


def test_a_kernel_without_a_second_derivative_gets_the_closed_form():
    fused, z = lambda x: Fused.apply(x, LABELS), outputs((4, 5))
    assert error(as_matrix(recognise(fused, z).at(fused, z), z), dense(SOFTMAX["mean"][0], z)) <= 1e-12


def test_a_missing_second_derivative_is_an_error_not_a_zero():
    mixed = lambda z: Fused.apply(z, LABELS) + z.logsumexp(-1).square().mean()  # noqa: E731
    with pytest.raises(NotImplementedError, match="second derivative"):
        recognise(mixed, outputs((4, 5)))


def test_what_has_no_curvature_is_refused():
    z = outputs((4, 5))
    with pytest.raises(ValueError, match="linear"):
        recognise(lambda x: F.nll_loss(x, LABELS), z.log_softmax(-1))
    with pytest.raises(ValueError, match="do not detach"):
        recognise(lambda x: F.cross_entropy(x.detach(), LABELS), z)


def test_negative_weights_are_not_semidefinite():
    loss = lambda x: -F.cross_entropy(x, LABELS)  # noqa: E731
    closed = recognise(loss, outputs((4, 5))).at(loss, outputs((4, 5)))
    assert isinstance(closed, Softmax) and not closed.semidefinite
