"""The callback sees what the module itself sees in its own hooks, changes nothing, and leaves nothing behind."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.signals.loops import equal, hooks
from towtank.integrations import LightningMonitor
from towtank.signals.alarm import Alarm

STEPS = 4


@pytest.fixture(autouse=True)
def random_numbers_stay() -> Any:
    with torch.random.fork_rng():
        yield


class Net(LightningModule):
    """A classifier that keeps the loss of each part and the gradient norm of each step, in its own hooks."""

    def __init__(self, *, fails_at: int | None = None) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.fails_at = fails_at

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        if index == self.fails_at:
            raise OSError("the disk is full")
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self(batch[0])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.norms.append(float(torch.cat([g.reshape(-1) for g in gradients]).norm()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def loader(count: int = 64) -> DataLoader[Any]:
    g = torch.Generator().manual_seed(0)
    rows = TensorDataset(torch.randn(count, 6, generator=g), torch.randint(3, (count,), generator=g))
    return DataLoader(rows, batch_size=4)


def fit(module: LightningModule, callbacks: list[Any], **options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    given = {"accelerator": "cpu", "max_steps": STEPS, "num_sanity_val_steps": 1, "val_check_interval": 1}
    validation = loader(8) if not options.pop("no_validation", False) else None
    trainer = Trainer(**(quiet | given | options), callbacks=callbacks)
    seed_everything(0, verbose=False)
    trainer.fit(module, loader(), validation, ckpt_path=None)
    return trainer


@pytest.mark.parametrize("parts", [1, 3])
def test_losses_and_norms_are_those_of_the_module(parts: int) -> None:
    module, callback = Net(), LightningMonitor(loss=F.cross_entropy, every=1)
    fit(module, [callback], accumulate_grad_batches=parts, gradient_clip_val=0.1)
    history = callback.monitor.history
    means = torch.tensor(module.losses, dtype=torch.float64).view(STEPS, parts).mean(dim=1).tolist()
    assert callback.monitor.number == STEPS and callback.monitor.status == "done"
    # float32: a few roundings of 6e-8 for the sum, and for a norm over 107 squares in another order
    assert history["train/loss"][1].tolist() == pytest.approx(means, rel=1e-6)
    assert history["grad/norm_before_clip"][1].tolist() == pytest.approx(module.norms, rel=1e-6)
    assert max(history["grad/norm"][1]) == pytest.approx(0.1, rel=1e-4)  # clipping divides by norm + 1e-6
    assert hooks(module, callback.monitor.optimizer) == []


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}, {"gradient_clip_val": 0.1}], ids=str
)
def test_the_training_is_the_same_bit_for_bit(options: dict[str, Any]) -> None:
    bare, watched = Net(), Net()
    fit(bare, [], **options)
    callback = LightningMonitor(loss=F.cross_entropy, every=1, budget=1.0)
    fit(watched, [callback], **options)
    assert equal(bare, watched) and bare.losses == watched.losses
    assert callback.monitor.number == STEPS
    assert not [text for _, _, text in callback.monitor.notes if text.startswith("failed")], callback.monitor.notes


class Passes:
    needs = frozenset({"seen"})

    def __init__(self) -> None:
        self.found: list[int] = []

    def __call__(self, step: Any) -> dict[str, float]:
        self.found.append(step.seen.passes)
        return {}


def test_validation_does_not_count() -> None:
    probe = Passes()
    fit(Net(), [LightningMonitor(probes=[probe], every=1)], accumulate_grad_batches=2)
    assert probe.found == [2] * STEPS


def test_curvature_calls_the_module_and_the_given_loss() -> None:
    found: list[tuple[float, float]] = []

    def both(step: Any) -> dict[str, float]:
        x, y = step.batch
        with torch.no_grad():
            network = step.model.net
            network.eval()
            found.append((step.problem_of(step.batch).value(), float(F.cross_entropy(network(x), y))))
            network.train()
        return {}

    fit(Net(), [LightningMonitor(loss=F.cross_entropy, probes=[both], every=1, mode="eval")], max_steps=2)
    assert len(found) == 2 and all(a == pytest.approx(b, rel=1e-5) for a, b in found)


def test_parts_of_a_step_are_seen_where_the_module_is_called() -> None:
    sizes: list[Any] = []

    class Sizes:
        needs = frozenset({"micro"})

        def __call__(self, step: Any) -> dict[str, float]:
            sizes.append(step.micro.sizes)
            return {}

    fit(Net(), [LightningMonitor(probes=[Sizes()], every=1)], accumulate_grad_batches=2, max_steps=2)
    assert sizes == [(4, 4), (4, 4)]


def test_an_alarm_stops_the_training() -> None:
    def rule(history: Any, step: Any) -> Any:
        if step.number == 2:
            yield Alarm(
                name="drill",
                step=2,
                message="a drill",
                source="us",
                suggestion="go on",
                key="train/loss",
                value=0.0,
                limit=0.0,
            )

    callback = LightningMonitor(probes=[], rules=[rule], on_alarm={"drill": "stop"})
    trainer = fit(Net(), [callback])
    assert trainer.global_step == 2 and callback.monitor.status == "stopped"
    assert [a.name for a in callback.alarms] == ["drill"]


@pytest.mark.parametrize("held", [True, False])
def test_a_failed_training_leaves_no_hooks(held: bool, tmp_path: Path) -> None:
    module, callback = Net(fails_at=2), LightningMonitor(loss=F.cross_entropy, every=1, out=tmp_path)
    with pytest.raises(OSError, match="disk"):
        fit(module, [callback], no_validation=True)
    optimizer = callback.monitor.optimizer
    assert callback.monitor.status == "failed"
    assert hooks(module, optimizer) == []
    if held:
        module.fails_at = None
        fit(module, [callback])
        assert callback.monitor.status == "done"


def test_a_callback_that_is_gone_takes_its_hooks_along() -> None:
    module, callback = Net(), LightningMonitor(every=1)
    trainer = SimpleNamespace(
        strategy=SingleDeviceStrategy(), precision_plugin=None, world_size=1, global_step=0,
        optimizers=[torch.optim.SGD(module.parameters(), lr=0.1)],
    )  # fmt: skip
    callback.on_train_start(trainer, module)
    assert hooks(module, trainer.optimizers[0])
    del callback
    gc.collect()
    assert hooks(module, trainer.optimizers[0]) == []


class SingleDeviceStrategy:
    """Stands for the one of the same name."""


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    module = Net()
    first = fit(module, [], max_steps=2, no_validation=True)
    first.save_checkpoint(tmp_path / "two.ckpt")
    callback = LightningMonitor(every=10)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(accelerator="cpu", max_steps=STEPS, callbacks=[callback], **quiet)
    trainer.fit(Net(), loader(), ckpt_path=str(tmp_path / "two.ckpt"))
    assert callback.monitor.history["train/loss"][0].tolist() == [3, 4]


def test_readings_in_the_trainers_log() -> None:
    callback = LightningMonitor(every=1, log=["update/ratio_*"])
    trainer = fit(Net(), [callback])
    logged = float(trainer.logged_metrics["update/ratio_max"])
    assert logged == pytest.approx(callback.monitor.history.last("update/ratio_max"), rel=1e-6)


def test_manual_optimization_and_sharded_parameters_are_refused() -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    with pytest.raises(ValueError, match="expected automatic optimization, got manual"):
        fit(Manual(), [LightningMonitor()])
    sharded = SimpleNamespace(strategy=FSDPStrategy(), precision_plugin=None)
    with pytest.raises(ValueError, match="whole parameters in every process, got FSDPStrategy"):
        LightningMonitor().on_train_start(sharded, Net())


class FSDPStrategy:
    """Stands for the one of the same name."""
