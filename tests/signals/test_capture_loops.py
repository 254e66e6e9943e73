"""Capturing in every kind of loop, and saying what cannot be seen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.signals.test_capture import Net, batch, modes, net, numbers, seen_in_step
from tests.state import fingerprint
from tests.worlds import generator
from towtank.problem import Problem
from towtank.signals.capture import Capture, capture, compiled, replay
from towtank.train.models.gpt import GPT

# Loops of every kind


def test_accumulated_batches_are_pooled():
    model, one, two = net(), batch(0), batch(1)
    both = torch.cat([one[0], two[0]]), torch.cat([one[1], two[1]])
    split, whole = numbers(seen_in_step(model, one, two)), numbers(seen_in_step(model, both))
    assert set(split) == set(whole)
    for key, value in whole.items():
        assert split[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_once(reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            run = lambda t: self.act(self.up(self.attend(t)))  # noqa: E731
            return self.head(checkpoint(run, x, use_reentrant=reentrant)).flatten(0, 1)

    model, plain = Checkpointed(), net()
    model.load_state_dict(plain.state_dict())
    x, y = batch()
    x.requires_grad_()
    found, want = seen_in_step(model, (x, y)), seen_in_step(plain, (x, y))
    assert found.passes == 1 and numbers(found) == numbers(want)
    with capture(model) as seen:
        F.cross_entropy(model(x), y).backward()
    assert numbers(seen) == numbers(want) and len(seen.targets) == len(y)


def test_a_validation_in_between_does_not_count():
    model, (x, y) = net(), batch()
    looking = Capture(model)
    looking.install()
    with torch.no_grad():
        model(x)
    assert looking.seen.passes == 0
    F.cross_entropy(model(x), y).backward()
    looking.remove()
    assert looking.seen.passes == 1
    with torch.inference_mode(), capture(model) as seen:
        model(x)
    assert seen.passes == 1 and len(seen.activations) == 4


def test_autocast():
    model, (x, y) = net(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen = seen_in_step(model, (x, y))
    plain = seen_in_step(model, (x, y))
    assert seen.output.rows_KV.dtype == torch.bfloat16 and seen.output.dtype == torch.float32
    a, b = numbers(seen), numbers(plain)
    for key in ("up/rms", "attend/max_logit", "attend/q_norm"):
        assert a[key] != b[key] and a[key] == pytest.approx(b[key], rel=0.05)  # a few roundings of 2^-8


def test_modes_of_the_user_stay_in_place():
    model, (x, y) = net(), batch()
    with torch.device("cpu"):
        before = modes()
        seen = seen_in_step(model, (x, y))
        assert modes() == before
    assert numbers(seen) == numbers(seen_in_step(model, (x, y)))


def test_data_parallel_wrappers():
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model, (x, y) = net(), batch()
        wrapped = nn.parallel.DistributedDataParallel(model)
        found = [numbers(seen_in_step(m, (x, y), run=wrapped)) for m in (wrapped, model)]
    finally:
        dist.destroy_process_group()
    assert found[0] == found[1] == numbers(seen_in_step(model, (x, y)))


def test_a_shell_whose_forward_is_not_called():
    """As in Lightning, where the training step calls the network inside."""

    class Shell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss = net(), nn.CrossEntropyLoss()

    shell = Shell()
    seen = seen_in_step(shell, batch(), run=shell.net)
    want = numbers(seen_in_step(shell.net, batch()))
    assert numbers(seen) == {(k if k in ("log_z", "rows") else f"net.{k}"): v for k, v in want.items()}


def test_outputs_of_every_shape():
    z = torch.randn(4, 3, generator=generator(0))

    class Returns(nn.Module):
        def __init__(self, make):
            super().__init__()
            self.make, self.weight = make, nn.Parameter(torch.ones(()))

        def forward(self, *, z):
            return self.make(z * self.weight)

    for make in (lambda t: t, lambda t: (t, None), lambda t: {"loss": t.sum(), "logits": t}, lambda t: [[t]]):
        model = Returns(make)
        with capture(model) as seen:
            model(z=z)
        assert torch.equal(seen.output.top_R, z.amax(-1))
    for make in (lambda t: None, lambda t: t.sum(), lambda t: t > 0, lambda t: "text"):
        model = Returns(make)
        with capture(model) as seen:
            model(z=z)
        assert seen.output is None and seen.passes == 1


def test_segmentation_outputs_have_their_classes_at_the_channels():
    model = nn.Conv2d(2, 3, 1)
    x, y = torch.randn(2, 2, 4, 4), torch.randint(3, (2, 4, 4))
    with capture(model) as seen:
        z = model(x)
    assert torch.equal(seen.output.top_R, z.detach().amax(1).flatten())
    with capture(model) as seen:
        F.cross_entropy(model(x), y)
    assert torch.equal(seen.output.top_R, z.detach().amax(1).flatten()) and torch.equal(seen.targets, y.flatten())


def test_kept_inputs_and_outputs_are_copies():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(5, 3, generator=generator(0))
    with capture(model, ("0", "[2]")) as seen:
        made = model(x)
    ((given, pre),) = seen.kept["0"]
    assert torch.equal(given, x) and torch.equal(pre, model[0](x).detach()) and not pre.requires_grad
    ((hidden, out),) = seen.kept["2"]
    assert torch.equal(hidden, pre.relu()) and torch.equal(out, made.detach()) and set(seen.kept) == {"0", "2"}


# What cannot be seen is said


def test_modules_that_are_bypassed_are_named():
    class Direct(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.outer = nn.Linear(3, 3)

        def forward(self, x):
            return self.outer(self.inner.forward(x))

    model = Direct()
    with capture(model) as seen:
        model(torch.ones(2, 3))
    assert seen.unseen == ("activations of inner: not called as a module",)
    assert "none of its modules was called" in Capture(model).seen.unseen[0]


def test_other_kinds_of_tensors_are_left_alone():
    model = nn.Linear(3, 2)
    with capture(model) as seen:
        torch.func.vmap(model)(torch.ones(4, 3))
        torch.func.grad(lambda w: torch.func.functional_call(model, {"weight": w}, (torch.ones(3),)).sum())(
            model.weight.detach()
        )
    assert not seen.activations and any("torch.func" in text for text in seen.unseen)


# Compiled models


def compiled_models():
    whole = torch.compile(net(), backend="eager")
    part = net()
    part.up = torch.compile(part.up, backend="eager")
    in_place = net()
    in_place.head.compile(backend="eager")
    return {"whole": whole, "part": part, "in place": in_place}


@pytest.mark.parametrize("kind", ["whole", "part", "in place"])
def test_compiled_models_are_not_touched_and_can_be_replayed(kind):
    model, (x, y) = compiled_models()[kind], batch()
    assert compiled(model) and not compiled(net())
    before = fingerprint(model)
    looking = Capture(model)
    looking.install()
    assert fingerprint(model) == before
    assert len(looking.seen.unseen) == 1 and "compiled" in looking.seen.unseen[0]
    looking.remove()

    seen = replay(Problem(model, F.cross_entropy, (x, y)))
    assert fingerprint(model) == before
    want = numbers(seen_in_step(net(), (x, y)))
    found = numbers(seen)
    assert set(found) == set(want)
    for key, value in want.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key
    assert torch.equal(seen.targets, y) and any("again" in text for text in seen.unseen)


def test_replay_of_several_batches_and_kept_modules():
    model, data = net(), [batch(0), batch(1)]
    before = fingerprint(model)
    seen = replay(Problem(model, F.cross_entropy, data), ("head",))
    assert fingerprint(model) == before and seen.passes == 2 and len(seen.kept["head"]) == 2
    want = numbers(seen_in_step(model, *data))
    assert numbers(seen) == pytest.approx(want, rel=1e-5)


# Models of others


def test_our_own_gpt_against_its_own_probe():
    model = GPT(width=32, depth=2, head_dim=16, vocabulary=11, context=9)
    tokens = torch.randint(11, (3, 9), generator=generator(0))
    probe: dict[str, torch.Tensor] = {}
    with capture(model) as seen:
        model(tokens)
    model(tokens, probe)
    found = {n: float(a.max_logit) for n, a in seen.attention.items()}
    assert found == {f"blocks.{i}.attention": float(probe[f"attention_logit_max/block{i}"]) for i in range(2)}
    assert not seen.unseen
