"""The monitor beside an `accelerate.Accelerator`.

`towtank.Monitor` takes what `accelerator.prepare` returns: it looks through the wrappers of model and optimizer and finds the
gradient scaler. What is left is gradient accumulation, where Accelerate makes `optimizer.step()` and `optimizer.zero_grad()` do
nothing until the last part of a step; here `step` is like them.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from towtank.integrations.common import joined
from towtank.record.lines import End
from towtank.signals.alarm import Alarm
from towtank.signals.monitor import Monitor

_WHOLE = (
    "NO",
    "MULTI_CPU",
    "MULTI_GPU",
    "MULTI_XPU",
    "MULTI_NPU",
    "MULTI_MLU",
    "MULTI_MUSA",
    "MULTI_SDAA",
    "MULTI_HPU",
)


class AccelerateMonitor:
    """A `Monitor` whose `step` waits, like the optimizer, for the last part of a step.

    Args:
        accelerator: that prepared the model and the optimizer.
        model: as prepared.
        optimizer: as prepared.
        **options: of `Monitor`.

    Raises:
        ValueError: if parameters are sharded (FSDP, DeepSpeed, Megatron).

    Example:
        >>> from accelerate import Accelerator
        >>> accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        >>> net = nn.Linear(2, 1)
        >>> model, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
        >>> x, y = torch.ones(4, 2), torch.zeros(4, 1)
        >>> with AccelerateMonitor(accelerator, model, optimizer, loss=nn.functional.mse_loss) as watching:
        ...     for part in range(4):
        ...         with accelerator.accumulate(model):
        ...             loss = nn.functional.mse_loss(model(x), y)
        ...             accelerator.backward(loss)
        ...             optimizer.step()
        ...             alarms = watching.step(loss, (x, y))
        ...             optimizer.zero_grad()
        >>> watching.monitor.number
        2
    """

    def __init__(
        self, accelerator: Any, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, **options: Any
    ) -> None:
        kind = accelerator.distributed_type.name
        if kind not in _WHOLE:
            raise ValueError(f"expected whole parameters in every process, got {kind}; train without the monitor")
        self.accelerator, self._losses = accelerator, []
        self.monitor = Monitor(model, optimizer, **options)

    def __enter__(self) -> AccelerateMonitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.monitor.__exit__(kind, error, at)

    def step(self, loss: Tensor, batch: Any = None) -> tuple[Alarm, ...]:
        """Look at the step, if this was its last part; its loss is the mean of the losses of its parts.

        Args:
            loss: of the part, as it was given to `accelerator.backward`.
            batch: of the part.

        Returns:
            The alarms that it raised; none before the last part.

        Raises:
            Stop: where an alarm's action is "stop".
        """
        self._losses.append(loss.detach())
        if not self.accelerator.sync_gradients:
            return ()
        total, self._losses = joined(self._losses, mean=True), []
        return self.monitor.step(total, batch)

    def close(self, status: End = "done") -> None:
        """See `Monitor.close`."""
        self.monitor.close(status)
