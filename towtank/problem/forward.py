"""How a batch goes through a model where the user does not say: tuples, mappings, Hugging Face outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from towtank.problem.data import is_mapping, target_key

_CAUSAL = ("ForCausalLM", "LMHeadModel")


class Call(nn.Module):
    """A forward function as a module, so that `functional_call` can swap the parameters of the model inside."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Any:
        """What the function makes of the model and a batch."""
        return self.function(self.model, batch)


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside a compiled or data-parallel wrapper: wrappers have no second derivative or need every process."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def shifts(model: nn.Module) -> bool:
    """Whether a model is a causal language model of Hugging Face, whose labels are its inputs, shifted by the loss."""
    return any(mark in type(model).__name__ for mark in _CAUSAL)


def targets_of(raw: Any, *, default: bool, shift: bool) -> Any:
    """What the loss compares the outputs with.

    Args:
        raw: the batch.
        default: whether the forward function is ours: labels (B, T) of tokens are then flattened like the logits.
        shift: whether labels move by one.
    """
    if not is_mapping(raw):
        return raw[-1]
    key = target_key(raw)
    targets = raw[key] if key else None
    if default and isinstance(targets, Tensor) and _of_tokens(targets):
        return (targets[:, 1:] if shift else targets).reshape(-1)
    return targets


def forward(model: nn.Module, raw: Any, *, shift: bool) -> Any:
    """Outputs of a model: `model(*inputs)` or `model(**inputs)`; of an output object, its logits.

    Logits (B, T, V) of a mapping whose labels are (B, T) tokens come back as (B * T, V), or (B * (T - 1), V) when shifted, as
    `F.cross_entropy` takes them.

    Raises:
        ValueError: if a mapping holds no targets.
    """
    if not is_mapping(raw):
        inputs = raw[0] if len(raw) == 2 else raw[:-1]
        if is_mapping(inputs):
            return _logits(model(**inputs))
        return _logits(model(*inputs) if isinstance(inputs, tuple | list) else model(inputs))
    key = target_key(raw)
    if key is None:
        raise ValueError(f'expected "labels" or "targets" in the batch, got {", ".join(map(str, raw))}; give forward=')
    logits = _logits(model(**_inputs(model, raw, key)))
    if _of_tokens(raw[key]) and isinstance(logits, Tensor) and logits.ndim == 3:
        return (logits[:, :-1] if shift else logits).flatten(0, 1)
    return logits


def _inputs(model: nn.Module, raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    inputs = {k: v for k, v in raw.items() if k != key}
    if getattr(getattr(model, "config", None), "use_cache", False):
        inputs.setdefault("use_cache", False)  # a cache of keys and values serves generation only
    decoder_inputs = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if decoder_inputs and not any(k.startswith("decoder_input") for k in inputs):
        inputs["decoder_input_ids"] = decoder_inputs(
            raw[key]
        )  # what the model itself makes of labels, which it is not given
    return inputs


def _of_tokens(targets: Any) -> bool:
    return isinstance(targets, Tensor) and not targets.dtype.is_floating_point and targets.ndim == 2


def _logits(outputs: Any) -> Any:
    return outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", outputs)
