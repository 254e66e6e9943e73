"""What is recorded while a step happens equals what one gets by hand, and no hook outlives it."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.state import fingerprint
from towtank.signals.recorder import Recorder


class Tied(nn.Module):
    """A token model whose head is its embedding, with dropout off and a frozen scale."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.mix(self.embedding(tokens)).tanh() * self.scale, self.embedding.weight)


def parts(count: int, size: int = 3) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    draw = lambda: torch.randint(11, (size, 4), generator=g)  # noqa: E731
    return [(draw(), draw()) for _ in range(count)]


def loss_of(model: nn.Module, part: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(part[0]).flatten(0, 1), part[1].flatten())


def seeded() -> Tied:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tied()


@pytest.mark.parametrize("count", [1, 3])
def test_parts_totals_and_update(count: int) -> None:
    model = seeded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    by_hand = [torch.autograd.grad(loss_of(model, part) / count, list(trained.values())) for part in parts(count)]
    before = {n: p.detach().clone() for n, p in trained.items()}
    recorder = Recorder(model, optimizer)
    recorder.arm({"micro", "raw_norms", "updates"})
    for part in parts(count):
        (loss_of(model, part) / count).backward()
    raw = {n: float(p.grad.norm()) for n, p in trained.items()}
    nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    optimizer.step()
    found, stepped = recorder.collect()
    assert stepped is True
    micro = found["micro"]
    assert micro.sizes == (3,) * count and len(micro.squares) == count
    for square, gradients in zip(micro.squares, by_hand, strict=True):
        for n, g in zip(trained, gradients, strict=True):
            assert float(square[n]) == pytest.approx(float(g.norm()) ** 2, rel=1e-5)
    for n, p in trained.items():
        assert float(found["raw_norms"][n]) == pytest.approx(raw[n], rel=1e-6)
        assert float(micro.total[n]) == pytest.approx(raw[n] ** 2, rel=1e-6)
        assert torch.equal(found["updates"][n], p.detach() - before[n])
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert not any(p._backward_hooks for p in trained.values())
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


def test_forward_passes_without_gradient_are_no_parts() -> None:
    model = seeded()
    recorder = Recorder(model, None)
    recorder.arm({"micro"})
    with torch.no_grad():
        loss_of(model, parts(1)[0])
    for part in parts(2):
        loss_of(model, part).backward()
    found, stepped = recorder.collect()
    assert stepped is None and len(found["micro"].squares) == 2 and found["micro"].sizes == (3, 3)


def test_two_forward_passes_of_one_backward_are_one_part() -> None:
    model = seeded()
    recorder = Recorder(model, None)
    recorder.arm({"micro"})
    a, b = parts(2)
    (loss_of(model, a) + loss_of(model, b)).backward()
    found, _ = recorder.collect()
    assert len(found["micro"].squares) == 1 and found["micro"].sizes is None


def test_parts_that_cannot_be_told_apart_are_not_told() -> None:
    """Two backward passes whose forward passes went around the model's own call."""
    model = seeded()
    recorder = Recorder(model, None)
    recorder.arm({"micro", "raw_norms"})
    for tokens, targets in parts(2):
        F.cross_entropy(model.forward(tokens).flatten(0, 1), targets.flatten()).backward()
    found, _ = recorder.collect()
    assert "micro" not in found and "raw_norms" in found


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_parts(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.second, checkpoint(self.first, x, use_reentrant=reentrant), use_reentrant=reentrant)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Checkpointed()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    model(x).square().mean().backward()
    by_hand = {n: float(p.grad.norm()) for n, p in model.named_parameters()}
    model.zero_grad()
    recorder = Recorder(model, None)
    recorder.arm({"micro", "raw_norms"})
    for _ in range(2):
        model(x).square().mean().backward()
    found, _ = recorder.collect()
    for n, want in by_hand.items():
        assert float(found["raw_norms"][n]) == pytest.approx(2 * want, rel=1e-5)
        assert [float(s[n]) for s in found["micro"].squares] == pytest.approx([want**2] * 2, rel=1e-5)


def test_a_loss_scale_is_taken_out_and_a_skipped_step_is_seen() -> None:
    model = seeded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    recorder = Recorder(model, optimizer, scaler)
    recorder.arm({"raw_norms"})
    scaler.scale(loss_of(model, parts(1)[0])).backward()
    scaler.unscale_(optimizer)
    true = {n: float(p.grad.norm()) for n, p in model.named_parameters() if p.requires_grad}
    scaler.step(optimizer)
    scaler.update()
    found, stepped = recorder.collect()
    assert stepped is True
    assert {n: float(x) for n, x in found["raw_norms"].items()} == pytest.approx(true, rel=1e-5)
    optimizer.zero_grad()
    recorder.arm(())
    scaler.scale(loss_of(model, parts(1)[0]) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert recorder.collect() == ({}, False)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_loop_that_raises_leaves_no_hook(where: str) -> None:
    model = seeded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = fingerprint(model, optimizer)
    recorder = Recorder(model, optimizer)
    recorder.arm({"micro", "raw_norms", "updates", "seen"})
    assert fingerprint(model, optimizer) != before  # the hooks are there
    with pytest.raises((IndexError, RuntimeError)):
        if where == "forward":
            model(torch.full((1, 1), 99))
        else:
            loss_of(model, parts(1)[0]).sum().backward(torch.ones(3))
    del recorder
    gc.collect()
    model.zero_grad()
    assert fingerprint(model, optimizer) == before


def test_hooks_do_not_keep_the_model_alive() -> None:
    model = seeded()
    recorder = Recorder(model, torch.optim.SGD(model.parameters(), lr=0.1))
    recorder.arm({"micro", "seen", "updates"})
    loss_of(model, parts(1)[0]).backward()
    dead = weakref.ref(model)
    del model, recorder
    gc.collect()
    assert dead() is None


def test_sparse_gradients() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Embedding(9, 3, sparse=True)
    recorder = Recorder(model, None)
    recorder.arm({"micro", "raw_norms"})
    model(torch.tensor([1, 1, 4])).square().sum().backward()
    found, _ = recorder.collect()
    want = float(model.weight.grad.to_dense().norm())
    assert float(found["raw_norms"]["weight"]) == pytest.approx(want, rel=1e-6)
    assert float(found["micro"].squares[0]["weight"]) == pytest.approx(want**2, rel=1e-6)
