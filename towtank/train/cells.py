"""A cell is a flat dict of scalars that decides a run; here cells become trained members."""

from __future__ import annotations

import importlib
import inspect
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from towtank.optim import rule_of
from towtank.train.settings import MEMBER_KEYS, TRAINING_KEYS, Member, Training

if TYPE_CHECKING:
    from towtank.train.ensemble import Ensemble
    from towtank.train.task import Task

Scalar = str | int | float | bool | None
Cell = Mapping[str, Scalar]
Curve = list[tuple[int, float | None]]
DEFAULT_TASK = "towtank.train.tasks:gpt"
RULE_NUMBERS = ("beta1", "beta2", "eps")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one member: losses in nats, curves as (step, value), time in seconds of its share of the ensemble."""

    status: str  # done | diverged
    steps: int
    reason: str = ""
    initial: float | None = None
    final: float | None = None
    curve: Curve = field(default_factory=list)
    signals: dict[str, Curve] = field(default_factory=dict)
    time_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a cell would cost and what it is measured on, found without training.

    Args:
        corpus: digest of the data.
        parameters: number of parameters.
        member_bytes: memory of one member: parameters, gradients, moments, activations.
        flops_per_step: floating-point operations of one forward and backward pass.
    """

    corpus: str
    parameters: int
    member_bytes: int
    flops_per_step: float


def describe(cell: Cell) -> Description:
    """Describe the run a cell asks for: one forward and backward pass on one batch, nothing trained.

    Example:
        >>> describe({"width": 32, "lr": 0.01}).parameters
        41248
    """
    import torch
    from torch.autograd.graph import saved_tensors_hooks
    from torch.utils.flop_counter import FlopCounterMode

    training = _training(cell)
    task = build_task(cell)
    inputs, targets = task.data.batch(0, 0)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(pack, lambda t: t):
            loss = task.loss(task.model(inputs), targets)
        torch.autograd.grad(loss, [p for p in task.model.parameters() if p.requires_grad], allow_unused=True)
    parameters = sum(p.numel() for p in task.model.parameters())
    rule = rule_of(training.optimizer)
    return Description(
        corpus=task.data.digest,
        parameters=parameters,
        member_bytes=int((8 + rule.state_bytes) * parameters)
        + 2 * sum(saved.values()),  # twice: the gradients of activations on their way back
        flops_per_step=float(counter.get_total_flops()) * (1 + rule.passes),
    )


def train_cells(
    cells: Sequence[Cell], *, device: str = "cpu", on_step: Callable[[int, int], None] | None = None
) -> list[Result]:
    """Train cells that differ only in their numbers as one ensemble.

    A model that `torch.vmap` cannot batch (a recurrent layer, say) is trained member by member, with a warning.

    Args:
        cells: flat dicts that agree in every key but those of `Member`.
        device: where to train.
        on_step: called as `on_step(step, living members)` after each update.

    Raises:
        ValueError: if the cells differ in more than their numbers.
        RuntimeError: what the model itself raises.
    """
    import torch

    try:
        return _train(cells, device, on_step)
    except RuntimeError as error:
        if len(cells) == 1 or isinstance(error, torch.OutOfMemoryError):
            raise
        warnings.warn(f"members cannot be batched and train one after another: {_first_line(error)}", stacklevel=2)
    return [result for cell in cells for result in _train([cell], device, on_step)]


def _train(cells: Sequence[Cell], device: str, on_step: Callable[[int, int], None] | None) -> list[Result]:
    import torch

    from towtank.train.loop import train

    ensemble, training = build_ensemble(cells, device)
    began = time.perf_counter()
    recorders = [_Recorder() for _ in cells]
    with torch.random.fork_rng(devices=None if ensemble.device.type == "cuda" else []):
        torch.manual_seed(ensemble.members[0].seed)  # dropout repeats
        for step in train(ensemble, training):
            columns = {name: values.tolist() for name, values in _columns(step).items()}
            ended = step.fates.step.tolist() if columns else [-1] * len(cells)
            for index, recorder in enumerate(recorders):
                recorder.observe(step.step, {name: v[index] for name, v in columns.items()}, ended[index])
            if on_step is not None:
                on_step(step.step, sum(e < 0 for e in ended))
    share_s = (time.perf_counter() - began) / len(cells)
    reasons = _reasons(step.fates)
    return [recorder.result(training.steps, share_s, why) for recorder, why in zip(recorders, reasons, strict=True)]


