"""A member of an ensemble comes out as if trained alone by an ordinary PyTorch loop, written here from the definitions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tests import problems
from tests.problems import PROBLEMS, Numbers, digits_task
from towtank.scaling import plan as plans
from towtank.train.cells import build_ensemble, canonical, train_cells
from towtank.train.ensemble import Ensemble
from towtank.train.loop import train
from towtank.train.settings import Member, Training

MEMBERS = [
    {"lr": 3e-3, "seed": 0, "weight_decay": 1e-4, "z_loss": 1e-4},
    {"lr": 3e-2, "seed": 1, "weight_decay": 1e-2, "z_loss": 0.0, "beta1": 0.8, "beta2": 0.99},
    {"lr": 1e-3, "seed": 0, "weight_decay": 0.0, "z_loss": 1e-2, "clip": 0.3, "eps": 1e-6},
    {"lr": 1e-2, "seed": 2, "weight_decay": 1e-4, "z_loss": 1e-4, "clip": math.inf},
]


def solo_losses(task, member: Member, training: Training) -> list[float]:
    """The same run by nn.Module, torch.optim.AdamW and clip_grad_norm_; independent decay is lambda / lr (nanodo's way)."""
    model = copy.deepcopy(task.model).to(getattr(torch, training.precision))
    decay = member.weight_decay / member.lr if training.decay == "independent" else member.weight_decay
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=member.lr, betas=(member.beta1, member.beta2), eps=member.eps, weight_decay=decay
    )
    rise = round(training.warmup * training.steps)

    def cosine(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / (training.steps - rise)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    losses = []
    for step in range(training.steps):
        inputs, targets = task.data.batch(member.seed, step)
        if inputs.is_floating_point():
            inputs = inputs.to(getattr(torch, training.precision))
        outputs = model(inputs)
        loss = task.loss(outputs, targets)
        total = loss + member.z_loss * torch.logsumexp(outputs, -1).pow(2).mean() if member.z_loss else loss
        optimizer.zero_grad()
        total.backward()
        if math.isfinite(member.clip):
            nn.utils.clip_grad_norm_(model.parameters(), member.clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def ensemble_losses(tasks, members, training: Training) -> torch.Tensor:
    model = tasks[0].model
    roles, shapes = plans.roles(model), plans.shapes(model)
    ensemble = Ensemble(
        [copy.deepcopy(t) for t in tasks], members, plan=plans.plan("sp", shapes, shapes, roles, decay=training.decay),
        roles=roles, decay=training.decay, dtype=getattr(torch, training.precision),
    )  # fmt: skip
    return torch.stack([s.loss for s in train(ensemble, training) if s.loss is not None])


@pytest.mark.parametrize("decay", ["independent", "coupled"])
@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_member_equals_its_solo_run_in_float64(name: str, decay: str) -> None:
    training = Training(steps=30, precision="float64", decay=decay, signal_every=7)
    members = [Member(**numbers) for numbers in MEMBERS]
    tasks = [PROBLEMS[name](seed=m.seed) for m in members]
    if not tasks[0].outputs_are_logits:
        members = [Member(**{**numbers, "z_loss": 0.0}) for numbers in MEMBERS]
    together = ensemble_losses(tasks, members, training)
    alone = torch.tensor(
        [solo_losses(t, m, training) for t, m in zip(tasks, members, strict=True)], dtype=torch.float64
    ).T
    assert (together - alone).abs().max() < 1e-9


def test_member_equals_its_solo_run_in_float32() -> None:
    """Rounding of two orders of summation grows with training; float64 against float32 of the *same* solo loop says how
    much, and the ensemble may differ from the float32 solo run by no more than a few times that."""
    members = [Member(**numbers) for numbers in MEMBERS]
    tasks = [PROBLEMS["gpt"](seed=m.seed) for m in members]
    single, double = Training(steps=30), Training(steps=30, precision="float64")
    together = ensemble_losses(tasks, members, single)
    for index, (task, member) in enumerate(zip(tasks, members, strict=True)):
        exact = torch.tensor(solo_losses(task, member, double), dtype=torch.float64)
        rounded = torch.tensor(solo_losses(task, member, single), dtype=torch.float64)
        noise = (rounded - exact).abs().max()
        assert (together[:, index] - exact).abs().max() < 4 * noise + 1e-6


def test_diverged_member_is_frozen_and_disturbs_nobody() -> None:
    calm = [Member(lr=1e-3, seed=0), Member(lr=3e-3, seed=1)]
    wild = Member(lr=1e30, seed=0, clip=math.inf)
    training = Training(steps=20, precision="float64", signal_every=1)
    together = ensemble_losses([digits_task(seed=s) for s in (0, 0, 1)], [calm[0], wild, calm[1]], training)
    without = ensemble_losses([digits_task(seed=s) for s in (0, 1)], calm, training)
    assert torch.equal(together[:, [0, 2]], without)


def test_diverged_member_keeps_its_last_finite_parameters() -> None:
    cells = [
        {"task": "tests.problems:digits_task", "lr": lr, "clip": math.inf, "steps": 12, "signal_every": 1}
        for lr in (1e-3, 1e30)
    ]
    ensemble, training = build_ensemble(cells)
    snapshots, deaths = [], None
    for step in train(ensemble, training):
        snapshots.append({n: p.clone() for n, p in ensemble.params.items()})
        if deaths is None and not step.alive[1]:
            deaths = step.step
    assert deaths is not None and deaths < training.steps
    for name, last in snapshots[-1].items():
        assert torch.isfinite(last).all()
        assert torch.equal(snapshots[deaths][name][1], last[1])
        assert not torch.equal(snapshots[deaths][name][0], last[0])


def test_a_nan_in_the_data_is_an_error_of_the_data_not_a_divergence() -> None:
    cells = [{"task": "tests.problems:poisoned_task", "lr": 1e-3, "seed": s, "steps": 8} for s in (0, 1)]
    with pytest.raises(ValueError, match="inputs of batch 3 of seed 1"):
        train_cells(cells)
    assert train_cells(cells[:1])[0].status == "done"


def test_no_held_out_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one held-out batch"):
        train_cells([{"task": "tests.problems:poisoned_task", "lr": 1e-3, "heldout": 0}])


def test_divergence_is_dated_and_explained_between_recordings() -> None:
    cell = {
        "task": "tests.problems:digits_task",
        "lr": 1e30,
        "clip": math.inf,
        "steps": 50,
        "signal_every": 25,
        "warmup": 0,
    }
    (result,) = train_cells([cell])
    assert result.status == "diverged" and result.final is None
    assert result.steps < 10 and f"at step {result.steps}" in result.reason
    assert "loss" in result.reason and "last training loss before: 1." in result.reason
    assert all(step <= result.steps for curve in result.signals.values() for step, _ in curve)


def test_a_last_step_that_ruins_the_held_out_loss_is_divergence() -> None:
    cell = {"task": "tests.problems:digits_task", "lr": 1e4, "clip": math.inf, "steps": 1, "warmup": 0}
    (result,) = train_cells([cell])
    assert result.status == "diverged" and result.final is None and "held-out" in result.reason


def test_frozen_parameters_stay_and_the_rest_equals_the_solo_run() -> None:
    members = [Member(lr=1e-2, seed=0), Member(lr=1e-3, seed=1)]
    tasks = [PROBLEMS["gpt"](seed=m.seed) for m in members]
    for task in tasks:
        task.model.embedding.weight.requires_grad_(False)
        task.model.blocks[0].up.weight.requires_grad_(False)
    training = Training(steps=10, precision="float64")
    together = ensemble_losses(tasks, members, training)
    alone = [solo_losses(t, m, training) for t, m in zip(tasks, members, strict=True)]
    assert (together - torch.tensor(alone, dtype=torch.float64).T).abs().max() < 1e-9


def test_nothing_to_train_is_an_error() -> None:
    task = digits_task()
    task.model.requires_grad_(False)
    with pytest.raises(ValueError, match="requires a gradient"):
        ensemble_losses([task], [Member(lr=1e-2)], Training(steps=1))


def test_dropout_repeats_and_leaves_the_callers_generator_alone() -> None:
    cell = {"task": "tests.problems:dropout_task", "lr": 1e-2, "steps": 6}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = train_cells([cell])
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert first[0].curve == train_cells([cell])[0].curve


def test_data_that_depend_on_the_seed_are_refused() -> None:
    cells = [{"task": "tests.problems:seeded_data_task", "lr": 1e-2, "seed": s} for s in (0, 1)]
    with pytest.raises(ValueError, match="same data"):
        train_cells(cells)


def test_all_diverged_ends_early() -> None:
    steps = []
    cells = [{"task": "tests.problems:digits_task", "lr": 1e30, "clip": math.inf, "steps": 50, "signal_every": 5}]
    (result,) = train_cells(cells, on_step=lambda step, alive: steps.append(step))
    assert result.status == "diverged" and steps[-1] < 50


def test_loss_above_the_multiple_of_the_initial_one_is_divergence() -> None:
    cell = {"task": "tests.problems:digits_task", "lr": 1e3, "clip": math.inf, "steps": 50, "signal_every": 1}
    (strict,), (lax,) = (train_cells([{**cell, "diverged_at": at}]) for at in (1.5, 1e9))
    assert strict.status == "diverged"
    assert lax.steps > strict.steps


def test_mup_equals_standard_parametrization_with_hand_made_groups() -> None:
    """Independent muP: rates of matrices divided by m, logits divided by m, embedding and head drawn m^1/2 larger."""
    training = Training(steps=30, precision="float64", parametrization="mup", base_width=16)
    cell = {"task": "tests.problems:gpt_task", "width": 32, "lr": 1e-2, "seed": 3, "weight_decay": 1e-3, "z_loss": 0.0,
            "steps": 30, "precision": "float64", "parametrization": "mup", "base_width": 16, "signal_every": 1}  # fmt: skip
    losses = [s.loss.item() for s in train(*build_ensemble([cell])) if s.loss is not None]
    task = PROBLEMS["gpt"](seed=3, width=32)
    model = task.model.double()
    with torch.no_grad():
        model.embedding.weight *= 2**0.5
        model.head.weight *= 2**0.5
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and n not in ("embedding.weight", "head.weight")]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    groups = [
        {"params": matrices, "lr": 1e-2 / 2, "weight_decay": 1e-3 / (1e-2 / 2)},
        {"params": others, "lr": 1e-2, "weight_decay": 1e-3 / 1e-2},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    peaks = [1e-2 / 2, 1e-2]
    for step, seen in enumerate(losses):
        share = (step + 1) / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * (step - 3) / 27))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = share * peak
        inputs, targets = task.data.batch(3, step)
        loss = nn.functional.cross_entropy((model(inputs) / 2).flatten(0, 1), targets.flatten())
        assert abs(loss.item() - seen) < 1e-9, (step, training)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def test_signals_against_their_definitions() -> None:
    """One step at full warm-up from known parameters: every signal recomputed by hand for each member."""
    numbers = [Numbers(lr=1e-2, seed=0), Numbers(lr=1e-3, seed=1)]
    cells = [{"task": "tests.problems:gpt_task", "width": 16, "lr": n.lr, "seed": n.seed, "steps": 1, "warmup": 0.0,
              "precision": "float64"} for n in numbers]  # fmt: skip
    ensemble, training = build_ensemble(cells)
    *_, last = train(ensemble, training)
    for index, n in enumerate(numbers):
        task = PROBLEMS["gpt"](seed=n.seed, width=16)
        model = task.model.double()
        seen: list[torch.Tensor] = []
        hooks = [
            b.attention.qkv.register_forward_hook(lambda _m, _i, out, keep=seen: keep.append(out)) for b in model.blocks
        ]
        inputs, targets = task.data.batch(n.seed, 0)
        logits = model(inputs)
        nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        for hook in hooks:
            hook.remove()
        log_z = torch.logsumexp(logits, -1)
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
        signal = {name: v[index].item() for name, v in last.signals.items()}
        assert signal["grad_norm"] == pytest.approx(norm.item(), rel=1e-12)
        assert signal["log_z/mean"] == pytest.approx(log_z.mean().item(), rel=1e-12)
        assert signal["log_z/min"] == pytest.approx(log_z.min().item(), rel=1e-12)
        clipped = torch.cat([p.grad.flatten() for n_, p in model.named_parameters() if "blocks" in n_ and p.ndim == 2])
        clipped = clipped * min(1.0, 1.0 / (norm + 1e-6))
        direction = clipped / (clipped.abs() + 1e-8)  # Adam's first step
        assert signal["update_rms/matrix"] == pytest.approx(direction.square().mean().sqrt().item(), rel=1e-9)
        for block, out in zip(model.blocks, seen, strict=True):
            q, k = out.detach().unflatten(-1, (3, -1, block.attention.head_dim))[..., :2, :, :].unbind(-3)
            q, k = block.attention.q_norm(q), block.attention.k_norm(k)
            angle = torch.outer(
                torch.arange(q.shape[1]), 1e4 ** (-torch.arange(0, q.shape[-1], 2) / q.shape[-1])
            ).double()
            turn = torch.polar(torch.ones_like(angle), angle)[:, None]
            half = q.shape[-1] // 2
            q, k = (torch.view_as_real(torch.complex(x[..., :half], x[..., half:]) * turn).flatten(-2) for x in (q, k))
            scores = torch.einsum("bthk,bshk->bhts", q, k) / (2 * half) ** 0.5
            scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
            name = f"attention_logit_max/block{list(model.blocks).index(block)}"
            assert signal[name] == pytest.approx(scores.max().item(), rel=1e-5)


