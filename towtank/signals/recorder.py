"""What has to be recorded while a step happens: gradients before clipping, parts of a step, the update.

Hooks are set for one step and removed after it. They hang on parameters (gradients as autograd delivers them, before they are
summed over micro-batches and averaged over processes), on the optimizer (parameters before its step) and on the modules
(`capture`). `Hooks` removes them from a finalizer too, so that a loop that raised leaves none behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from towtank.signals.capture import Capture, _Hook
from towtank.signals.readings import norms
from towtank.signals.step import MicroGradients, Need


class Hooks:
    """Handles of hooks, removed together; by hand, or when the owner dies.

    Args:
        owner: whose death removes them.
    """

    def __init__(self, owner: object) -> None:
        self._handles: list[Any] = []
        weakref.finalize(owner, _remove, self._handles)

    def add(self, handle: Any) -> None:
        """Keep anything with a `remove()`."""
        self._handles.append(handle)

    def remove(self) -> None:
        """Remove every hook."""
        _remove(self._handles)


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


class _TensorHooks:
    """Hooks on a parameter; one that had none before has none after, not an empty table of them.

    Args:
        p: the parameter.
        arrives: called with a gradient on its way to the parameter.
        stays: called when that gradient has been added to `.grad`, which `torch.autograd.grad` never does.
    """

    def __init__(self, p: nn.Parameter, arrives: Callable[[Tensor], None], stays: Callable[[Tensor], None]) -> None:
        tables = ("_backward_hooks", "_post_accumulate_grad_hooks")
        self._bare = [table for table in tables if getattr(p, table) is None]
        self._p = weakref.ref(p)
        self._handles = [p.register_hook(arrives), p.register_post_accumulate_grad_hook(stays)]

    def remove(self) -> None:
        _remove(self._handles)
        p = self._p()
        for table in self._bare if p is not None else ():
            if not getattr(p, table):
                setattr(p, table, None)


class Recorder:
    """Records one step at a time.

    Args:
        model: the network, without wrappers.
        optimizer: whose update is recorded, or None.
        scaler: the gradient scaler, whose scale is taken out of norms.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None, scaler: Any = None) -> None:
        self.model, self.optimizer, self.scaler = model, optimizer, scaler
        self._hooks = Hooks(self)
        self._clear()

    def _clear(self) -> None:
        self.needs: frozenset[Need] = frozenset()
        self._capture: Capture | None = None
        self._before: dict[str, Tensor] = {}
        self._arriving: dict[str, Tensor] = {}
        self._parts: list[dict[str, Tensor]] = []
        self._totals: dict[str, Tensor] = {}
        self._sizes: list[int | None] = []
        self._scale = 1.0
        self._twice = self._stepped = self._queued = self._armed = False
        self._suspicious: Callable[[], bool] | None = None

    def arm(
        self, needs: Iterable[Need], keep: Iterable[str] = (), suspicious: Callable[[], bool] | None = None
    ) -> None:
        """Set the hooks for the next step.

        Args:
            needs: what to record.
            keep: globs of modules whose inputs and outputs are kept.
            suspicious: asked just before the optimizer's step; if true, the update is recorded whether needed or not.
        """
        self.disarm()
        self.needs, self._armed = frozenset(needs), True
        self._suspicious = suspicious
        if "seen" in self.needs:
            self._capture = Capture(self.model, tuple(keep))
            self._capture.install()
            self._hooks.add(self._capture)
        me = weakref.ref(self)
        if self.needs & {"micro", "raw_norms"}:
            self._hooks.add(self.model.register_forward_pre_hook(_Hook(partial(_forward, me)), with_kwargs=True))
            for name, p in self.model.named_parameters():
                if p.requires_grad:
                    self._hooks.add(_TensorHooks(p, partial(_gradient, me, name), partial(_accumulated, me, name)))
        if self.optimizer is not None:
            if "updates" in self.needs or suspicious is not None:
                self._hooks.add(self.optimizer.register_step_pre_hook(partial(_before_step, me)))
            self._hooks.add(self.optimizer.register_step_post_hook(partial(_after_step, me)))

    def disarm(self) -> None:
        """Remove every hook and forget what was recorded."""
        self._hooks.remove()
        self._clear()

    def collect(self) -> tuple[dict[str, Any], bool | None]:
        """What was recorded, and whether the optimizer moved (None if it was not watched); removes the hooks."""
        self._hooks.remove()
        found: dict[str, Any] = {}
        if self._capture is not None:
            found["seen"] = self._capture.seen
        if self._before:
            now = {n: p.detach() for n, p in self.model.named_parameters() if n in self._before}
            found["updates"] = {n: now[n] - before for n, before in self._before.items()}
        if "raw_norms" in self.needs and self._totals:
            found["raw_norms"] = {n: x / self._scale for n, x in self._totals.items()}
        if "micro" in self.needs and self._totals and not self._twice:
            unit = self._scale
            squares = tuple({n: (x / unit).square() for n, x in part.items()} for part in self._parts if part)
            total = {n: (x / unit).square() for n, x in self._totals.items()}
            found["micro"] = MicroGradients(squares=squares, sizes=self._known_sizes(), total=total)
        stepped = self._stepped if self._armed and self.optimizer is not None else None
        self._clear()
        return found, stepped

    def _known_sizes(self) -> tuple[int, ...] | None:
        """Examples of each part, where every forward pass tells and had a backward pass."""
        parts = self._parts[1:]
        if len(parts) != len(self._sizes) or not all(parts) or self._parts[0]:
            return None
        sizes = [size for size in self._sizes if size is not None]
        return tuple(sizes) if len(sizes) == len(parts) else None

    # What the hooks call

    def forward(self, inputs: Any) -> None:
        """A forward pass that may be followed by a backward pass: the next part of the step begins."""
        if torch.is_grad_enabled():
            tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.ndim]
            self._sizes.append(len(tensors[0]) if tensors else None)

    def gradient(self, name: str, gradient: Tensor) -> None:
        """A gradient is on its way to a parameter, if `torch.autograd.grad` does not take it."""
        self._arriving[name] = norms([gradient])[0]

    def accumulated(self, name: str) -> None:
        """A backward pass of one part has delivered a gradient."""
        while len(self._parts) <= len(self._sizes):
            self._parts.append({})
        part = self._parts[len(self._sizes)]
        self._twice |= name in part  # a backward in pieces, or forward passes that we do not see: parts cannot be told
        part[name] = self._arriving[name]
        if not self._queued:
            self._queued = True
            end = partial(_backward_ends, weakref.ref(self), again=True)
            torch.autograd.Variable._execution_engine.queue_callback(end)

    def backward_ends(self) -> None:
        """Gradients are summed, and averaged over processes: nothing is clipped yet."""
        self._queued = False
        found = {n: p.grad for n, p in self.model.named_parameters() if p.requires_grad and p.grad is not None}
        self._totals = dict(zip(found, norms(list(found.values())), strict=True))
        self._scale = 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def before_step(self) -> None:
        """The optimizer is about to move the parameters."""
        if "updates" not in self.needs and not (self._suspicious and self._suspicious()):
            return
        self._before = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def after_step(self) -> None:
        """The optimizer has moved the parameters."""
        self._stepped = True


