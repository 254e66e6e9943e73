"""The monitor as a callback of `lightning.Trainer`.

With automatic optimization the gradients of a step are there until the next step has run its forward pass, so the monitor looks
at `on_train_batch_end`, where an optimizer step was made. By then the schedulers have moved: "train/lr" is the next step's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ImportError as missing:
        try:
            from pytorch_lightning import Callback
        except ImportError:
            text = "expected lightning for LightningMonitor, got none; pip install towtank[lightning]"
            raise ImportError(text) from missing

from towtank.integrations.common import joined, newest, stops
from towtank.record.lines import End
from towtank.signals.alarm import Alarm
from towtank.signals.monitor import Monitor

_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")  # with whole parameters in every process


class LightningMonitor(Callback):
    """Watches a run of `lightning.Trainer`: `Trainer(callbacks=[LightningMonitor(loss=F.cross_entropy, out="runs/today")])`.

    The model is the `LightningModule`; what needs the loss again (curvature, single examples) calls it with the inputs of the
    batch and gives its outputs to `loss`. Where that is not what `training_step` does, give `forward(module, batch)` too. Parts
    of a step (gradient noise) are told apart where `training_step` calls the module itself, `self(x)`.

    Args:
        log: globs of readings that are logged by the module, to the trainer's own loggers.
        **options: of `Monitor`. With `on_alarm="stop"` the training ends after the step.

    Raises:
        ValueError: when training begins, if optimization is manual or parameters are sharded.

    Example:
        >>> callback = LightningMonitor(every=5, log=["grad/norm", "stability/*"])
        >>> callback.monitor is None  # there is one from the beginning of the training
        True
    """

    def __init__(self, *, log: Sequence[str] = (), **options: Any) -> None:
        self.monitor: Monitor | None = None
        self._log, self._options = tuple(log), options
        self._losses: list[Tensor] = []
        self._steps = 0

    @property
    def alarms(self) -> list[Alarm]:
        """All alarms so far."""
        return self.monitor.alarms if self.monitor else []

    def close(self, status: End = "failed") -> None:
        """Remove every hook and end the record; closing twice does nothing.

        Args:
            status: "done", "stopped" or "failed".
        """
        self._losses = []
        if self.monitor is not None:
            self.monitor.close(status)

    # Events of the trainer

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the monitor."""
        self.close()
        _check(trainer, pl_module)
        given = {"scaler": getattr(trainer.precision_plugin, "scaler", None), "processes": trainer.world_size}
        self.monitor = Monitor(pl_module, trainer.optimizers[0], **{**given, **self._options})
        self.monitor.number = self._steps = int(trainer.global_step)  # of a run that is resumed

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the step, where the optimizer made one."""
        if self.monitor is None or self.monitor.status != "running":
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())
        if trainer.global_step == self._steps:
            return
        self._steps = trainer.global_step
        total, self._losses = joined(self._losses, mean=False), []  # each is divided by the number of parts already
        if stops(self.monitor, total, batch, processes=trainer.world_size):
            trainer.should_stop = True
        readings = newest(self.monitor, self._log)
        if readings:
            pl_module.log_dict(readings, rank_zero_only=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The training has ended, by itself or because something stopped it."""
        self.close("done")

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The training has failed, or was interrupted."""
        self.close("stopped" if isinstance(exception, KeyboardInterrupt) else "failed")


def _check(trainer: Any, module: Any) -> None:
    if not module.automatic_optimization:
        raise ValueError("expected automatic optimization, got manual; call a towtank.Monitor in training_step instead")
    strategy = type(trainer.strategy).__name__
    if strategy not in _STRATEGIES:
        raise ValueError(f"expected whole parameters in every process, got {strategy}; remove the callback")