def test_nothing_of_the_callers_random_state_changes() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train_cells([{"task": "tests.problems:digits_task", "lr": 1e-3, "steps": 2, "seed": 1}])
    assert torch.equal(before, torch.get_rng_state())


def test_same_cell_same_numbers_bit_by_bit() -> None:
    cell = {"task": "tests.problems:gpt_task", "width": 16, "lr": 1e-2, "steps": 5, "seed": 1}
    first, second = train_cells([cell]), train_cells([cell])
    assert first[0].signals == second[0].signals and first[0].curve == second[0].curve


def test_batch_norm_members_keep_their_own_running_statistics() -> None:
    cells = [
        {"task": "tests.problems:batch_norm_task", "lr": lr, "steps": 3, "precision": "float64"} for lr in (1e-3, 1e-1)
    ]
    together = train_cells(cells)
    alone = [train_cells([c])[0] for c in cells]
    for a, b in zip(together, alone, strict=True):
        assert a.final == pytest.approx(b.final, abs=1e-9)
    assert together[0].final != pytest.approx(together[1].final, abs=1e-4)


def test_cells_that_differ_in_structure_are_refused() -> None:
    with pytest.raises(ValueError, match="differ only in"):
        train_cells([{"width": 32, "lr": 1e-3}, {"width": 64, "lr": 1e-3}])
    with pytest.raises(ValueError, match="at least one cell"):
        train_cells([])


