"""The fixed batch on which curvature is measured: as exact as it can be in the memory that training itself needs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from towtank.problem.data import examples, is_batch, is_mapping, part
from towtank.problem.state import batch_coupled

PARTS = 4  # a Hessian product holds 2.6 times what a gradient of the same examples holds, and its own vectors


def probe_data(batch: Any, model: nn.Module, *, train: bool, given: bool) -> Any:
    """A copy of a batch, in parts that a Hessian product takes one after another in less memory than a training step.

    The mean over the parts is the loss of the batch, so nothing is lost. Where normalization couples the examples of a batch it
    would be another loss: then the first quarter of the examples stands for the batch, unless the user chose it.

    Args:
        batch: one batch, or an iterable of batches, which is left as it is.
        model: the network.
        train: whether normalization uses the batch.
        given: whether the user chose the batch.

    Example:
        >>> import torch
        >>> parts = probe_data((torch.ones(6, 2), torch.zeros(6)), nn.Linear(2, 1), train=True, given=False)
        >>> [len(x) for x, y in parts]
        [2, 2, 2]
    """
    if not is_batch(batch):
        return batch
    plain = dict(batch) if is_mapping(batch) else tuple(batch)
    own = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, plain)
    count = examples(own)
    if count is None or count < 2:
        return own
    size = -(-count // PARTS)
    if train and batch_coupled(model):
        return own if given else part(own, 0, max(size, min(count, 8)))
    return [part(own, i, min(i + size, count)) for i in range(0, count, size)]