# Hooks hold the recorder weakly: they must not keep it, and the model with it, alive.


def _forward(me: Callable[[], Recorder | None], _: nn.Module, arguments: Any, keywords: Any) -> None:
    recorder = me()
    if recorder is not None:
        recorder.forward((arguments, keywords))


def _gradient(me: Callable[[], Recorder | None], name: str, gradient: Tensor) -> None:
    recorder = me()
    if recorder is not None:
        recorder.gradient(name, gradient.detach())


def _accumulated(me: Callable[[], Recorder | None], name: str, _: Tensor) -> None:
    recorder = me()
    if recorder is not None:
        recorder.accumulated(name)


def _backward_ends(me: Callable[[], Recorder | None], *, again: bool) -> None:
    if again:  # data-parallel training averages in a callback of its own, which is queued by now: ours goes behind it
        end = partial(_backward_ends, me, again=False)
        torch.autograd.Variable._execution_engine.queue_callback(end)
        return
    recorder = me()
    if recorder is not None:
        recorder.backward_ends()


def _before_step(me: Callable[[], Recorder | None], *_: Any) -> None:
    recorder = me()
    if recorder is not None:
        recorder.before_step()


def _after_step(me: Callable[[], Recorder | None], *_: Any) -> None:
    recorder = me()
    if recorder is not None:
        recorder.after_step()