@pytest.mark.parametrize("task", ["recurrent_task", "branching_task"])
def test_a_model_that_cannot_be_batched_trains_one_by_one_and_says_so(task: str) -> None:
    cells = [{"task": f"tests.problems:{task}", "lr": lr, "steps": 6, "precision": "float64"} for lr in (1e-3, 1e-2)]
    with pytest.warns(UserWarning, match="one after another"):
        results = train_cells(cells)
    training = Training(steps=6, precision="float64")
    for cell, result in zip(cells, results, strict=True):
        expected = solo_losses(getattr(problems, task)(seed=0), Member(lr=cell["lr"]), training)
        assert result.signals["train/loss"][-1] == (6, pytest.approx(expected[-1], abs=1e-9))


def test_an_error_of_the_models_own_is_raised_not_hidden() -> None:
    cells = [{"task": "tests.problems:broken_task", "lr": lr, "steps": 2} for lr in (1e-3, 1e-2)]
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train_cells(cells)


def test_cells_of_one_canonical_form_are_one_run() -> None:
    cell = {"task": "tests.problems:gpt_task", "width": 16, "lr": 1e-2, "steps": 4, "seed": 2, "base_width": 16}
    sp, mup = ({**cell, "parametrization": kind} for kind in ("sp", "mup"))
    wide = {**mup, "width": 32}
    assert canonical(sp) == canonical(mup) and canonical(wide) != canonical({**wide, "parametrization": "sp"})
    assert train_cells([sp])[0].signals == train_cells([mup])[0].signals


def test_initial_loss_is_each_seeds_own() -> None:
    cells = [{"task": "tests.problems:gpt_task", "width": 16, "lr": lr, "steps": 1, "seed": seed}
             for seed in (1, 0) for lr in (1e-3, 1e-2)]  # fmt: skip
    together = [r.initial for r in train_cells(cells)]
    alone = [train_cells([c])[0].initial for c in cells]
    assert together == pytest.approx(alone, rel=1e-6)
    assert together[0] == together[1] != together[2]
