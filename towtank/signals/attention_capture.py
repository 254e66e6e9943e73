"""A function mode that sees attention of any kind, activation functions that can be 0, and cross-entropies.

`scaled_dot_product_attention` and `multi_head_attention_forward` say what they are. Attention that is written out is found by
where tensors come from: a product of two tensors, scaled, shifted and masked, then a softmax of it, then a product of that with
something else. Only then is it attention; the softmax of an output is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from towtank.signals.attention_arguments import Query, of_dot_product, of_multi_head
from towtank.signals.attention_stats import Attention, square
from towtank.signals.moments import aside
from towtank.signals.seen import Watch

# Functions and methods by name: those that multiply, and those that leave the entries of logits or weights in their places.
_PRODUCTS = {"matmul", "bmm", "mm", "__matmul__", "__rmatmul__", "baddbmm", "einsum"}
_SOFTMAXES = {"softmax", "special_softmax"}
_CARRIERS = set(
    "mul div true_divide add sub rsub masked_fill where to float double half bfloat16 type type_as clamp clamp_min clamp_max "
    "tanh cat concat dropout view reshape view_as unflatten flatten permute transpose swapaxes swapdims movedim squeeze "
    "unsqueeze contiguous clone detach expand narrow nan_to_num tril __getitem__ __get__ __radd__ __rsub__ __rmul__ pad "
    "addcmul multiply divide subtract masked_scatter alpha_dropout feature_dropout".split()
)
_CARRIERS |= {f"{name}_" for name in _CARRIERS if not name.startswith("__")}
_GATES = {
    "relu",
    "relu_",
    "relu6",
    "threshold",
    "_threshold",
    "threshold_",
    "hardswish",
    "hardsigmoid",
    "hardtanh",
    "hardtanh_",
}


class _Product:
    """Logits in the making: who makes them, and the norms of what they were made from."""

    __slots__ = ("name", "squares", "counts")

    def __init__(self, name: str, q: Tensor, k: Tensor, size: int) -> None:
        self.name = name
        self.squares = (square(q), square(k))
        self.counts = (max(1, q.numel() // size), max(1, k.numel() // size))


@dataclass
class _Weights:
    """The softmax of a product: attention, once it is multiplied with something; None from then on."""

    name: str
    attention: Attention | None


class _Origins:
    """Where tensors come from, by identity; they are held weakly."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[Tensor], _Product | _Weights]] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def of(self, x: Any) -> _Product | _Weights | None:
        found = self._found.get(id(x))
        return found[1] if found and found[0]() is x else None

    def put(self, x: Tensor, origin: _Product | _Weights) -> None:
        self._found[id(x)] = weakref.ref(x), origin

    def clear(self) -> None:
        self._found.clear()


