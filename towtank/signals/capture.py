"""Looking into a model while it runs, without touching it.

Forward hooks reduce what modules return; a function mode, on while the model runs, reduces what functions are called with
(`attention_capture`). Both keep scalars and short vectors only, return nothing, and are gone afterwards, also when the forward or
the backward pass raises. They never refer to the model.

Under hooks and modes PyTorch takes the plain path of `nn.TransformerEncoderLayer` in evaluation, not its fused one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from towtank.problem import Problem
from towtank.problem.forward import unwrapped
from towtank.signals.attention_capture import Interception
from towtank.signals.moments import aside
from towtank.signals.seen import Expected, Frame, Seen, Watch

__all__ = ["Capture", "Seen", "capture", "compiled", "replay"]

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # in names: not the user's
_PASSING = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd, nn.modules.loss._Loss)
_COMPILED = "the network: it is compiled, and hooks would have it compiled anew or be skipped; replay(problem) runs a batch without"


def compiled(model: nn.Module) -> bool:
    """Whether a model, or any module in it, is compiled by `torch.compile`."""
    return any(_is_compiled(m) for m in model.modules())


def _is_compiled(module: nn.Module) -> bool:
    traced = getattr(module.forward, "_torchdynamo_orig_callable", None) is not None
    return traced or "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None


class Capture:
    """Hooks that fill `seen` while the model runs.

    Args:
        model: any module; of data-parallel wrappers, the module inside.
        keep: globs of names of modules whose inputs and outputs are kept, as copies.
        graded: whether only forward passes count that build a graph.
        eager: whether a compiled model runs uncompiled now, so that hooks are of use.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 2), nn.ReLU())
        >>> _ = model[0].weight.data.copy_(torch.tensor([[1.0], [-1.0]])), model[0].bias.data.zero_()
        >>> looking = Capture(model)
        >>> looking.install()
        >>> _ = model(torch.tensor([[2.0], [4.0]]))
        >>> looking.remove()
        >>> float(looking.seen.activations["0"].max), float(looking.seen.dead["1"])
        (4.0, 0.5)
    """

    def __init__(self, model: nn.Module, keep: Sequence[str] = (), *, graded: bool = True, eager: bool = False) -> None:
        self._model = weakref.ref(unwrapped(model))
        self._keep = tuple(keep)
        self._graded, self._eager = graded, eager or not compiled(model)
        self._handles: list[Any] = []
        self._mode: Interception | None = None
        self.seen = Seen()

    def install(self) -> None:
        """Set the hooks; `seen` starts empty.

        Raises:
            ReferenceError: if the model is gone.
        """
        self.remove()
        model = self._model()
        if model is None:
            raise ReferenceError("expected a model, got one that was deleted; keep a reference to it")
        self.seen = Seen()
        if not self._eager:
            self.seen.notes[_COMPILED] = None
            return
        named = {_name(n): m for n, m in model.named_modules()}
        self.seen.expected = _expected(named)
        watch = Watch(self.seen, graded=self._graded)
        self._mode = Interception(watch)
        heads = _heads(model)
        for name, module in named.items():
            kept = any(fnmatchcase(name, glob) for glob in self._keep)
            part = _Part(name, module, self._mode, head=module in heads, kept=kept)
            before, after = _Hook(part.before), _Hook(part.after)
            self._handles.append(module.register_forward_pre_hook(before, prepend=True))
            self._handles.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))

    def remove(self) -> None:
        """Remove every hook, and the mode where an interrupt left it behind. May be called again."""
        while self._handles:
            self._handles.pop().remove()
        if self._mode is not None:
            self._mode.watch.frames.clear()
            self._mode.origins.clear()
            self._mode.leave()
            self._mode = None


@contextmanager
def capture(model: nn.Module, keep: Sequence[str] = (), *, eager: bool = False) -> Generator[Seen, None, None]:
    """See every forward pass in a block, and the cross-entropies called in it.

    Args:
        model: any module.
        keep: globs of names of modules whose inputs and outputs are kept.
        eager: whether a compiled model runs uncompiled in the block.

    Example:
        >>> model, x, y = nn.Linear(2, 2), torch.ones(4, 2), torch.zeros(4, dtype=torch.long)
        >>> _ = nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
        >>> with capture(model) as seen:
        ...     loss = nn.functional.cross_entropy(model(x), y)
        >>> bool(torch.isclose(seen.output.log_z_mean, loss)), seen.targets.tolist()
        (True, [0, 0, 0, 0])
    """
    looking = Capture(model, keep, graded=False, eager=eager)
    looking.install()
    try:
        if looking._mode is None:
            yield looking.seen
        else:
            with looking._mode:
                yield looking.seen
    finally:
        looking.remove()


def replay(problem: Problem, keep: Sequence[str] = ()) -> Seen:
    """What is seen when a problem's data runs through its model once more, without compilation.

    The forward passes are those of the problem: in its mode and precision, without autocast.

    Args:
        problem: model, loss and data.
        keep: globs of names of modules whose inputs and outputs are kept.

    Example:
        >>> seen = replay(Problem(nn.Linear(3, 2), nn.functional.cross_entropy, (torch.ones(5, 3), torch.zeros(5).long())))
        >>> list(seen.activations), len(seen.output.log_z_R)
        ([''], 5)
    """
    _ = problem.survey  # the first look at the data may run the model
    with problem.measuring(), torch.no_grad(), capture(problem.network, keep, eager=True) as seen:
        for batch in problem.batches():
            problem.loss_of(problem.outputs(batch), batch)
    if compiled(problem.model):
        seen.notes["the step itself: its batch was run again, uncompiled and without autocast"] = None
    return seen


class _Part:
    """What is done before and after one module runs. It knows the name of the module, not the module."""

    def __init__(self, name: str, module: nn.Module, mode: Interception, *, head: bool, kept: bool) -> None:
        self.name, self.mode, self.head, self.kept = name, mode, head, kept
        self.leaf = not list(module.children())
        self.layer = _layer(module) and not isinstance(module, _PASSING)
        self.axis = _axis(module)
        self.thread = threading.get_ident()

    def before(self, module: nn.Module, arguments: Any) -> None:
        """The module is called."""
        if torch.compiler.is_compiling() or threading.get_ident() != self.thread:
            return
        mode, watch = self.mode, self.mode.watch
        if not watch.frames:
            if not watch.begins():
                return
            watch.seen.passes += 1
            watch.losses = len(watch.seen.losses)
            mode.begin()
        watch.frames.append(Frame(self.name, self.leaf))

    def after(self, module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        """The module returned, or raised: then without an output."""
        if torch.compiler.is_compiling() or threading.get_ident() != self.thread:
            return
        watch = self.mode.watch
        if not watch.frames or watch.frames[-1].name != self.name:
            return
        try:
            if output is not None:
                with aside():
                    self._see(watch, arguments, keywords, output)
                if self.head and len(watch.frames) == 1:
                    watch.output(output)
        finally:
            watch.frames.pop()
            if not watch.frames:
                self.mode.end()

    def _see(self, watch: Watch, arguments: Any, keywords: Any, output: Any) -> None:
        watch.seen.called.add(self.name)
        if self.layer:
            watch.activation(self.name, output)
        if self.axis is not None:
            watch.axis = self.axis
        if self.kept:
            given = arguments[0] if arguments else next(iter(keywords.values()), None)
            pair = _copied(given, watch.takes), _copied(output, watch.takes)
            watch.seen.kept.setdefault(self.name, []).append(pair)


class _Hook:
    """A hook that a copy or a saved file of the model does not carry along."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> None:
        """What the function does; nothing is returned, so nothing is changed."""
        self.function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook(_nothing)