def _reasons(fates: Any) -> list[str]:
    from towtank.train.loop import CAUSES

    columns = (fates.step.tolist(), fates.cause.tolist(), fates.last_loss.tolist())
    return [
        f"{CAUSES[cause]} at step {step}; last training loss before: {loss:.4g}" if step >= 0 else ""
        for step, cause, loss in zip(*columns, strict=True)
    ]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def canonical(cell: Cell) -> dict[str, Scalar]:
    """The cell with what does not matter to its run left out: cells of one canonical form are one run.

    muP at the base width multiplies everything by 1, so it is `sp`; `sp` does not look at the base width; AdamW is the
    optimizer where none is named.

    Example:
        >>> at_base = {"width": 32, "lr": 0.1, "parametrization": "mup", "base_width": 32}
        >>> canonical(at_base) == canonical({"width": 32, "lr": 0.1, "parametrization": "sp", "base_width": 64})
        True
    """
    same = dict(cell)
    base, size = same.get("base_width", Training.base_width), str(same.get("size_key", Training.size_key))
    if same.get("parametrization") == "mup" and same.get(size) == base:
        same["parametrization"] = "sp"
    if same.get("parametrization", "sp") == "sp":
        same.pop("base_width", None)
        same.pop("size_key", None)
    if same.get("optimizer") == Training.optimizer:
        del same["optimizer"]
    return same


def own_numbers(cell: Cell, given: Collection[str]) -> dict[str, Scalar]:
    """The cell with its optimizer's own defaults of beta1, beta2 and eps, where AdamW's are not what was asked for.

    Args:
        cell: a cell filled up with the defaults of `Member`.
        given: keys that somebody set; those stay as they are.

    Example:
        >>> own_numbers({"optimizer": "Lion", "lr": 1.0, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}, {"lr"})
        {'optimizer': 'Lion', 'lr': 1.0, 'beta1': 0.9, 'beta2': 0.99}
    """
    optimizer = str(cell.get("optimizer", Training.optimizer))
    if optimizer == Training.optimizer:
        return dict(cell)
    own = rule_of(optimizer).hyper()._asdict()
    kept = {k: v for k, v in cell.items() if k not in RULE_NUMBERS or k in given or k in own}
    return kept | {k: float(own[k]) for k in RULE_NUMBERS if k in own and k not in given}


