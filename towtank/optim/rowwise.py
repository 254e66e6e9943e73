"""Reductions a rule may use: over a row (all axes but the first) and over all rows. Each works traced and on tensors.

A parameter (rows, ...) of one dimension has rows of one number. Under `vmap` the member axis is not a row.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy


def row_sum(x: Any) -> Any:
    """Sum over each row, kept in shape: (rows, a, b) -> (rows, 1, 1).

    Example:
        >>> row_sum(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[3.],
                [7.]])
    """
    if isinstance(x, Proxy):
        return _record(row_sum, x)
    return torch.sum(x.flatten(1), 1).reshape(-1, *(1,) * (x.ndim - 1)) if x.ndim > 1 else x


def row_length(x: Any) -> Any:
    """How many numbers a row has."""
    if isinstance(x, Proxy):
        return _record(row_length, x)
    return math.prod(x.shape[1:])


def row_count(x: Any) -> Any:
    """How many rows there are."""
    if isinstance(x, Proxy):
        return _record(row_count, x)
    return x.shape[0] if x.ndim else 1


def total(rows: Any) -> Any:
    """Sum of one number per row over all rows, as a tensor of one number that broadcasts.

    Example:
        >>> total(row_sum(torch.tensor([[1.0, 2.0], [3.0, 4.0]])))
        tensor(10.)
    """
    return _record(total, rows) if isinstance(rows, Proxy) else rows.sum()


def largest(rows: Any) -> Any:
    """Largest of one number per row, as a tensor of one number."""
    return _record(largest, rows) if isinstance(rows, Proxy) else rows.amax()


def per_row(param: Tensor) -> Tensor:
    """Zeros, one per row, that broadcast against the parameter.

    Example:
        >>> per_row(torch.ones(2, 3, 4)).shape
        torch.Size([2, 1, 1])
    """
    return param.new_zeros(param.shape[:1] + (1,) * (param.ndim - 1))


def _record(function: Any, x: Proxy) -> Proxy:
    return x.tracer.create_proxy("call_function", function, (x,), {})
