"""The monitor as a callback of `transformers.Trainer`.

The trainer tells a callback neither batch nor loss. Both are taken from the forward passes of the model, by a hook that is there
from the beginning of a step to the optimizer's update. Gradients are gone at `on_step_end`, so the monitor looks at
`on_optimizer_step`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("expected transformers for HFMonitor, got none; pip install towtank[hf]") from error

from towtank.integrations.common import joined, newest, stops
from towtank.record.lines import End
from towtank.signals.alarm import Alarm
from towtank.signals.monitor import Monitor
from towtank.signals.recorder import Hooks

_NOT_BATCH = ("num_items_in_batch",)


class HFMonitor(TrainerCallback):
    """Watches a run of `transformers.Trainer`: `Trainer(callbacks=[HFMonitor(out="runs/today")])`.

    The loss is that of the model's outputs. Where the trainer computes it itself (label smoothing, `compute_loss_func`, a
    `compute_loss` of your own), wrap that function by `watch`; otherwise there is no "train/loss", and a note says so. What
    needs the loss again (curvature, single examples) uses `loss`, by default the cross-entropy of logits and "labels".

    The trainer tells its callbacks nothing when it raises: then `close` ends the record as "failed" and removes hooks, and so do
    the end of a `with` block around `trainer.train()`, the next `train`, and the end of the callback's life.

    Args:
        log: globs of readings that are added to each entry of the trainer's `state.log_history`.
        **options: of `Monitor`. With `on_alarm="stop"` the training ends after the step.

    Raises:
        ValueError: when training begins, if parameters are sharded (FSDP, DeepSpeed).

    Example:
        >>> callback = HFMonitor(every=5, log=["grad/norm", "stability/*"])
        >>> callback.monitor is None  # there is one from the beginning of the training
        True
    """

    def __init__(self, *, log: Sequence[str] = (), **options: Any) -> None:
        self.monitor: Monitor | None = None
        self._log, self._options = tuple(log), options
        self._hooks = Hooks(self)
        self._processes, self._factor = 1, 1
        self._forget()

    def _forget(self) -> None:
        self._losses: list[Tensor | None] = []  # of each forward pass
        self._mean = True
        self._batch: Any = None

    def __enter__(self) -> HFMonitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: Any) -> None:
        self.close("done" if kind is None else "stopped" if issubclass(kind, KeyboardInterrupt) else "failed")

    def close(self, status: End = "failed") -> None:
        """Remove every hook and end the record; closing twice does nothing.

        Args:
            status: "done", "stopped" or "failed".
        """
        self._hooks.remove()
        self._forget()
        if self.monitor is not None:
            self.monitor.close(status)

    @property
    def alarms(self) -> list[Alarm]:
        """All alarms so far."""
        return self.monitor.alarms if self.monitor else []

    def watch(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that computes the loss, seen through: its results count as losses of the step.

        Args:
            function: as the trainer calls it: `compute_loss_func(outputs, labels, num_items_in_batch=...)`, or a bound
                `compute_loss(model, inputs, ...)`; it returns the loss, or (loss, outputs).
        """
        me = weakref.ref(self)

        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            inputs = next((x for x in args[:2] if isinstance(x, Mapping) and "labels" in x), None)
            labels = inputs["labels"] if inputs else kwargs.get("labels", args[1] if len(args) > 1 else None)
            found = function(*args, **kwargs)
            callback = me()
            if callback is not None and torch.is_grad_enabled():
                scaled = kwargs.get("num_items_in_batch") is not None
                callback._told(found, labels, scaled=scaled, final=inputs is not None)
            return found

        return watched

    # Events of the trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the monitor."""
        self.close()
        _check(args)
        self._processes = int(args.world_size)
        # the trainer divides by the tokens of all processes, and their mean is the gradient
        self._factor = self._processes if getattr(args, "average_tokens_across_devices", False) else 1
        given: dict[str, Any] = {
            "scaler": getattr(kwargs.get("optimizer"), "scaler", None),
            "processes": self._processes,
        }
        given["resume"] = bool(state.global_step)
        self.monitor = Monitor(kwargs["model"], kwargs.get("optimizer"), **{**given, **self._options})
        self.monitor.number = int(state.global_step)  # of a run that is resumed

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to look for batch and loss."""
        self._hooks.remove()
        self._forget()
        if self._running:
            hook = partial(_forward, weakref.ref(self))
            self._hooks.add(kwargs["model"].register_forward_hook(hook, with_kwargs=True))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the step."""
        self._hooks.remove()
        if self.monitor is None or not self._running:
            return
        loss, batch = joined([x for x in self._losses if x is not None], mean=self._mean), self._batch
        if loss is None:
            self.monitor.note("loss", "the trainer computes the loss itself: give it callback.watch(function)")
        self._forget()
        if stops(self.monitor, loss, batch, processes=self._processes):
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add readings to the trainer's own history."""
        if self.monitor is not None and state.log_history:
            state.log_history[-1].update(newest(self.monitor, self._log))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The training has ended, by itself or because something stopped it."""
        self.close("done")

    # What a step shows

    @property
    def _running(self) -> bool:
        return self.monitor is not None and self.monitor.status == "running"

    def _ran(self, inputs: Mapping[str, Any], outputs: Any) -> None:
        """A forward pass that may be followed by a backward pass."""
        self._batch = {k: x for k, x in inputs.items() if k not in _NOT_BATCH} or None
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
        if loss is None and isinstance(outputs, tuple) and "labels" in inputs:
            loss = outputs[0]
        scaled = inputs.get("num_items_in_batch") is not None
        self._mean = not scaled
        self._losses.append(self._part(loss, scaled))

    def _told(self, found: Any, labels: Any, *, scaled: bool, final: bool) -> None:
        """The loss of a part, from the function that computes it; `final` where the trainer does nothing more to it."""
        self._mean = not scaled
        self._losses = self._losses[:-1]  # what the model said itself
        self._losses.append(self._part(found[0] if isinstance(found, tuple) else found, scaled and not final))
        if self._batch is not None and isinstance(labels, Tensor):
            self._batch = {**self._batch, "labels": labels}

    def _part(self, loss: Any, scaled: bool) -> Tensor | None:
        return loss.detach().mean() * (self._factor if scaled else 1) if isinstance(loss, Tensor) else None


def _forward(me: Callable[[], HFMonitor | None], model: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
    callback = me()
    if callback is not None and torch.is_grad_enabled() and model.training:
        callback._ran(kwargs, outputs)


def _check(args: Any) -> None:
    sharded = [name for name in ("fsdp", "deepspeed") if getattr(args, name, None)]
    if sharded:
        raise ValueError(f"expected whole parameters in every process, got {sharded[0]}; remove the callback")
