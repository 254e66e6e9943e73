"""What was seen of a network while it ran, and the notes taken meanwhile.

`Seen` is what probes read. `Watch` is what hooks and the function mode write to: which module is running, and since when.
Neither refers to a module.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from towtank.signals.attention_stats import Attention
from towtank.signals.moments import Moments, aside
from towtank.signals.output_stats import Output, working_dtype

_USES = 32  # places at which one module uses an activation function that are told apart


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Names of the modules of a model, by what should be seen of them.

    Args:
        layers: those without children that hold parameters.
        attention: those whose class is called attention, or whose output is made by it.
    """

    layers: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()


@dataclass(kw_only=True, eq=False)
class Seen:
    """Activations, attention and outputs of the forward passes of a step; calls of one module are pooled.

    Numbers are tensors () on the device of the model; nothing is waited for until one is read.

    Args:
        kept: {module name: [(input, output)]}, copies of each call of the modules asked for. The input is the first argument.
        expected: what should be seen.
        notes: what could not be seen, as it was met.
    """

    kept: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)
    expected: Expected = field(default_factory=Expected)
    notes: dict[str, None] = field(default_factory=dict)
    moments: dict[str, list[Moments]] = field(default_factory=dict)
    attended: dict[str, list[Attention]] = field(default_factory=dict)
    alive: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    outputs: list[Output] = field(default_factory=list)
    losses: list[Output] = field(default_factory=list)
    called: set[str] = field(default_factory=set)
    passes: int = 0

    @property
    def activations(self) -> dict[str, Moments]:
        """{module name: moments of its output}, of modules without children."""
        return {name: Moments.pooled(parts) for name, parts in self.moments.items()}

    @property
    def attention(self) -> dict[str, Attention]:
        """{name of the innermost module that attends: statistics}."""
        return {name: Attention.pooled(parts) for name, parts in self.attended.items()}

    @property
    def dead(self) -> dict[str, Tensor]:
        """{place: share of units that were exactly 0 for every example}, of activation functions that can be 0.

        The place is the name of the module, or of the module around it and of the function; further uses are numbered.
        """
        found: dict[str, list[Tensor]] = {}
        for (place, _), alive in self.alive.items():
            found.setdefault(place, []).append(alive)
        return {place: 1 - torch.cat(masks).to(torch.float32).mean() for place, masks in found.items()}

    @property
    def output(self) -> Output | None:
        """Logits that a cross-entropy was called with; where none was seen, those that the model returned."""
        found = self.losses or self.outputs
        return Output.pooled(found) if found else None

    @property
    def targets(self) -> Tensor | None:
        """Classes (R,) that the cross-entropy was called with, one for each row of the output."""
        return self.output.targets_R if self.output else None

    @property
    def unseen(self) -> tuple[str, ...]:
        """What could not be seen, and why."""
        if not self.passes:
            none = "nothing of the network: none of its modules was called from Python since the hooks were set"
            return tuple(self.notes) or (none,)
        found = list(self.notes)
        silent = [n for n in self.expected.layers if n not in self.called]
        if silent:
            found.append(f"activations of {_listed(silent)}: not called as a module")
        blind = [n for n in self.expected.attention if n in self.called and not self._attends(n)]
        if blind:
            found.append(
                f"attention logits of {_listed(blind)}: no known attention function and no softmax of a product"
            )
        return tuple(found)

    def _attends(self, name: str) -> bool:
        related = (name.startswith(f"{n}.") or n.startswith(f"{name}.") or n in (name, "") for n in self.attended)
        return any(related)


def _listed(names: Iterable[str], limit: int = 4) -> str:
    every = list(names)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more


class Frame:
    """A module that is running."""

    __slots__ = ("name", "leaf", "uses")

    def __init__(self, name: str, leaf: bool) -> None:
        self.name, self.leaf = name, leaf
        self.uses: dict[str, int] = {}  # of activation functions, by place

    def use(self, place: str) -> str:
        """The place, numbered from its second use on."""
        number = self.uses[place] = self.uses.get(place, -1) + 1
        return f"{place}.{min(number, _USES)}" if number else place


