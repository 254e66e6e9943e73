"""The problem: a model, a loss, and data."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from towtank.problem import data as source
from towtank.problem import state
from towtank.problem.blame import check_finite
from towtank.problem.data import Batch
from towtank.problem.forward import Call, forward, shifts, targets_of, unwrapped
from towtank.problem.parameters import Selection, padding_rows, select
from towtank.problem.survey import Survey, guarded, survey
from towtank.problem.wording import check_arguments, convention


@dataclass(frozen=True, eq=False)
class Problem:
    """A model, a loss and data: L(theta) = sum_b w_b loss_b(theta) / sum_b w_b over batches b.

    Nothing of the user's is changed by any use of it: the model runs with our own copies of its parameters and buffers.
    Half precision is measured in float32, with autocast and TF32 off, and attention by the math kernel, because the fused
    kernels have no second derivative.

    Args:
        model: any module. Of compiled and data-parallel wrappers, the module inside.
        loss: `loss(outputs, targets)` -> scalar mean, such as `F.cross_entropy`.
        data: one batch, or an iterable of batches that gives the same ones in every pass. A batch is (inputs, targets), or
            (input, input, ..., targets), or a mapping with "labels" or "targets".
        forward: `forward(model, batch)` -> outputs. The default calls the model with the inputs of the batch and takes
            `.logits` of an output object; labels (B, T) of a mapping are flattened with the logits, and shifted by one where
            the model is a causal language model of Hugging Face.
        weight: `weight(batch)` -> number of loss terms that the mean of this batch runs over, w_b. The default counts targets
            other than `ignore_index` (-100) for class indices, and elements otherwise.
        params: which parameters vary: names, globs, or a predicate of name and parameter. Default: all that require a
            gradient. Tied parameters count once, under their first name.
        mode: "eval", or "train": normalization layers use the statistics of the batch (running ones are left alone).
        dropout: whether every other module is in training mode; the random numbers are then the same in every pass.
        micro_batches: in mode "train", whether to average over batches that are each normalized by themselves. The result
            is not that of the merged batch.
        precision: dtype to measure in. Default: that of the parameters, half precision widened to float32.
        shift: whether labels of a mapping move by one; None decides by the class of the model.
        seed: of the random numbers in the forward pass, per batch.
        checks: whether the data is read twice and compared, and two batches are merged to check the weights, on first use.

    Raises:
        TypeError: if data, parameters or loss are of the wrong kind.
        ValueError: if nothing varies, or the data cannot be read many times.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
        >>> problem = Problem(model, nn.functional.mse_loss, [(x[:2], torch.zeros(2, 1)), (x[2:], torch.zeros(1, 1))])
        >>> problem.size, problem.names, [round(b.weight, 3) for b in problem.batches()]
        (2, ('weight',), [0.667, 0.333])
        >>> w = model.weight.detach()
        >>> bool(torch.isclose(torch.tensor(problem.value()), (x @ w.T).square().mean()))
        True
    """

    model: nn.Module
    loss: Callable[..., Any]
    data: Any
    forward: Callable[[nn.Module, Any], Any] | None = field(default=None, kw_only=True)
    weight: Callable[[Any], float] | None = field(default=None, kw_only=True)
    params: Selection = field(default=None, kw_only=True)
    mode: Literal["eval", "train"] = field(default="eval", kw_only=True)
    dropout: bool = field(default=False, kw_only=True)
    micro_batches: bool = field(default=False, kw_only=True)
    precision: torch.dtype | None = field(default=None, kw_only=True)
    shift: bool | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    checks: bool = field(default=True, kw_only=True)
    first: int = field(default=0, kw_only=True, repr=False)  # place of the first batch, so that its random numbers stay

    def __post_init__(self) -> None:
        check_arguments(self)
        source.check_source(self.data)
        _ = self._selected, self._padding

    # What varies, as flat vectors

    @cached_property
    def network(self) -> nn.Module:
        """The module that is measured: the model without compiled or data-parallel wrappers."""
        return unwrapped(self.model)

    @cached_property
    def _selected(self) -> dict[str, nn.Parameter]:
        return select(self.network, self.params)

    @cached_property
    def _places(self) -> dict[str, tuple[dict[str, Any], str]]:
        """Where each parameter and buffer hangs, so that one that was replaced since is found."""
        found = {}
        for prefix, module in self.network.named_modules():
            for owner in (module._parameters, module._buffers):
                found |= {f"{prefix}.{k}".lstrip("."): (owner, k) for k, t in owner.items() if t is not None}
        firsts = {n for n, _ in self.network.named_parameters()} | {n for n, _ in self.network.named_buffers()}
        return {n: place for n, place in found.items() if n in firsts}

    def _now(self) -> dict[str, Tensor]:
        return {n: owner[k] for n, (owner, k) in self._places.items() if owner.get(k) is not None}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters that vary, in the order of flat vectors."""
        return tuple(self._selected)

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter that varies."""
        return {n: p.shape for n, p in self._selected.items()}

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each parameter lies in a flat vector."""
        found, start = {}, 0
        for n, p in self._selected.items():
            found[n] = slice(start, start + p.numel())
            start += p.numel()
        return found

    @property
    def size(self) -> int:
        """P, the number of scalars that vary."""
        return sum(p.numel() for p in self._selected.values())

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of flat vectors: that of the measured parameters."""
        if self.precision:
            return self.precision
        wide = any(p.dtype == torch.float64 for p in self._selected.values())
        return torch.float64 if wide else torch.float32

    @cached_property
    def device(self) -> torch.device:
        """Of flat vectors and batches: that of the first parameter that varies."""
        return next(iter(self._selected.values())).device

    def parameters(self) -> tuple[Tensor, ...]:
        """The user's own parameters that vary, in order: for reading."""
        now = self._now()
        return tuple(now[n] for n in self.names)

    def leaves(self) -> dict[str, Tensor]:
        """Our own differentiable copies of the parameters; in float32 and float64 they share memory with the user's."""
        with torch.inference_mode(False):
            now = zip(self.names, self.parameters())
            return {n: source.measured(p, self.precision).requires_grad_() for n, p in now}

    def flatten(self, named: Mapping[str, Tensor]) -> Tensor:
        """One vector (P,) of named tensors.

        Raises:
            ValueError: if names or shapes are not those of the problem.
        """
        if set(named) != set(self.names):
            odd = sorted(set(named) ^ set(self.names))
            raise ValueError(
                f"expected exactly the parameters of the problem, got {', '.join(odd)} too much or too little"
            )
        wrong = [n for n in self.names if named[n].shape != self.shapes[n]]
        if wrong:
            n = wrong[0]
            raise ValueError(f"expected {n} of shape {tuple(self.shapes[n])}, got {tuple(named[n].shape)}")
        return torch.cat([named[n].detach().reshape(-1).to(self.device, self.dtype) for n in self.names])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Named tensors of a vector (P,): views of it.

        Raises:
            ValueError: if the vector is not of shape (P,).
        """
        if vector.shape != (self.size,):
            raise ValueError(f"expected a vector of shape ({self.size},), got {tuple(vector.shape)}")
        return {n: vector[s].view(self.shapes[n]) for n, s in self.slices.items()}

    def versions(self) -> tuple[Any, ...]:
        """Moves when a parameter or buffer is replaced or changed in place, through `.data` too."""
        now = list(self._now().values())
        counters = tuple((0 if t.is_inference() else t._version, t.data_ptr(), t.shape) for t in now)
        floating = [t.detach() for t in now if t.dtype.is_floating_point and t.numel()]
        norms = [torch.linalg.vector_norm(t) for t in floating]  # what `.data` hides from the counters
        return counters, tuple(torch.stack([n.double().to(self.device) for n in norms]).tolist())

    # Data

    @cached_property
    def survey(self) -> Survey:
        """What the first look at the data found."""
        return survey(self)

    def count(self, raw: Any, index: int) -> float:
        """Number of loss terms in a raw batch.

        Raises:
            ValueError: if it is negative or not finite.
        """
        count = float(self.weight(raw) if self.weight else source.terms(self.loss, self._targets(raw), raw))
        if not (math.isfinite(count) and count >= 0):
            raise ValueError(f"expected a finite weight of at least 0, got {count} for batch {index}")
        return count

    def _targets(self, raw: Any) -> Any:
        return targets_of(raw, default=self.forward is None, shift=self.shifted)

    @cached_property
    def shifted(self) -> bool:
        """Whether labels of mappings move by one."""
        return shifts(self.network) if self.shift is None else self.shift

    def ready(self, raw: Any, *, index: int, count: float, total: float) -> Batch:
        """A raw batch made ready to be measured."""
        with torch.inference_mode(False):
            raw = source.prepared(raw, self.device, self.precision)
        return Batch(raw=raw, targets=self._targets(raw), weight=count / total, index=index, count=count)

    def batches(self) -> Iterator[Batch]:
        """All batches that count, in order, on the device of the model.

        Raises:
            ValueError: if their number is not that of the first look.
        """
        found, i = self.survey, -1
        for i, raw in enumerate(guarded(self)):
            if i < len(found.counts) and found.counts[i]:
                yield self.ready(raw, index=self.first + i, count=found.counts[i], total=found.total)
        if i + 1 != len(found.counts):
            raise ValueError(
                f"expected the {len(found.counts)} batches of the first pass, got {i + 1}; give list(data)"
            )

    # What the operators differentiate

    def backends(self) -> AbstractContextManager[None]:
        """Settings under which gradients and products are exact; put back on exit."""
        return state.backends(self.device, recurrent=self._recurrent)

    @cached_property
    def _recurrent(self) -> bool:
        return any(isinstance(m, nn.RNNBase) for m in self.network.modules())

    @contextmanager
    def measuring(self) -> Generator[None, None, None]:
        """Modes, backends and random states for forward passes; all put back on exit."""
        with ExitStack() as stack:
            stack.enter_context(state.random_state(self.device))
            stack.enter_context(state.no_checkpoints())
            stack.enter_context(state.modes(self.network, statistics=self.mode == "train", dropout=self.dropout))
            stack.enter_context(self.backends())
            yield

    def outputs(self, batch: Batch, params: Mapping[str, Tensor] | None = None) -> Any:
        """Outputs of the model on a batch; call it inside `measuring()`.

        Args:
            batch: one of `batches()`.
            params: {name: tensor} in place of the parameters that vary; missing ones, and None, stand for the user's values.
        """
        state.seed(self.seed + batch.index, self.device)
        parameters = {n for n, _ in self.network.named_parameters()}
        given = params or {}
        kept = {n: t for n, t in self._now().items() if n not in given or n in self._padding}
        own = {n: source.measured(t if n in parameters else t.clone(), self.precision) for n, t in kept.items()}
        tensors = own | {n: self._fixed_row(n, t, own) for n, t in given.items()}
        return functional_call(self._call, {f"model.{n}": t for n, t in tensors.items()}, (batch.raw,))

    def _fixed_row(self, name: str, t: Tensor, own: Mapping[str, Tensor]) -> Tensor:
        row = self._padding.get(name)
        if row is None:
            return t
        varies = torch.arange(len(t), device=t.device)[:, None] != row
        return torch.where(varies, t, own[name].to(t.dtype))

    @cached_property
    def _padding(self) -> dict[str, int]:
        return padding_rows(self.network)

    @cached_property
    def _call(self) -> Call:
        return Call(self.network, self.forward or partial(forward, shift=self.shifted))

    def loss_of(self, outputs: Any, batch: Batch) -> Tensor:
        """The mean loss () of outputs on a batch.

        Raises:
            TypeError: if the loss is no real tensor.
            ValueError: if it is no scalar.
        """
        loss = self._loss(outputs, batch.targets)
        if not isinstance(loss, Tensor) or not loss.dtype.is_floating_point:
            kind = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"expected the loss to be a real scalar tensor, got {kind}; return a mean over the batch")
        if loss.numel() != 1:
            raise ValueError(
                f"expected the loss to be a scalar, got shape {tuple(loss.shape)}; return its mean, as reduction='mean' does"
            )
        return loss.reshape(())

    def _loss(self, outputs: Any, targets: Any) -> Any:
        if isinstance(self.loss, nn.Module):
            own = {**dict(self.loss.named_parameters()), **dict(self.loss.named_buffers())}
            cast = {n: source.measured(t, self.precision).to(self.device) for n, t in own.items()}
            return functional_call(self.loss, cast, (outputs, targets))
        return self.loss(outputs, targets)

    def batch_loss(self, batch: Batch, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """The mean loss () of a batch; call it inside `measuring()`.

        Raises:
            ValueError: if it is not finite, naming what that comes from.
        """
        return check_finite(self, self.loss_of(self.outputs(batch, params), batch), batch)

    def value(self, params: Mapping[str, Tensor] | None = None) -> float:
        """The full loss, at the user's parameters or at `params`."""
        with self.measuring(), torch.no_grad():
            return math.fsum(b.weight * float(self.loss_of(self.outputs(b, params), b)) for b in self.batches())

    def gradient(self, params: Mapping[str, Tensor] | None = None) -> tuple[float, Tensor]:
        """The full loss and its gradient (P,), at the user's parameters or at `params`."""
        leaves = self.leaves() if params is None else {n: t.detach().requires_grad_() for n, t in params.items()}
        total = 0.0
        with self.measuring():
            flat = torch.zeros(self.size, dtype=self.dtype, device=self.device)
            for batch in self.batches():
                loss = self.batch_loss(batch, leaves)
                grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
                flat.add_(self.flatten(dict(zip(leaves, grads))), alpha=batch.weight)
                total += batch.weight * float(loss.detach())
        return total, flat

    # Other problems of the same kind

    def replace(self, **changes: Any) -> Problem:
        """The same problem but for some arguments of the constructor."""
        new = replace(self, **changes)
        if "survey" in self.__dict__ and not set(changes) - {"params", "precision"}:
            new.__dict__["survey"] = self.survey
        return new

    def restrict(self, names: Iterable[str]) -> Problem:
        """The problem in which only some of its parameters vary.

        Raises:
            ValueError: if a name is not one of its parameters.
        """
        wanted = {names} if isinstance(names, str) else set(names)
        if not wanted or wanted - set(self.names):
            odd = ", ".join(sorted(wanted - set(self.names))) or "none"
            raise ValueError(f"expected names among {', '.join(self.names)}; got {odd}")
        return self.replace(params=tuple(n for n in self.names if n in wanted))

    def batch(self, index: int) -> Problem:
        """The problem of one batch alone.

        Raises:
            IndexError: if there is no such batch, or nothing in it counts.
        """
        found = next((b for b in self.batches() if b.index == self.first + index), None)
        if found is None:
            raise IndexError(f"expected the place of one of {len(self.survey.counts)} batches that count, got {index}")
        one = found.raw if source.is_batch(found.raw) else tuple(found.raw)
        return replace(self, data=one, first=found.index)

    @property
    def convention(self) -> str:
        """Which loss this is: mean of what over how many terms, of which parameters, in which mode."""
        return convention(self)
