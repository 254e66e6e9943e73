"""Problems: precision, modes, conventions, and that nothing of the user's moves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.curvature.cases import Tied, per_token
from tests.curvature.test_problem import close, drawn, flat_gradient, network
from tests.state import fingerprint
from towtank.problem import Problem

# Precision (pitfall 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_measured_in_float32(dtype):
    x, y = drawn()
    half = network(nn.LayerNorm(4)).to(dtype)
    half[2].weight = nn.Parameter(half[2].weight.float())  # mixed, as mixed-precision training leaves it
    problem = Problem(half, F.cross_entropy, (x.to(dtype), y))
    assert problem.dtype == torch.float32
    wide = network(nn.LayerNorm(4))
    wide.load_state_dict({k: v.float() for k, v in half.state_dict().items()})
    want = flat_gradient(F.cross_entropy(wide(x.to(dtype).float()), y), wide.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert close(problem.gradient()[1], want)


def test_float64_stays_and_can_be_asked_for():
    x, y = drawn()
    model = network(nn.Tanh())
    assert Problem(model.double(), F.cross_entropy, (x.double(), y)).dtype == torch.float64
    wide = Problem(model.float(), nn.CrossEntropyLoss(weight=torch.ones(3)), (x, y), precision=torch.float64)
    value = wide.value()
    assert wide.gradient()[1].dtype == torch.float64
    assert value == pytest.approx(F.cross_entropy(model.double()(x.double()), y).item(), rel=1e-14)


# Modes (pitfalls 3 and 4)


def test_batchnorm_in_both_modes():
    x, y = drawn()
    model = network(nn.BatchNorm1d(4), nn.Tanh()).train()
    model[1].running_mean.fill_(0.3)
    before = fingerprint(model)
    trained, evaluated = (Problem(model, F.cross_entropy, (x, y), mode=m).value() for m in ("train", "eval"))
    assert fingerprint(model) == before
    assert close(evaluated, F.cross_entropy(model.eval()(x), y))
    assert close(trained, F.cross_entropy(model.train()(x), y))
    assert trained != evaluated


def test_batchnorm_refuses_micro_batches_unless_asked():
    x, y = drawn()
    model = network(nn.BatchNorm1d(4), nn.Tanh()).train()
    data = list(zip(x.split(6), y.split(6)))
    with pytest.raises(ValueError, match="micro_batches=True"):
        Problem(model, F.cross_entropy, data, mode="train").value()
    asked = Problem(model, F.cross_entropy, data, mode="train", micro_batches=True)
    assert close(asked.value(), torch.stack([F.cross_entropy(model(a), b) for a, b in data]).mean())
    assert "each batch" in asked.convention
    assert close(
        Problem(network(nn.Tanh()), F.cross_entropy, data, mode="train").value(),
        F.cross_entropy(network(nn.Tanh())(x), y),
    )


def test_dropout_is_off_or_fixed():
    x, y = drawn()
    model = network(nn.Dropout(0.5))
    data = list(zip(x.split(6), y.split(6)))
    off, on = (Problem(model, F.cross_entropy, data, dropout=d) for d in (False, True))
    assert close(off.value(), F.cross_entropy(model.eval()(x), y))
    assert on.value() == on.value() != off.value()
    assert on.replace(seed=1).value() != on.value()
    alone = [on.batch(i) for i in range(2)]
    assert close(on.value(), sum(p.value() for p in alone) / 2)  # a batch keeps its masks when it is taken out
    with pytest.raises(IndexError, match="2"):
        on.batch(2)


def test_state_is_untouched():
    x, y = drawn()

    class Remembers(nn.Module):
        def forward(self, x):
            self.last = x  # would keep the graph alive
            self.calls = getattr(self, "calls", 0) + 1
            return x

    model = network(nn.BatchNorm1d(4), Remembers(), nn.Dropout(0.1)).train()
    model[2].eval()  # a mode that `train()` would not give
    model[0].register_forward_hook(lambda m, i, o: None)
    optimizer = torch.optim.AdamW(model.parameters())
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    before = fingerprint(model, optimizer)
    for options in ({}, {"mode": "train"}, {"mode": "train", "dropout": True}, {"params": "0.*"}):
        problem = Problem(model, F.cross_entropy, (x, y), **options)
        problem.value()
        problem.gradient()
        assert problem.versions() == problem.versions()
        assert fingerprint(model, optimizer) == before
    with torch.inference_mode():  # whatever surrounds the call
        assert problem.gradient()[1].norm() > 0
    assert fingerprint(model, optimizer) == before


def test_versions_move_with_every_kind_of_change():
    model = network(nn.BatchNorm1d(4))
    problem = Problem(model, F.cross_entropy, drawn())

    def step():
        torch.optim.SGD(model.parameters(), lr=0.1).step()

    changes = [
        lambda: torch.nn.init.ones_(model[0].bias),
        lambda: model[0].weight.data.mul_(2),
        lambda: setattr(model[0].bias, "data", torch.zeros(4)),
        lambda: setattr(model[2], "weight", nn.Parameter(torch.ones(3, 4))),
        lambda: model[1].running_var.add_(1),
        lambda: (F.cross_entropy(model(drawn()[0]), drawn()[1]).backward(), step()),
    ]
    for change in changes:
        before = problem.versions()
        change()
        assert problem.versions() != before


# Convention (pitfall 15)


def test_convention_says_which_loss():
    x, y = drawn()
    y[0] = -100
    problem = Problem(network(), F.cross_entropy, [(x, y), (x, y)], params="0.*", mode="train", dropout=True)
    assert problem.convention == (
        "mean of cross_entropy over 22 terms in 2 batches, 24 of 39 parameters of Sequential, statistics of each batch, "
        "dropout on, masks fixed, float32, no weight decay"
    )
    assert Problem(Tied(), per_token, (torch.ones(1, 2).long(),) * 2).convention.startswith(
        "mean of per_token over 2 terms"
    )