def build_task(cell: Cell) -> Task:
    """Call the cell's task function with its keys, under its seed; the caller's random state is left as it was.

    Raises:
        ValueError: if the function cannot be found.
    """
    import torch

    function = task_function(str(cell.get("task", DEFAULT_TASK)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(cell.get("seed") or 0))
        return function(**_arguments(function, cell))


def task_function(name: str) -> Callable[..., Any]:
    """Import `package.module:function`.

    Raises:
        ValueError: if there is no such function.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"task = {name!r}: expected package.module:function, got {type(error).__name__}: {error}"
        ) from error


def build_ensemble(cells: Sequence[Cell], device: str = "cpu") -> tuple[Ensemble, Training]:
    """The ensemble and its shared settings that a group of cells asks for.

    Raises:
        ValueError: if the cells differ in more than their numbers.
    """
    import torch

    from towtank.scaling import plan as plans
    from towtank.train import planner
    from towtank.train.ensemble import Ensemble

    _require_one_structure(cells)
    first = cells[0]
    training = _training(first)
    filled = [own_numbers(c, set(c)) for c in cells]
    members = [Member(**{k: v for k, v in c.items() if k in MEMBER_KEYS}) for c in filled]  # pyright: ignore[reportArgumentType]
    by_seed = {m.seed: c for m, c in zip(members, cells, strict=True)}
    by_seed = {seed: build_task(c) for seed, c in by_seed.items()}
    tasks = [by_seed[m.seed] for m in members]
    if len({t.data.digest for t in by_seed.values()}) > 1:
        raise ValueError("data: expected the same data (digest) for every seed; `batch(seed, step)` is given the seed")
    model = tasks[0].model
    roles = plans.roles(model, head=tasks[0].head)
    base = _base_model(first, training) if training.parametrization == "mup" else model
    if training.parametrization == "mup":
        plans.require_comparable(model, base, roles)
    table = plans.plan(training.parametrization, plans.shapes(model), plans.shapes(base), roles, decay=training.decay)
    ensemble = Ensemble(
        tasks, members, plan=table, roles=roles, optimizer=training.optimizer, decay=training.decay, device=device,
        dtype=getattr(torch, training.precision),
    )  # fmt: skip
    parameters = sum(p.numel() for p in model.parameters())
    if planner.should_compile(training.compile, device, parameters, len(cells), training.steps):
        ensemble.compile()
    return ensemble, training


def _training(cell: Cell) -> Training:
    return Training(**{k: v for k, v in cell.items() if k in TRAINING_KEYS})  # pyright: ignore[reportArgumentType]


def _base_model(cell: Cell, training: Training) -> Any:
    """The model that the cell's task builds at the base width.

    Raises:
        ValueError: if the task has no such argument.
    """
    base = {**cell, training.size_key: training.base_width}
    if training.size_key not in _arguments(task_function(str(cell.get("task", DEFAULT_TASK))), base):
        raise ValueError(f"size_key = {training.size_key!r}: expected an argument of the task, which muP varies")
    return build_task(base).model


def _arguments(function: Callable[..., Any], cell: Cell) -> dict[str, Scalar]:
    """The cell's keys that the task function takes (all that are not the loop's own, if it takes any)."""
    accepted = inspect.signature(function).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    own = MEMBER_KEYS | TRAINING_KEYS | {"task"}
    return {k: v for k, v in cell.items() if k in accepted or (anything and k not in own)}


def _require_one_structure(cells: Sequence[Cell]) -> None:
    if not cells:
        raise ValueError("expected at least one cell, got none")
    shared = [{k: v for k, v in c.items() if k not in MEMBER_KEYS} for c in cells]
    if any(s != shared[0] for s in shared):
        raise ValueError(f"expected cells that differ only in {', '.join(sorted(MEMBER_KEYS))}; group them first")


def _columns(step: Any) -> dict[str, Any]:
    columns = dict(step.signals)
    if step.heldout is not None:
        columns["heldout"] = step.heldout
    blocks = [v for name, v in columns.items() if name.startswith("attention_logit_max/block")]
    if blocks:
        columns["attention_logit_max"] = _elementwise_max(blocks)
    return columns


def _elementwise_max(tensors: list[Any]) -> Any:
    import torch

    return torch.stack(tensors).amax(0)


class _Recorder:
    """Collects one member's curves until it ends or diverges."""

    def __init__(self) -> None:
        self.curve: Curve = []
        self.signals: dict[str, Curve] = {}
        self.diverged: int | None = None

    def observe(self, step: int, values: dict[str, float], ended: int) -> None:
        """Values of a step, of which those after the member's end (-1: alive) are not its own."""
        if 0 <= ended < step:
            self.diverged = ended
            return
        for name, value in values.items():
            curve = self.curve if name == "heldout" else self.signals.setdefault(name, [])
            curve.append((step, value if abs(value) < float("inf") else None))
        if ended == step:
            self.diverged = step

    def result(self, steps: int, time_s: float, reason: str) -> Result:
        initial = self.curve[0][1] if self.curve else None
        common = {"initial": initial, "curve": self.curve, "signals": self.signals, "time_s": time_s}
        if self.diverged is None:
            return Result(status="done", steps=steps, final=self.curve[-1][1], **common)
        return Result(status="diverged", steps=self.diverged, reason=reason, **common)
