"""The alarm of a loss spike, and whom it blames: the inputs or the labels of a batch, or the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from towtank.problem.data import is_mapping
from towtank.signals.alarm import Alarm, Severity
from towtank.signals.attribution import BatchBlame, blame_batch, blame_tensors, moved_first
from towtank.signals.history import History
from towtank.signals.spikes import LEAST, WINDOW, Rule, Spike, spike
from towtank.signals.step import CannotTell, Step

_NAMES = {"inputs": "bad batch", "labels": "label noise", "model": "loss spike"}
_CURES = {
    "inputs": "look at the named examples; check the data pipeline at this step",
    "labels": "look at the labels of the named examples; clip gradients",
    "model": "lower the learning rate, or clip gradients",
    "": "give monitor.step the batch and Monitor a loss, to learn whether the batch or the model is to blame",
}
_RULE = Rule(z=8.0, rise=0.5)  # what is worth an alarm: healthy noise near a small loss reaches z of 7 and more
_SOURCE = "robust z of the loss above 8 and a rise by half; our own"


@dataclass(frozen=True, kw_only=True)
class LossSpike:
    """Raises an alarm where the loss jumps, after asking who is to blame, see `blame_batch`; none where the losses are like others'.

    The spiking batch is compared with a recent batch that did not spike, of which a copy is kept; both run at the parameters before
    the step where those are known. Where the model is to blame, the alarm names the tensors that are farthest from their past and
    the signal that left its own past first.

    Args:
        every: steps between two copies of a healthy batch.

    Source: towtank.signals.spikes, towtank.signals.attribution.
    """

    every: int = 20
    names: ClassVar[tuple[str, ...]] = ("bad batch", "label noise", "loss spike")

    def __call__(self, history: History, step: Step) -> Iterator[Alarm]:
        """The alarms of a step."""
        values = history.tail("train/loss", 2 * WINDOW + 1)
        if not values or not math.isfinite(values[-1]):
            return
        if sum(math.isfinite(x) for x in values) <= LEAST:
            self._keep(step)
            return
        found = spike(values[:-1], values[-1], step=step.number, rule=_RULE)
        blame = None if found is None else _blame(step, values[:-1])
        if found is None or (isinstance(blame, BatchBlame) and blame.verdict == "none"):
            self._keep(step)
        elif blame is not None:
            yield _alarm(history, step, found, blame)

    def _keep(self, step: Step) -> None:
        old = step.kept.get("healthy")
        if step.batch is not None and (old is None or step.number - old[0] >= self.every):
            batch = dict(step.batch) if is_mapping(step.batch) else step.batch
            copy = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, batch)
            step.kept["healthy"] = (step.number, copy)


def _blame(step: Step, past: list[float]) -> BatchBlame | str:
    """Who is to blame, or why that cannot be told."""
    healthy = step.kept.get("healthy")
    if step.batch is None or step.problem_of is None or healthy is None:
        return "expected a batch, a loss and an earlier healthy batch"
    params: Mapping[str, Tensor] | None = None
    if "updates" in step.recorded:
        now = {n: p.float() if p.dtype in (torch.float16, torch.bfloat16) else p for n, p in step.parameters.items()}
        params = {n: p - step.updates[n].to(p) if n in step.updates else p for n, p in now.items()}
    try:
        return blame_batch(step.problem_of, step.batch, healthy[1], past=past, params=params)
    except CannotTell as reason:
        return " ".join(str(reason).split())


def _alarm(history: History, step: Step, found: Spike, blame: BatchBlame | str) -> Alarm:
    verdict = "" if isinstance(blame, str) else blame.verdict
    said = f"the loss is {found.value:.4g}, {found.expected:.4g} was expected (z = {found.z:.3g})"
    if isinstance(blame, str):
        said += f"; whom to blame cannot be told: {blame}"
    elif verdict == "model":
        said += f"; {blame.reason}{_moved(history, step)}"
    else:
        worst = ", ".join(map(str, blame.worst[:5]))
        said += f"; {blame.reason}; highest losses: examples {worst} of the batch"
    severity: Severity = "critical" if verdict == "model" else "warning"
    return Alarm(
        name=_NAMES.get(verdict, "loss spike"),
        step=step.number,
        message=said,
        source=_SOURCE,
        suggestion=_CURES[verdict],
        key="train/loss",
        value=found.value,
        limit=found.expected,
        severity=severity,
        subject=f"step {step.number}",
    )


def _moved(history: History, step: Step) -> str:
    """What in the run moved first, and which tensors are farthest from their past."""
    said = ""
    series: dict[str, Any] = dict(history.items())
    try:
        first = moved_first({k: v for k, v in series.items() if not k.startswith("monitor/")}, step.number)
        if first:
            said += f"; {first[0].key} moved first, {first[0].lead} steps before"
        gradients = {k.removeprefix("grad/rms/"): v for k, v in series.items() if k.startswith("grad/rms/")}
        before = {n: [value for s, value in v if s < step.number] for n, v in gradients.items()}
        tensors = blame_tensors(before, {n: v[-1][1] for n, v in gradients.items()})
        said += f"; farthest from its past is the gradient of {tensors[0].name} (z = {tensors[0].z:.3g})"
    except CannotTell:  # a short past
        pass
    return said
