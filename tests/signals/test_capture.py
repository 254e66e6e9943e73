"""Capturing: what is seen in every kind of loop, and that nothing of the user's changes and nothing stays behind."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from tests.signals import attention_cases as cases
from tests.state import fingerprint
from tests.worlds import generator
from towtank.signals.capture import Capture, capture


class Net(nn.Module):
    """Attention, ReLU, a head; may fail in the middle."""

    def __init__(self, fails: type[BaseException] | None = None) -> None:
        super().__init__()
        self.attend = cases.ByHand(cases.plain)
        self.up, self.act, self.head = nn.Linear(cases.D, 12), nn.ReLU(), nn.Linear(12, 3)
        self.fails = fails

    def forward(self, x):
        x = self.act(self.up(self.attend(x)))
        if self.fails is not None:
            raise self.fails("planted")
        return self.head(x).flatten(0, 1)


def net(**options) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(**options)


def batch(seed: int = 0):
    return cases.inputs(seed), torch.randint(3, (cases.B * cases.T,), generator=generator(seed))


def seen_in_step(model, *batches, run=None):
    """One step of a loop, as a monitor captures it."""
    looking = Capture(model)
    looking.install()
    for x, y in batches:
        F.cross_entropy((run or model)(x), y).backward()
    looking.remove()
    return looking.seen


def numbers(seen) -> dict[str, float]:
    found = {f"{n}/{k}": float(getattr(m, k)) for n, m in seen.activations.items() for k in ("rms", "max", "kurtosis")}
    found |= {
        f"{n}/{k}": float(getattr(a, k)) for n, a in seen.attention.items() for k in ("max_logit", "entropy", "q_norm")
    }
    found |= {n: float(share) for n, share in seen.dead.items()}
    return found | {"log_z": float(seen.output.log_z_mean), "rows": len(seen.output.log_z_R)}


# Nothing changes, nothing stays


def modes() -> int:
    return len(_get_current_function_mode_stack())


def test_outputs_and_gradients_are_the_same_bits():
    model, (x, y) = net(), batch()
    plain = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    with capture(model) as seen:
        watched = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert seen.passes == 1 and not seen.unseen


def test_a_captured_step_leaves_the_state_of_a_bare_one():
    prints = []
    for watch in (False, True):
        model, (x, y) = net(), batch()
        optimizer = torch.optim.AdamW(model.parameters())
        looking = Capture(model)
        for _ in range(3):
            if watch:
                looking.install()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            looking.remove()
            looking.remove()
        with torch.no_grad():
            values = [p.clone() for p in model.parameters()]
        prints.append(([v.tolist() for v in values], [len(m._forward_hooks) for m in model.modules()]))
    assert prints[0] == prints[1]


@pytest.mark.parametrize("keep", [(), ("*",)])
def test_state_after_a_forward_pass(keep):
    model, (x, y) = net(), batch()
    F.cross_entropy(model(x), y).backward()
    before = fingerprint(model)
    with capture(model, keep):
        model(x)
    looking = Capture(model, keep)
    looking.install()
    assert fingerprint(model) != before  # the hooks are there, and the test can tell
    model(x)
    looking.remove()
    assert fingerprint(model) == before and modes() == 0


def test_state_after_forward_raises():
    model, (x, _) = net(fails=RuntimeError), batch()
    before = fingerprint(model)
    looking = Capture(model)
    looking.install()
    with pytest.raises(RuntimeError, match="planted"):
        model(x)
    assert modes() == 0  # while the hooks are still there
    with pytest.raises(RuntimeError, match="planted"):
        model(x)
    looking.remove()
    with pytest.raises(RuntimeError, match="planted"), capture(model) as seen:
        model(x)
    assert fingerprint(model) == before and modes() == 0
    assert "up" in seen.activations and seen.output is None


def test_state_after_backward_raises():
    model, (x, y) = net(), batch()
    model.up.weight.register_hook(lambda g: (_ for _ in ()).throw(ArithmeticError("planted")))
    before = fingerprint(model)
    with pytest.raises(ArithmeticError, match="planted"), capture(model):
        F.cross_entropy(model(x), y).backward()
    model.zero_grad()
    assert fingerprint(model) == before and modes() == 0


def test_an_interrupt_leaves_a_mode_only_until_removal():
    model, (x, _) = net(fails=KeyboardInterrupt), batch()
    looking = Capture(model)
    looking.install()
    with pytest.raises(KeyboardInterrupt):
        model(x)
    with torch.device("cpu"):  # a mode of the user's, above ours
        looking.remove()
        assert modes() == 1
    assert modes() == 0


def test_failing_hooks_of_the_user_do_not_confuse_the_frames():
    model, (x, _) = net(), batch()
    handle = model.up.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("planted")))
    looking = Capture(model)
    looking.install()
    with pytest.raises(RuntimeError, match="planted"):
        model(x)
    handle.remove()
    model(x)
    looking.remove()
    assert modes() == 0 and looking.seen.passes == 2 and "head" in looking.seen.activations


@pytest.mark.parametrize("removed", [True, False])
def test_no_reference_to_the_model_survives(removed):
    model, (x, y) = net(), batch()
    looking = Capture(model, ("head",))
    looking.install()
    F.cross_entropy(model(x), y).backward()
    gone = weakref.ref(model), weakref.ref(model.head.weight)
    if removed:
        looking.remove()
    del model
    gc.collect()
    assert [r() for r in gone] == [None, None]
    looking.remove()
    with pytest.raises(ReferenceError, match="keep a reference"):
        looking.install()


def test_no_activation_is_held():
    alive = []

    class Spy(nn.Module):
        def forward(self, x):
            q = x * 2
            z = q @ q.mT
            alive.extend(weakref.ref(t) for t in (q, z))
            return z.softmax(-1) @ q

    model = nn.Sequential(Spy(), nn.Linear(cases.D, 3))
    with torch.no_grad(), capture(model) as seen:
        model(cases.inputs())
        assert len(alive) == 2 and not any(r() is not None for r in alive)
    assert list(seen.attention) == ["0"]


def test_copies_and_files_of_the_model_carry_no_watching_along():
    model, (x, _) = net(), batch()
    looking = Capture(model)
    looking.install()
    twin = copy.deepcopy(model)
    torch.save(model.head, file := io.BytesIO())
    file.seek(0)
    head = torch.load(file, weights_only=False)
    twin(x), head(torch.zeros(1, 12))
    looking.remove()
    assert looking.seen.passes == 0