class Interception(TorchFunctionMode):
    """Writes to a watch what functions of torch are called with.

    Args:
        watch: who is running.
    """

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch
        self.origins = _Origins()
        self._entered = False  # by a hook, for one forward pass

    def begin(self) -> None:
        """A forward pass begins: the mode is on until its end, unless it is on anyway."""
        if self not in _get_current_function_mode_stack():
            self._entered = True
            _push_mode(self)

    def end(self) -> None:
        """The forward pass ended."""
        self.origins.clear()
        self.watch.axis = -1
        if self._entered:
            self.leave()

    def leave(self) -> None:
        """Off this thread's stack, wherever it lies; modes above it stay."""
        self._entered = False
        above: list[Any] = []
        if self in _get_current_function_mode_stack():
            while (top := _pop_mode()) is not self:
                above.append(top)
        for other in reversed(above):
            _push_mode(other)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function's own result; what is seen of it is noted aside."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        handler = _HANDLERS.get(name)
        if handler is not None and (self.watch.frames or name == "cross_entropy"):
            handler(self, name, args, kwargs, out)
        return out

    # Attention that says what it is

    def dot_product(self, _: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """`scaled_dot_product_attention`."""
        self._attend(of_dot_product, args, kwargs)

    def multi_head(self, _: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """`multi_head_attention_forward`: a mode sees it whole, without the calls inside."""
        self._attend(of_multi_head, args, kwargs)

    def _attend(self, read: Callable[..., Query], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and not isinstance(x, CausalBias)]
        if not all([self.watch.takes(x) for x in tensors]):
            return
        with aside():
            query = read(args, kwargs)
            if query.q.numel() and query.k.numel():
                found = Attention.of(query.q, query.k, scale=query.scale, masks=query.masks, causal=query.causal)
                self._note(self.watch.frames[-1].name, found)

    def _note(self, name: str, attention: Attention) -> None:
        self.watch.seen.attended.setdefault(name, []).append(attention)

    # Attention that is written out

    def product(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """A matrix product: of weights with values, which makes attention of them, or of what may be queries and keys."""
        operands = _operands(name, args, kwargs)
        if operands is None:
            return
        a, b, contracted = operands
        origins = [self.origins.of(x) for x in (a, b)]
        weights = [o for o in origins if isinstance(o, _Weights)]
        for origin in weights:
            if origin.attention is not None:
                self._note(origin.name, origin.attention)
                origin.attention = None
        if not weights and contracted and _plain(a) and _plain(b) and not (_learned(a) or _learned(b)):
            self.origins.put(out, _Product(self.watch.frames[-1].name, a, b, contracted))

    def softmax(self, _: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """A softmax: of a product, it makes what may be attention weights."""
        logits: Any = args[0] if args else kwargs.get("input")
        origin = self.origins.of(logits)
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if not isinstance(origin, _Product) or not isinstance(dim, int) or not logits.numel():
            return
        found = Attention.of_logits(logits, dim, origin.squares, origin.counts)
        self.origins.put(out, _Weights(origin.name, found))

    def carry(self, _: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """A function that leaves entries in their places hands on where they come from."""
        if not self.origins or not _plain(out):
            return
        for x in (*args, *kwargs.values()):
            for each in x if isinstance(x, tuple | list) else (x,):
                origin = self.origins.of(each)
                if origin is not None:
                    self.origins.put(out, origin)
                    return

    # The rest

    def gate(self, name: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """An activation function that can be 0."""
        least = args[1] if len(args) > 1 else kwargs.get("min_val")
        if not name.startswith("hardtanh") or least == 0:
            self.watch.units(self.watch.place(name.strip("_")), out)

    def cross_entropy(self, _: str, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """The loss, inside the model or, where the mode is on around it, outside."""
        watch = self.watch
        if not watch.frames and not watch.begins():
            return
        given = dict(zip(("input", "target"), args)) | kwargs
        smooth = bool(given.get("label_smoothing", args[7] if len(args) > 7 else 0))
        ignored = given.get("ignore_index", args[4] if len(args) > 4 else -100)
        watch.loss(given["input"], given["target"], smooth, ignored)


_HANDLERS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(_PRODUCTS, Interception.product),
    **dict.fromkeys(_SOFTMAXES, Interception.softmax),
    **dict.fromkeys(_CARRIERS, Interception.carry),
    **dict.fromkeys(_GATES, Interception.gate),
    "scaled_dot_product_attention": Interception.dot_product,
    "multi_head_attention_forward": Interception.multi_head,
    "cross_entropy": Interception.cross_entropy,
}


def _plain(x: Any) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.is_floating_point()


def _learned(x: Tensor) -> bool:
    """Whether a matrix is a weight, or a view of one: its product is a layer's."""
    return x.ndim < 3 and (isinstance(x, nn.Parameter) or isinstance(x._base, nn.Parameter))


def _operands(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, Any, int] | None:
    """The two factors of a product and the number of terms of each sum, 0 where it cannot be one of queries and keys."""
    if name == "einsum":
        return _einsum(args)
    names = ("batch1", "batch2") if name == "baddbmm" else ("mat2", "other", "tensor2")
    given = list(args[1:] if name == "baddbmm" else args)
    given += [kwargs[key] for key in ("input", *names) if key in kwargs and not (name == "baddbmm" and key == "input")]
    a, b = (given + [None, None])[:2]
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return None
    a, b = (b, a) if name == "__rmatmul__" else (a, b)
    return a, b, a.shape[-1] if min(a.ndim, b.ndim) > 1 else 0


def _einsum(args: Sequence[Any]) -> tuple[Any, Any, int] | None:
    operands = args[1] if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
    if not isinstance(args[0], str) or len(operands) != 2 or "->" not in args[0]:
        return None
    inputs, result = args[0].replace(" ", "").split("->")
    first, second = inputs.split(",")
    summed = (set(first) & set(second)) - set(result) - {"."}
    rows, columns = set(first) - set(second), set(second) - set(first)
    if not (summed and rows & set(result) and columns & set(result)):
        return operands[0], operands[1], 0
    size = 1
    for letter in summed:
        head, _, tail = first.partition(letter)
        size *= operands[0].shape[-1 - len(tail) if "." in head else len(head)]
    return operands[0], operands[1], size