class Watch:
    """The modules that are running, innermost last, and what they leave in `seen`.

    Args:
        seen: where to.
        graded: whether only forward passes count that build a graph, so that a validation in between does not.
    """

    def __init__(self, seen: Seen, *, graded: bool) -> None:
        self.seen, self.graded = seen, graded
        self.frames: list[Frame] = []
        self.axis = -1  # along which units lie, by the last layer that ran
        self.losses = 0  # cross-entropies seen when the forward pass began

    def begins(self) -> bool:
        """Whether a call from outside begins a forward pass that counts; one within a backward pass is a recomputation."""
        return not torch.compiler.is_compiling() and not in_backward() and (torch.is_grad_enabled() or not self.graded)

    def place(self, function: str) -> str:
        """Where an activation function is used."""
        *around, frame = self.frames
        if frame.leaf:
            return (around[-1] if around else frame).use(frame.name or function)
        return frame.use(f"{frame.name}.{function}".removeprefix("."))

    def along(self, x: Tensor) -> int:
        """The axis of a tensor along which units lie."""
        return self.axis if -x.ndim <= self.axis < x.ndim else -1

    def activation(self, name: str, output: Any) -> None:
        """A module without children returned."""
        x = first_tensor(output)
        if self.takes(x) and x.is_floating_point() and x.numel():
            self.seen.moments.setdefault(name, []).append(Moments.of(x))

    def units(self, place: str, y: Tensor) -> None:
        """An activation function that can be 0 returned."""
        if not (self.takes(y) and y.is_floating_point() and y.ndim > 1 and y.numel()):
            return
        with aside():
            axis = self.along(y) % y.ndim
            others = [i for i in range(y.ndim) if i != axis]
            alive = (y.detach().amax(others) != 0) | (y.detach().amin(others) != 0)  # NaN is not dead
            key = (place, len(alive))
            self.seen.alive[key] = self.seen.alive[key] | alive if key in self.seen.alive else alive

    def output(self, output: Any) -> None:
        """The model returned; logits that a loss inside it was called with are known already."""
        z = getattr(output, "logits", output)
        z = output["logits"] if isinstance(output, dict) and "logits" in output else first_tensor(z)
        if len(self.seen.losses) == self.losses and self.takes(z) and _logits(z, self.along(z)):
            found = Output.of(z, dim=self.along(z), dtype=working_dtype(z))
            self.seen.outputs.append(found)

    def loss(self, z: Any, targets: Any, smooth: bool, ignored: int) -> None:
        """A cross-entropy of logits (R, V), (R, V, ...) or (V,) was called."""
        dim = 1 if isinstance(z, Tensor) and z.ndim > 1 else 0
        if not (self.takes(z) and _logits(z, dim)):
            return
        found = Output.of(z, dim=dim, dtype=working_dtype(z))
        if isinstance(targets, Tensor) and not targets.is_floating_point() and not smooth:
            with aside():
                classes = targets.detach().reshape(-1).to(z.device)
                found = found.with_targets(classes.masked_fill(classes == ignored, -100))
        self.seen.losses.append(found)

    def takes(self, x: Any) -> bool:
        """Whether `x` is a tensor whose numbers can be read; says so where it is one of another kind."""
        if not isinstance(x, Tensor):
            return False
        if type(x) in (Tensor, nn.Parameter) and not is_functorch_wrapped_tensor(x):
            return x.layout == torch.strided and not x.is_nested and x.device.type != "meta"
        kind = type(x).__name__ if type(x) is not Tensor else "torch.func"
        self.seen.notes[f"tensors of kind {kind}: their numbers are not read"] = None
        return False


def in_backward() -> bool:
    """Whether autograd is running in this thread."""
    return torch._C._current_graph_task_id() != -1


def first_tensor(x: Any) -> Any:
    """A tensor, or the first one of a tuple, list or mapping, at any depth; None if there is none."""
    if isinstance(x, Tensor) or not isinstance(x, tuple | list | dict):
        return x if isinstance(x, Tensor) else None
    found = (first_tensor(e) for e in (x.values() if isinstance(x, dict) else x))
    return next((t for t in found if t is not None), None)


def _logits(z: Tensor, dim: int) -> bool:
    return z.is_floating_point() and z.ndim > 0 and z.numel() > 0 and z.shape[dim] > 1
