"""Output logits: the published gaps of softmax collapse, log Z, zero losses, and the alignment of gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.worlds import generator
from towtank.signals.capture import Capture, capture
from towtank.signals.output import gradient_alignment, output
from towtank.signals.output_stats import Output
from towtank.signals.step import CannotTell, Step

# Dtype, digits of its mantissa with the hidden one, and the first collapsing gap on a grid of 0.25 (Prieto et al. 2025).
PRECISIONS = [(torch.float32, 24, 16.75), (torch.float16, 11, 7.75), (torch.bfloat16, 8, 5.75)]


def two_classes(gap: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([[gap, 0.0]], dtype=torch.float64).to(dtype)


def loss_is_zero(gap: float, dtype: torch.dtype) -> bool:
    return float(F.cross_entropy(two_classes(gap, dtype), torch.tensor([0]))) == 0


@pytest.mark.parametrize("dtype, digits, published", PRECISIONS)
def test_collapse_at_the_published_gaps(dtype, digits, published):
    for quarter in range(1, 100):
        gap = quarter / 4
        found = Output.of(two_classes(gap, dtype))
        assert bool(found.collapse == 1) == (gap >= published) == loss_is_zero(gap, dtype)
        assert float(found.zero_losses(torch.tensor([0]))) == float(gap >= published)
        assert float(found.zero_losses(torch.tensor([1]))) == 0


@pytest.mark.parametrize("dtype, digits, published", PRECISIONS)
def test_collapse_begins_where_bisection_of_the_loss_finds_it(dtype, digits, published):
    low, high = 0.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if loss_is_zero(middle, dtype) else (middle, high)
    spacing = torch.finfo(dtype).eps * high  # of logits of this size: the gap itself is rounded
    assert abs(high - digits * math.log(2)) <= spacing  # half a unit in the last place of 1
    below = torch.nextafter(torch.tensor(high).to(dtype), torch.tensor(0.0).to(dtype))
    below = torch.nextafter(below, torch.zeros_like(below))
    assert float(Output.of(two_classes(float(below), dtype)).collapse) == 0
    assert float(Output.of(two_classes(high, dtype)).collapse) == 1


@pytest.mark.parametrize(
    "dtype, spread", [(torch.float64, 20), (torch.float32, 10), (torch.float16, 5), (torch.bfloat16, 4)]
)
def test_zero_losses_are_those_of_the_kernel(dtype, spread):
    g, eps = generator(3), torch.finfo(dtype).eps
    for classes in (2, 3, 40):
        z = (spread * torch.randn(500, classes, generator=g, dtype=torch.float64)).to(dtype)
        y = torch.where(torch.rand(500, generator=g) < 0.8, z.argmax(-1), torch.randint(classes, (500,), generator=g))
        z_wide = z.double()
        rest = (z_wide - z_wide.amax(-1, keepdim=True)).exp().sum(-1) - 1  # 1 + rest rounds to 1 below half an eps
        clear = (
            rest / (eps / 2) - 1
        ).abs() > 2 * classes * eps  # terms and partial sums are rounded: a kernel may add either way
        assert clear.double().mean() > 0.95
        z, y = z[clear], y[clear]
        want = (F.cross_entropy(z, y, reduction="none") == 0).double().mean()
        assert float(Output.of(z).zero_losses(y)) == pytest.approx(float(want), abs=1e-6)
        assert classes > 2 or 0 < want < 1  # there is something to count


@pytest.mark.parametrize("dim", [-1, 1])
def test_log_z_against_float64(dim):
    z = 30 * torch.randn(7, 11, 5, generator=generator(0))
    rows = z.double().movedim(dim, -1).reshape(-1, z.shape[dim])
    log_z = torch.tensor([math.log(math.fsum(math.exp(v - max(r)) for v in r)) + max(r) for r in rows.tolist()])
    found = Output.of(z, dim=dim)
    eps = torch.finfo(torch.float32).eps
    assert float(found.log_z_mean) == pytest.approx(float(log_z.mean()), abs=8 * eps * 120)
    assert float(found.log_z_min) == pytest.approx(float(log_z.min()), abs=8 * eps * 120)
    assert float(found.max_logit) == float(z.max())
    assert torch.equal(found.rows_KV, rows.float()[found.indices_K])


def test_chunks_and_pooling_change_nothing(monkeypatch):
    z, y = 12 * torch.randn(50, 3, generator=generator(1)), torch.randint(3, (50,), generator=generator(2))
    whole = Output.of(z).with_targets(y)
    monkeypatch.setattr("towtank.signals.output_stats._CHUNK", {"cpu": 7})
    parts = Output.pooled([Output.of(z[:13]).with_targets(y[:13]), Output.of(z[13:]).with_targets(y[13:])])
    for key in ("log_z_R", "top_R", "winner_R", "targets_R"):
        assert torch.equal(getattr(whole, key), getattr(parts, key))
    assert torch.equal(parts.rows_KV, z[parts.indices_K])
    assert float(whole.collapse) == float(parts.collapse) > 0


def test_kept_rows_are_few():
    found = Output.of(torch.zeros(10_000, 2))
    assert len(found.rows_KV) <= 4096 and int(found.indices_K[-1]) >= 9_000
    assert Output.of(torch.zeros(300, 1 << 16)).rows_KV.numel() <= 1 << 22


def test_what_is_not_finite_shows():
    z = torch.zeros(4, 3)
    z[1, 0], z[2, 1] = torch.nan, torch.inf
    found = Output.of(z)
    assert torch.isnan(found.log_z_mean) and torch.isnan(found.max_logit) and torch.isnan(found.log_z_min)
    z[1, 0] = 0
    assert float(Output.of(z).max_logit) == math.inf and float(Output.of(z).collapse) == 0


@pytest.mark.parametrize(
    "z", [torch.zeros(4, 1), torch.zeros(0, 3), torch.zeros(3, 4, dtype=torch.long), torch.tensor(1.0)]
)
def test_what_is_no_logits_is_refused(z):
    with pytest.raises((ValueError, IndexError)):
        Output.of(z)


# The probe


def step(model, seen, **more):
    return Step(number=1, loss=torch.tensor(0.0), model=model, recorded={"seen": seen}, **more)


def planted(gaps: list[float]) -> tuple[nn.Module, torch.Tensor]:
    """A model whose logits are its inputs."""
    model = nn.Linear(2, 2, bias=False)
    nn.init.eye_(model.weight)
    return model, torch.tensor([[g, 0.0] for g in gaps])


def test_targets_come_from_the_batch_where_the_loss_was_not_seen():
    model, x = planted([20.0, 20.0, 20.0, 1.0])
    looking = Capture(model)
    looking.install()
    model(x)
    looking.remove()
    y = torch.tensor([0, 1, -100, 0])
    found = output()(step(model, looking.seen, batch=(x, y)))
    assert float(found["output/collapse"]) == 0.75  # ignored rows are known only with the loss
    assert float(found["output/zero_losses"]) == pytest.approx(1 / 3)
    assert "output/zero_losses" not in output()(step(model, looking.seen))
    assert "output/zero_losses" not in output()(step(model, looking.seen, batch=(x, y[:3])))


def test_ignored_targets_do_not_count():
    model, x = planted([20.0, 20.0, 1.0, 40.0])
    with capture(model) as seen:
        F.cross_entropy(model(x), torch.tensor([0, 1, 0, 7]), ignore_index=7)
    found = output()(step(model, seen))
    assert float(found["output/zero_losses"]) == pytest.approx(1 / 3)
    assert float(found["output/collapse"]) == pytest.approx(2 / 3)
    assert float(found["output/max_logit"]) == 20


def test_working_precision_under_autocast():
    model, x = planted([6.0, 7.0])
    y = torch.tensor([0, 0])
    with capture(model) as by_hand:
        F.cross_entropy(model(x).bfloat16(), y)  # cast by hand: the loss is exactly 0
    with capture(model) as widened, torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    assert by_hand.output.dtype == torch.bfloat16 and float(by_hand.output.collapse) == 1
    assert widened.output.dtype == torch.float32 and float(widened.output.collapse) == 0 and loss > 0
    assert widened.output.rows_KV.dtype == torch.bfloat16  # the true dtype of the logits


def test_regression_has_no_logits():
    model, x = nn.Linear(3, 4), torch.randn(5, 3, generator=generator(0))
    with capture(model) as seen:
        y = model(x)
    with pytest.raises(CannotTell):
        output()(step(model, seen, batch=(x, torch.randn(5, 4, generator=generator(1)))))
    soft = torch.full((5, 4), 0.25)  # probabilities
    assert "output/log_z_mean" in output()(step(model, seen, batch=(x, soft)))
    with pytest.raises(CannotTell):
        output()(step(model, type(seen)()))
    assert y is not None


def test_alignment_of_scaled_logits():
    """On separated data the gradient of a linear classifier along its weights is known: d loss / d scale."""
    W = torch.randn(3, 4, generator=generator(0), dtype=torch.float64, requires_grad=True)
    x = torch.randn(20, 4, generator=generator(1), dtype=torch.float64)
    y = (x @ W.detach().T).argmax(-1)
    F.cross_entropy(x @ W.T, y).backward()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    F.cross_entropy(scale * (x @ W.detach().T), y).backward()
    want = -scale.grad / (W.grad.norm() * W.detach().norm())
    found = gradient_alignment({"W": W.detach()}, {"W": W.grad})
    assert float(found) == pytest.approx(float(want), rel=1e-12)
    assert found > 0  # the right answer all over: growing the logits lowers the loss


def test_alignment_bad_input():
    w = {"a": torch.ones(3), "b": torch.ones(2)}
    assert float(gradient_alignment(w, {"a": torch.zeros(3)})) == 0
    tiny = gradient_alignment(w, {"a": torch.full((3,), -1e-30), "b": torch.full((2,), -1e-30)})
    assert float(tiny) == pytest.approx(1, rel=1e-6)  # squares below the least float32
    assert math.isnan(float(gradient_alignment(w, {"a": torch.tensor([torch.nan, 0, 0])})))
    half = gradient_alignment({"a": torch.full((3,), 3.0).half()}, {"a": torch.full((3,), 400.0).half()})
    assert float(half) == pytest.approx(-1, rel=1e-3)
    with pytest.raises(ValueError, match="expected gradients"):
        gradient_alignment(w, {})


def test_alignment_is_read_at_the_weights_of_the_gradient():
    model = nn.Linear(2, 1, bias=False)
    nn.init.ones_(model.weight)
    model.weight.grad = torch.tensor([[-1.0, -1.0]])
    update = torch.tensor([[3.0, -5.0]])
    model.weight.data += update
    seen = Capture(model).seen
    recorded = {"seen": seen, "updates": {"weight": update}}
    found = output()(Step(number=1, loss=torch.tensor(0.0), model=model, recorded=recorded))
    assert float(found["output/gradient_alignment"]) == pytest.approx(1, rel=1e-6)
