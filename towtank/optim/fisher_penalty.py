"""The Fisher penalty: training is kept from where the gradient at the model's own labels is large."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from towtank.optim.diagonals import sampled_label_loss


class FisherPenalty:
    """A term of the loss, alpha ||grad of the mean loss at labels sampled from the model||^2, computed every few steps.

    Between two computations the term keeps its value and its gradient: p_0 + sum_i <r_i, theta_i - theta_i.detach()>. The
    computed term needs a double backward, about three passes more. Nothing is written to `.grad`. After a resume the
    first call computes anew. Under data parallelism each process has the term of its own batch.

    Args:
        params: theta_i.
        alpha: weight of the term.
        every: calls from one computation to the next.
        generator: of the labels, on the device of the logits.

    Raises:
        ValueError: if alpha is negative or `every` below 1.

    Example:
        >>> w = torch.zeros(1, 2, requires_grad=True)
        >>> penalty = FisherPenalty([w], alpha=0.1)
        >>> round(penalty(w).item(), 4)  # p - onehot is (-1/2, 1/2) or its opposite
        0.05

    Source: Jastrzebski et al. 2021, "Catastrophic Fisher explosion", equation 3; every tenth step as in its section 4.
    """

    def __init__(
        self, params: Sequence[Tensor], *, alpha: float, every: int = 10, generator: torch.Generator | None = None
    ) -> None:
        if not alpha >= 0 or every < 1:
            raise ValueError(f"expected alpha >= 0 and every >= 1, got {alpha} and {every}")
        self.params, self.alpha, self.every, self.generator = list(params), alpha, every, generator
        self._calls = 0
        self._value = torch.tensor(0.0)
        self._gradient: list[Tensor] = []

    def __call__(self, logits: Tensor, *, keep: Tensor | None = None) -> Tensor:
        """The term at this step, to be added to the loss.

        Args:
            logits: (..., C) with their graph, which is kept.
            keep: which positions count, boolean; None: all.

        Raises:
            ValueError: if the logits have no graph, or nothing counts.
        """
        if self._calls % self.every == 0:
            self._compute(logits, keep)
        self._calls += 1
        still = [(r * (p - p.detach())).sum() for r, p in zip(self._gradient, self.params, strict=True)]
        return self._value + torch.stack(still).sum()

    def _compute(self, logits: Tensor, keep: Tensor | None) -> None:
        loss = sampled_label_loss(logits, generator=self.generator, keep=keep)
        grads = torch.autograd.grad(loss, self.params, create_graph=True, allow_unused=True, materialize_grads=True)
        value = self.alpha * torch.stack([g.square().sum() for g in grads]).sum()
        again = torch.autograd.grad(value, self.params, retain_graph=True, allow_unused=True, materialize_grads=True)
        self._gradient = list(again)
        self._value = value.detach()
