"""What a measurement sets and puts back: backends, random numbers, modes and attributes of the modules."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint


def _statistics_of_the_batch(module: nn.Module) -> bool:
    """Whether a module normalizes with statistics of the batch in training: batch norms, and look-alikes."""
    kinds = (nn.modules.batchnorm._NormBase,)
    return isinstance(module, kinds) or "running_mean" in module._buffers


def batch_coupled(model: nn.Module) -> list[str]:
    """Names of the modules whose output in training mode couples the examples of a batch."""
    instance = nn.modules.instancenorm._InstanceNorm
    return [name for name, m in model.named_modules() if _statistics_of_the_batch(m) and not isinstance(m, instance)]


@contextmanager
def modes(model: nn.Module, *, statistics: bool, dropout: bool) -> Generator[None, None, None]:
    """Modules in the asked mode; on exit every attribute of every module is what it was.

    Training flags are set one by one: `model.train()` may be overridden. Sparse gradients of embeddings have no second
    derivative, so they are dense meanwhile; their `padding_idx` zeroes part of a gradient, which then is the gradient of no
    function, so it is off. Attributes that a forward pass leaves behind (caches, counters) are undone,
    which also lets go of the graph they may hold.

    Args:
        model: the network.
        statistics: whether normalization uses statistics of the batch.
        dropout: whether every other module is in training mode.
    """
    before = {m: dict(m.__dict__) for m in model.modules()}
    try:
        for m in before:
            m.training = statistics if _statistics_of_the_batch(m) else dropout
            if isinstance(m, nn.Embedding | nn.EmbeddingBag):
                m.sparse = False
            if isinstance(m, nn.Embedding):
                m.padding_idx = None  # `padding_rows` holds them fixed instead
        yield
    finally:
        for m, attributes in before.items():
            _put_back(m.__dict__, attributes)


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    for key in now.keys() - before.keys():
        del now[key]
    for key, value in before.items():
        if key not in now or now[key] is not value:
            now[key] = value


@contextmanager
def no_checkpoints() -> Generator[None, None, None]:
    """Activation checkpointing off: it runs a module again in the backward pass, by then with the user's parameters in place.

    Second derivatives and gradients elsewhere would be wrong. What is patched is looked up at every call of a checkpoint.
    """
    with ExitStack() as stack:
        for name, plain in (("_checkpoint_without_reentrant_generator", _once), ("CheckpointFunction", _Direct)):
            if hasattr(checkpoint, name):
                stack.enter_context(_attribute(checkpoint, name, plain))
        yield


def _once(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


class _Direct:
    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def random_state(device: torch.device, generators: Iterable[torch.Generator] = ()) -> Generator[None, None, None]:
    """All random states (torch on the CPU and on `device`, Python, numpy, `generators`) are put back on exit."""
    every = [torch.default_generator, *_of_device(device), *generators]
    states = [g.get_state() for g in every]
    python, legacy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        for g, state in zip(every, states):
            g.set_state(state)
        random.setstate(python)
        np.random.set_state(legacy)


def seed(value: int, device: torch.device) -> None:
    """Seed what `random_state` saves; call it only inside."""
    for g in (torch.default_generator, *_of_device(device)):
        g.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)


def _of_device(device: torch.device) -> list[torch.Generator]:
    if device.type != "cuda":
        return []
    torch.cuda.init()
    index = torch.cuda.current_device() if device.index is None else device.index
    return [torch.cuda.default_generators[index]]


@contextmanager
def backends(device: torch.device, *, recurrent: bool) -> Generator[None, None, None]:
    """Gradients on, autocast and reduced precision off, attention by the math kernel, no fused fast paths.

    The fused attention kernels and cuDNN's recurrent layers have no second derivative.

    Args:
        device: of the model.
        recurrent: whether the model has recurrent layers.
    """
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(torch.inference_mode(False))
        enter(torch.enable_grad())
        enter(torch.autocast(device.type, enabled=False))
        if device.type != "cpu":
            enter(torch.autocast("cpu", enabled=False))
        enter(sdpa_kernel(SDPBackend.MATH))
        enter(_full_precision(device))
        enter(_setting(torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False))
        if device.type == "cuda":
            for flag, value in (("benchmark", False), ("deterministic", True)):
                enter(_attribute(torch.backends.cudnn, flag, value))
            if recurrent:
                enter(_attribute(torch.backends.cudnn, "enabled", False))
        # a compiled module has no second derivative; the stance exists only where something was compiled
        enter(torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext())
        yield


@contextmanager
def _full_precision(device: torch.device) -> Generator[None, None, None]:
    cuda = device.type == "cuda"
    with ExitStack() as stack:
        if hasattr(torch.backends, "fp32_precision"):  # torch >= 2.9: one setting a library; the old ones clash with it
            b: Any = torch.backends
            libraries = [b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn] if cuda else [b.mkldnn.matmul, b.mkldnn.conv]
            for library in libraries:
                if library.fp32_precision not in ("ieee", "none"):
                    stack.enter_context(_attribute(library, "fp32_precision", "ieee"))
        else:
            get, put = torch.get_float32_matmul_precision, torch.set_float32_matmul_precision
            stack.enter_context(_setting(get, put, "highest"))
            if cuda:
                stack.enter_context(_attribute(torch.backends.cudnn, "allow_tf32", False))
        yield


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Generator[None, None, None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _setting(get: Callable[[], Any], put: Callable[[Any], Any], value: Any) -> Generator[None, None, None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)
