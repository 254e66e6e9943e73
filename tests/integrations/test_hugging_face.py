"""The callback sees the losses and norms that the trainer itself reports, changes nothing, and leaves nothing behind."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from tests.signals.loops import equal, hooks
from towtank.integrations import HFMonitor
from towtank.signals.alarm import Alarm

STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def collections_are_cheap() -> Iterator[None]:
    """The trainer collects garbage at every start; what is alive before the tests need not be looked at each time."""
    gc.freeze()
    yield
    gc.unfreeze()


def model() -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=13, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        )  # with its dropout of 0.1


def rows(count: int = 32) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 13, (count, 8), generator=g)
    labels = tokens.clone()
    labels[:, :3][torch.rand(count, 3, generator=g) < 0.5] = -100  # parts with different numbers of terms
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels)]


def trainer(
    folder: Path, callbacks: list[TrainerCallback], network: nn.Module | None = None, **options: Any
) -> Trainer:
    more = {k: options.pop(k) for k in ("compute_loss_func", "cls") if k in options}
    given = {"max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2, "seed": 1}
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(output_dir=str(folder), **(given | fixed | options))
    return more.pop("cls", Trainer)(
        model=network or model(), args=args, train_dataset=rows(), eval_dataset=rows(8), callbacks=callbacks, **more
    )


def logged(run: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


def failures(callback: HFMonitor) -> list[str]:
    return [f"{probe}: {text}" for _, probe, text in callback.monitor.notes if text.startswith("failed")]


def close(ours: Any, theirs: list[float]) -> bool:
    """Equal within the rounding of float32 in sums of two parts and norms of norms: a few eps of 1.2e-7."""
    return ours.tolist() == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("parts", [1, 2])
def test_losses_and_norms_are_those_the_trainer_reports(tmp_path: Path, parts: int) -> None:
    callback = HFMonitor(every=1)
    run = trainer(tmp_path, [callback], gradient_accumulation_steps=parts, max_grad_norm=1e-3)
    run.train()
    history = callback.monitor.history
    assert callback.monitor.number == STEPS and callback.monitor.status == "done"
    assert close(history["train/loss"][1], logged(run, "loss"))
    assert close(history["grad/norm_before_clip"][1], logged(run, "grad_norm"))
    assert history["grad/norm"][1] == pytest.approx(1e-3, rel=1e-2)  # clip_grad_norm_ divides by norm + 1e-6
    assert history["train/lr"][1].tolist() == pytest.approx(logged(run, "learning_rate"))
    assert hooks(run.model, callback.monitor.optimizer) == []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True},
        {"eval_strategy": "steps", "eval_steps": 1},
        {"optim": "sgd", "label_smoothing_factor": 0.1},
    ],
    ids=str,
)
def test_the_training_is_the_same_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    bare = trainer(tmp_path, [], **options)
    bare.train()
    callback = HFMonitor(every=1, budget=1.0)
    watched = trainer(tmp_path, [callback], **options)
    watched.train()
    assert equal(bare.model, watched.model)
    assert logged(bare, "loss") == logged(watched, "loss")
    assert callback.monitor.number == STEPS
    assert not failures(callback)


def test_evaluations_do_not_count(tmp_path: Path) -> None:
    seen: list[int] = []

    class Passes:
        needs = frozenset({"seen"})

        def __call__(self, step: Any) -> dict[str, float]:
            seen.append(step.seen.passes)
            return {}

    callback = HFMonitor(probes=[Passes()], every=1)
    options = {"eval_strategy": "steps", "eval_steps": 1, "gradient_accumulation_steps": 2}
    run = trainer(tmp_path, [callback], **options)
    run.train()
    assert seen == [2] * STEPS
    assert close(callback.monitor.history["train/loss"][1], logged(run, "loss"))


class Looks(Trainer):
    """Runs the model without a graph first, as losses with a reference do."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            model(**{**inputs, "labels": inputs["input_ids"]})
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_forward_passes_without_a_graph_do_not_count(tmp_path: Path) -> None:
    callback = HFMonitor(probes=[])
    run = trainer(tmp_path, [callback], cls=Looks)
    run.train()
    assert close(callback.monitor.history["train/loss"][1], logged(run, "loss"))


