"""Every optimizer inside ensembles: members as trained alone, as by the torch optimizer, with curvature samples of their own."""

from __future__ import annotations

import math
import sys

import pytest
import torch

import towtank.optim
from towtank.losses import cross_entropy
from towtank.optim import OPTIMIZERS, rule_of
from towtank.scaling import plan as plans
from towtank.train import digits, samples
from towtank.train.cells import build_ensemble, build_task, describe, train_cells
from towtank.train.settings import Training
from towtank.train.tasks import digits as digits_task

TASK = "towtank.train.tasks:digits"
BASE = {"task": TASK, "width": 6, "depth": 2, "batch": 8, "steps": 4, "signal_every": 4, "precision": "float64"}
TOKENS = {"width": 32, "depth": 1, "context": 32, "batch": 16, "heldout_batches": 1, "precision": "float64"}
PLAIN = {"warmup": 0.0, "schedule": "constant", "weight_decay": 0.0, "clip": math.inf}
CURVED = [name for name in OPTIMIZERS if rule_of(name).curvature]


def step(ensemble, count: int) -> None:
    seeds = [m.seed for m in ensemble.members]
    for index in range(count):
        batches = [ensemble.task.data.batch(s, index) for s in seeds]
        ensemble.step(tuple(torch.stack(x) for x in zip(*batches, strict=True)), 1.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_member_is_what_it_is_alone(name: str) -> None:
    # dead units, and tokens that do not occur, leave gradients whose null space has no basis of its own, so those that take an
    # SVD get a model without, and more tokens than its width
    base = BASE if name not in ("Fira", "GaLore") else TOKENS
    cells = [base | {"optimizer": name, "lr": lr, "seed": seed} for lr, seed in ((1e-3, 0), (1e-2, 1), (3e-3, 1))]
    together, alone = build_ensemble(cells)[0], build_ensemble(cells[1:2])[0]
    step(together, 3)
    step(alone, 3)
    for p in together.params:  # float64 throughout: what rounding of three steps can make
        torch.testing.assert_close(together.params[p][1:2], alone.params[p], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n not in CURVED])
def test_a_member_is_what_the_torch_optimizer_makes_of_it(name: str) -> None:
    """Learning rates of 0.01: large against what a wrong default or role would leave unchanged."""
    cell = BASE | PLAIN | {"optimizer": name, "lr": 1e-2, "seed": 3, "beta2": 0.95}
    ensemble = build_ensemble([cell])[0]
    task = build_task(cell)
    model = task.model.double()
    roles = plans.roles(model, head=task.head)
    groups = [{"params": [p], "role": roles[n]} for n, p in model.named_parameters()]
    numbers = rule_of(name).hyper()._asdict()
    betas = {"betas": (numbers["beta1"], 0.95)} if "beta2" in numbers else {}
    optimizer = getattr(towtank.optim, name)(groups, lr=1e-2, weight_decay=0.0, **betas)
    for index in range(3):
        inputs, targets = task.data.batch(3, index)
        optimizer.zero_grad()
        cross_entropy(model(inputs.double()), targets).backward()
        optimizer.step()
    step(ensemble, 3)
    for n, p in model.named_parameters():
        torch.testing.assert_close(ensemble.params[n][0], p.detach(), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["AdamP", "AdamW", "SGD"])
@pytest.mark.parametrize("decay", ["independent", "coupled"])
def test_weight_decay_is_the_same_for_rules_that_decay_themselves(name: str, decay: str) -> None:
    """With no gradient (zero inputs, biases apart) a first-layer weight only decays: by lambda, or by lr lambda.

    AdamP takes a tenth of it on weights whose gradient is orthogonal to them, as no gradient is.
    """
    cell = BASE | PLAIN | {"optimizer": name, "lr": 0.5, "weight_decay": 0.125, "decay": decay}
    ensemble = build_ensemble([cell])[0]
    weight = ensemble.params["layers.0.weight"].clone()
    ensemble.step((torch.zeros(1, 4, 64), torch.zeros(1, 4, dtype=torch.long)), 1.0)
    kept = 1 - (0.125 if decay == "independent" else 0.5 * 0.125) * (0.1 if name == "AdamP" else 1)
    torch.testing.assert_close(ensemble.params["layers.0.weight"], kept * weight, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["GaLore", "MFAC", "SGDSaI", "SophiaG", "SophiaH"])
def test_a_member_that_is_lost_disturbs_nobody(name: str) -> None:
    cells = [BASE | PLAIN | {"optimizer": name, "lr": lr, "precision": "float32"} for lr in (1e-3, 1e30)]
    sound, lost = train_cells(cells)
    assert lost.status == "diverged" and sound.final == pytest.approx(train_cells(cells[:1])[0].final, abs=1e-6)


