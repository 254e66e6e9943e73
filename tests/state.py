"""One hash of everything that a measurement must leave alone."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> str:
    """Hash of a model's state, of an optimizer's, and of the global state of torch, numpy and Python.

    The model: parameters, buffers, `.grad`, `requires_grad`, version counters, training flags, hooks, and every other attribute
    of every module, by value where it is a tensor or a plain value, else by identity.
    """
    h = hashlib.sha256()
    for name, module in model.named_modules():
        _add(h, name, type(module).__name__)
        for key, value in sorted(module.__dict__.items()):
            _add(h, key)
            _value(h, value)
    for name, p in model.named_parameters(remove_duplicate=False):
        _add(h, name, id(p), p.requires_grad, p._version, p.data_ptr(), p._backward_hooks)
        _value(h, p)
        _value(h, p.grad)
    if optimizer is not None:
        for group in optimizer.param_groups:
            _add(h, {k: v for k, v in group.items() if k != "params"}, [id(p) for p in group["params"]])
        for p, state in optimizer.state.items():
            _add(h, id(p))
            _value(h, dict(state))
    _global(h)
    return h.hexdigest()


def _global(h: Any) -> None:
    _value(h, torch.get_rng_state())
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for state in torch.cuda.get_rng_state_all():
            _value(h, state)
    _add(h, random.getstate(), [str(x) for x in np.random.get_state()])
    _value(h, torch.from_numpy(np.random.get_state()[1].copy()))
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    _add(
        h, cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()
    )
    _add(h, cudnn.enabled, cudnn.benchmark, cudnn.deterministic, torch.backends.mha.get_fastpath_enabled())
    if hasattr(torch.backends, "fp32_precision"):
        parts = (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv)
        _add(h, [part.fp32_precision for part in parts])
    else:
        _add(h, torch.get_float32_matmul_precision(), cudnn.allow_tf32)
    _add(h, torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled())
    _add(h, torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"), torch.get_default_dtype())


def _add(h: Any, *values: Any) -> None:
    h.update(repr(values).encode())


def _value(h: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        _add(h, value.dtype, tuple(value.shape), value.device)
        h.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key, item in value.items():
            _add(h, key if isinstance(key, str | int) else id(key))
            _value(h, item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            _value(h, item)
    elif isinstance(value, bool | int | float | str | torch.dtype | None):
        _add(h, value)
    else:
        _add(h, type(value).__name__, id(value))