def test_the_batch_is_the_last_part(tmp_path: Path) -> None:
    batches: list[Any] = []
    callback = HFMonitor(probes=[lambda step: batches.append(step.batch) or {}], every=1)
    run = trainer(tmp_path, [callback], gradient_accumulation_steps=2)
    run.train()
    assert [set(batch) for batch in batches] == [{"input_ids", "labels"}] * STEPS
    assert all(batch["labels"].shape == (4, 8) for batch in batches)


def test_what_needs_the_loss_again_gets_the_models_loss(tmp_path: Path) -> None:
    found: list[tuple[float, float]] = []

    def both(step: Any) -> dict[str, float]:
        network = step.model
        was = network.training
        network.eval()
        with torch.no_grad():
            theirs = float(network(**step.batch).loss)
        network.train(was)
        found.append((step.problem_of(step.batch).value(), theirs))
        return {}

    run = trainer(tmp_path, [HFMonitor(probes=[both], every=1)])
    run.train()
    assert len(found) == STEPS
    assert all(a == pytest.approx(b, rel=1e-5) for a, b in found)


def smooth(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
    logits, targets = outputs["logits"][:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return F.cross_entropy(logits, targets, label_smoothing=0.2, reduction="sum") / num_items_in_batch


def test_a_loss_that_the_trainer_computes(tmp_path: Path) -> None:
    blind = HFMonitor(every=1)
    trainer(tmp_path, [blind], compute_loss_func=smooth).train()
    assert "train/loss" not in blind.monitor.history and blind.monitor.status == "done"
    assert any("watch(function)" in text for _, _, text in blind.monitor.notes)
    assert not blind.alarms
    assert len(blind.monitor.history["grad/norm"][1]) == STEPS

    batches: list[Any] = []
    callback = HFMonitor(probes=[lambda step: batches.append(step.batch) or {}], every=1)
    run = trainer(tmp_path, [callback], compute_loss_func=callback.watch(smooth), gradient_accumulation_steps=2)
    run.train()
    assert close(callback.monitor.history["train/loss"][1], logged(run, "loss"))
    assert all("labels" in batch for batch in batches)


def test_a_label_smoother_and_a_compute_loss_can_be_watched(tmp_path: Path) -> None:
    callback = HFMonitor(probes=[])
    run = trainer(tmp_path, [callback], label_smoothing_factor=0.1)
    run.label_smoother = callback.watch(run.label_smoother)
    run.train()
    assert close(callback.monitor.history["train/loss"][1], logged(run, "loss"))

    class Doubled(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().compute_loss(*args, **kwargs)

    callback = HFMonitor(probes=[])
    run = trainer(tmp_path, [callback], cls=Doubled, gradient_accumulation_steps=2)
    run.compute_loss = callback.watch(run.compute_loss)
    run.train()
    assert close(callback.monitor.history["train/loss"][1], logged(run, "loss"))


def alarm_at(step: int) -> Callable[..., Any]:
    def rule(history: Any, now: Any) -> Any:
        if now.number == step:
            yield Alarm(
                name="drill",
                step=step,
                message="a drill",
                source="us",
                suggestion="go on",
                key="train/loss",
                value=0.0,
                limit=0.0,
            )

    return rule


def test_an_alarm_stops_the_training(tmp_path: Path) -> None:
    out = tmp_path / "run"
    callback = HFMonitor(rules=[alarm_at(2)], on_alarm="stop", out=out, probes=[])
    run = trainer(tmp_path, [callback])
    run.train()
    assert run.state.global_step == 2 and callback.monitor.status == "stopped"
    assert [a.name for a in callback.alarms] == ["drill"]
    [record] = (out / "records").glob("*.json")
    assert json.loads(record.read_text())


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    first = HFMonitor(every=1)
    trainer(tmp_path, [first], max_steps=2, save_strategy="steps", save_steps=2).train()
    second = HFMonitor(every=10)
    run = trainer(tmp_path, [second])
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert second.monitor.history["train/loss"][0].tolist() == [3]
    assert any(key.startswith("parameter/rms/") for key, _ in second.monitor.history.items())


class Breaks(TrainerCallback):
    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        raise OSError("the disk is full")


def failed(tmp_path: Path, callback: HFMonitor, network: nn.Module) -> Trainer:
    run = trainer(tmp_path, [callback, Breaks()], network, gradient_accumulation_steps=2)
    with pytest.raises(OSError, match="disk"):
        run.train()
    return run


def test_a_failed_training_leaves_no_hooks_once_the_callback_is_gone(tmp_path: Path) -> None:
    network, callback = model(), HFMonitor(every=1)
    run = failed(tmp_path, callback, network)
    optimizer = callback.monitor.optimizer
    assert hooks(network, optimizer)  # the trainer says nothing, so they are still there
    del run, callback
    gc.collect()
    assert hooks(network, optimizer) == []


def test_a_failed_training_in_a_block_and_the_next_one(tmp_path: Path) -> None:
    network, callback = model(), HFMonitor(every=1, out=tmp_path / "run")
    with pytest.raises(OSError, match="disk"), callback:
        trainer(tmp_path, [callback, Breaks()], network, gradient_accumulation_steps=2).train()
    assert hooks(network, callback.monitor.optimizer) == [] and callback.monitor.status == "failed"
    again = trainer(tmp_path, [callback], network)
    again.train()
    assert callback.monitor.status == "done" and callback.monitor.number == STEPS
    assert hooks(network, callback.monitor.optimizer) == []


def test_readings_in_the_trainers_own_log(tmp_path: Path) -> None:
    callback = HFMonitor(every=1, log=["update/ratio_*", "grad/norm"])
    run = trainer(tmp_path, [callback])
    run.train()
    assert logged(run, "grad/norm") == callback.monitor.history["grad/norm"][1].tolist() + [
        callback.monitor.history.last("grad/norm")
    ]  # the last entry is the summary of the training
    assert "update/ratio_max" in run.state.log_history[0] and "train/loss" not in run.state.log_history[0]


class Tiny(nn.Module):
    """Small enough to be compiled in a second."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(13, 4), nn.Linear(4, 13)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        logits = self.head(self.embedding(input_ids))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class NeedsLabels(Tiny):
    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        return super().forward(input_ids, labels)


def test_a_compiled_model(tmp_path: Path) -> None:
    options: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "eager"}
    callback = HFMonitor(every=2, budget=1.0)
    run = trainer(tmp_path, [callback], Tiny(), **options)
    run.train()
    assert not failures(callback)
    assert "activation/rms/head" in callback.monitor.history  # its batch was run again
    assert close(callback.monitor.history["train/loss"][1], logged(run, "loss"))


def test_a_model_that_cannot_be_run_without_its_labels_is_trained_all_the_same(tmp_path: Path) -> None:
    callback = HFMonitor(every=1, budget=1.0)
    run = trainer(tmp_path, [callback], NeedsLabels())
    run.train()
    assert close(callback.monitor.history["train/loss"][1], logged(run, "loss"))
    assert failures(callback)  # of curvature; forward= would say how it is run


def test_sharded_parameters_are_refused() -> None:
    state, control = SimpleNamespace(global_step=0), SimpleNamespace()
    with pytest.raises(ValueError, match="expected whole parameters in every process, got fsdp"):
        HFMonitor().on_train_begin(SimpleNamespace(fsdp="full_shard", deepspeed=None), state, control, model=model())