def _nothing(*_: Any) -> None:
    return None


def _copied(x: Any, takes: Callable[[Any], bool]) -> Any:
    """Tensors as copies, plain values as they are; of anything else, which may hold a graph, nothing."""
    plain = bool | int | float | str
    return tree_map(lambda t: t.detach().clone() if takes(t) else t if isinstance(t, plain) else None, x)


def _name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _layer(module: nn.Module) -> bool:
    """Whether a module is looked at as one: without children, or attention, which does not call its own."""
    return not list(module.children()) or isinstance(module, nn.MultiheadAttention)


def _axis(module: nn.Module) -> int | None:
    """The axis of a layer's output along which its units lie; None where it leaves them."""
    kind = nn.modules
    if isinstance(module, kind.conv._ConvNd):
        return -1 - len(module.kernel_size)
    if isinstance(module, kind.batchnorm._NormBase | nn.GroupNorm):
        return 1
    rows = nn.Linear | nn.Bilinear | nn.Embedding | nn.LayerNorm | nn.RMSNorm | nn.RNNBase | nn.MultiheadAttention
    return -1 if isinstance(module, rows) else None


def _expected(named: dict[str, nn.Module]) -> Expected:
    inner = {f"{n}.out_proj" for n, m in named.items() if isinstance(m, nn.MultiheadAttention)}
    own = [n for n, m in named.items() if _layer(m) and next(m.parameters(), None) is not None and n not in inner]
    attention = [n for n, m in named.items() if "attention" in type(m).__name__.lower()]
    return Expected(layers=tuple(own), attention=tuple(attention))


def _heads(model: nn.Module) -> set[nn.Module]:
    """The model, and what it is but a shell around: whose return is the network's output."""
    found = [model]
    while True:
        inner = [m for m in found[-1].children() if next(m.parameters(), None) is not None]
        if len(inner) != 1 or next(found[-1].parameters(recurse=False), None) is not None:
            return set(found)
        found.append(inner[0])