@pytest.mark.parametrize(("name", "expected"), [("AdaHessian", 11), ("SophiaG", 2), ("SophiaH", 2)])
def test_curvature_is_seen_as_often_as_the_rule_says(name: str, expected: int) -> None:
    ensemble = build_ensemble([BASE | {"optimizer": name, "lr": 1e-3}])[0]
    step(ensemble, 11)
    assert ensemble._optimizer.observed == expected
    if name == "SophiaG":
        assert ensemble._optimizer.hyper.bs.tolist() == [8.0]  # labels in a batch


def test_signed_samples_have_the_diagonal_for_their_mean() -> None:
    """Two members, each its own quadratic x'Ax/2: the mean of n samples is A_ii within 6 sqrt(sum_j!=i A_ij^2 / n)."""
    a = torch.randn(2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = a + a.mT
    x = {"x": torch.ones(2, 4, dtype=torch.float64)}

    def losses(p: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.einsum("ei,eij,ej->e", p["x"], a, p["x"]) / 2

    n = 400
    drawn = torch.stack([samples.signed(losses, x, [0, 1], count)["x"] for count in range(n)])
    off = (a.square().sum(-1) - a.diagonal(dim1=1, dim2=2).square()) / n
    assert ((drawn.mean(0) - a.diagonal(dim1=1, dim2=2)).abs() < 6 * off.sqrt()).all()
    alone = samples.signed(lambda p: losses({"x": p["x"].expand(2, 4)})[1:], {"x": x["x"][1:]}, [1], 7)["x"]
    torch.testing.assert_close(alone[0], drawn[7, 1], rtol=1e-12, atol=1e-12)


def test_labels_follow_the_softmax_and_depend_on_the_members_seed_alone() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0]).expand(2, 20_000, 4)
    drawn = samples.labels(logits, [5, 9], 2)
    share = torch.stack([(drawn == c).double().mean(1) for c in range(4)], 1)
    p = logits[0, 0].double().softmax(-1)
    assert ((share - p).abs() < 6 * (p * (1 - p) / 20_000).sqrt()).all()
    assert not torch.equal(drawn[0], drawn[1]) and torch.equal(samples.labels(logits[:1], [9], 2)[0], drawn[1])


def test_labels_cannot_be_sampled_without_logits() -> None:
    with pytest.raises(ValueError, match="optimizer = 'SophiaG': expected a task whose outputs are logits"):
        build_ensemble([{"task": f"{__name__}:without_logits", "lr": 0.1, "optimizer": "SophiaG"}])


def without_logits():
    import dataclasses

    return dataclasses.replace(digits_task(width=4), outputs_are_logits=False)


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="optimizer = 'adam': expected AdaBelief | "):
        Training(optimizer="adam")
    for name in ("SGD", "Muon"):
        with pytest.raises(ValueError, match=f"optimizer = '{name}': expected .* under mup; take sp"):
            describe({"width": 32, "lr": 0.1, "parametrization": "mup", "optimizer": name})
    assert Training(parametrization="mup", optimizer="Lion").optimizer == "Lion"


def test_what_a_rule_demands_of_weights_holds_from_the_start() -> None:
    ensemble = build_ensemble([BASE | {"optimizer": "Nero", "lr": 0.01, "seed": s} for s in (0, 1)])[0]
    norms = ensemble.params["layers.1.weight"].flatten(2).norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-12, atol=0)


def test_extra_passes_and_state_are_in_the_plan() -> None:
    costs = {name: describe(BASE | {"lr": 1.0, "optimizer": name}) for name in ("AdamW", "AdaHessian", "Lion")}
    assert costs["AdaHessian"].flops_per_step == 2 * costs["AdamW"].flops_per_step
    assert costs["AdamW"].member_bytes - costs["Lion"].member_bytes == 4 * costs["AdamW"].parameters


def test_digits_are_the_same_for_everyone_and_the_held_out_ones_are_never_trained_on() -> None:
    data = digits.Digits(32)
    images, labels = data.batch(1, 2)
    assert torch.equal(images, data.batch(1, 2)[0]) and not torch.equal(images, data.batch(1, 3)[0])
    assert images.shape == (32, 64) and 0 <= images.min() and images.max() == 1 and labels.dtype == torch.long
    ((held, _),) = data.heldout()
    trained = {tuple(row) for step_ in range(40) for row in data.batch(0, step_)[0].tolist()}
    assert len(held) == 360 and len({tuple(row) for row in held.tolist()} & trained) == 0
    with pytest.raises(ValueError, match="depth = 0: expected 1 or more"):
        digits_task(width=4, depth=0)


def test_without_scikit_learn_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    digits._load.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="pip install 'towtank.digits.'"):
        digits_task(width=4).data.heldout()
