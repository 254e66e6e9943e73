"""What output logits tell: log Z, the largest logit, and how many softmaxes have collapsed in the precision at hand.

Shapes: R rows, one for every softmax; V classes; K rows that are kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from towtank.signals.moments import aside

_ROWS, _ENTRIES = 4096, 1 << 22  # of the logits that are kept: 16 MiB in float32
_CHUNK = {"cpu": 1 << 18}  # logits at a time
_CHUNK_ELSEWHERE = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class Output:
    """Statistics of output logits z (R, V).

    The softmax of a row has collapsed where sum_j exp(z_j - max z) is exactly 1 in the working precision: the loss of its
    largest class is then exactly 0, and so is its gradient. Two classes collapse at gaps of 24 log 2 = 16.64 in float32,
    11 log 2 = 7.62 in float16 and 8 log 2 = 5.55 in bfloat16.

    Args:
        log_z_R: log sum_j exp z_j.
        top_R: largest logit.
        winner_R: the class of a collapsed row, -1 where it has not collapsed.
        rows_KV: at most 4,096 evenly spaced rows of the logits, fewer where there are many classes.
        indices_K: which rows those are.
        targets_R: classes, or None where no loss was seen; negative ones do not count.
        dtype: the working precision: that of the logits, float32 for halves under autocast, which widens the loss.

    Example:
        >>> z = torch.tensor([[17.0, 0.0], [16.0, 0.0], [0.0, 17.0]])
        >>> out = Output.of(z)
        >>> [round(float(v), 4) for v in (out.log_z_mean, out.log_z_min, out.max_logit, out.collapse)]
        [16.6667, 16.0, 17.0, 0.6667]
        >>> round(float(out.zero_losses(torch.tensor([0, 0, 0]))), 4)
        0.3333

    Source: Prieto et al. 2025, section 3; log Z: Wortsman et al. 2023, section 3.1.2.
    """

    log_z_R: Tensor
    top_R: Tensor
    winner_R: Tensor
    rows_KV: Tensor
    indices_K: Tensor
    targets_R: Tensor | None = None
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, logits: Tensor, *, dim: int = -1, dtype: torch.dtype | None = None) -> Output:
        """Of logits with their classes along `dim`, and the loss computed in `dtype` (theirs by default).

        Raises:
            ValueError: if they are not real numbers of at least one row and two classes.
        """
        if logits.ndim < 1 or not logits.is_floating_point() or logits.shape[dim] < 2 or not logits.numel():
            got = f"{logits.dtype} of shape {tuple(logits.shape)}"
            raise ValueError(f"expected logits (..., classes) with at least two classes, got {got}; leave them out")
        with aside():
            z = logits.detach().movedim(dim, -1)
            z_RV = z.reshape(-1, z.shape[-1])
            step = max(1, _CHUNK.get(z.device.type, _CHUNK_ELSEWHERE) // z_RV.shape[1])
            parts = [_reduced(chunk, dtype or z.dtype) for chunk in z_RV.split(step)]
            log_z, top, winner = (torch.cat(column) for column in zip(*parts))
            indices = _spread(len(z_RV), z_RV.shape[1], z.device)
            return cls(
                log_z_R=log_z,
                top_R=top,
                winner_R=winner,
                rows_KV=z_RV[indices],
                indices_K=indices,
                dtype=dtype or z.dtype,
            )

    def with_targets(self, targets_R: Tensor) -> Output:
        """The same with the classes that a loss asked for."""
        return replace(self, targets_R=targets_R.detach())

    @classmethod
    def pooled(cls, parts: Iterable[Output]) -> Output:
        """The rows of all of them, in order; those kept are of the same number of classes as the first."""
        every = list(parts)
        if len(every) == 1:
            return every[0]
        starts = [sum(len(o.top_R) for o in every[:i]) for i in range(len(every))]
        alike = [(o, s) for o, s in zip(every, starts) if o.rows_KV.shape[1] == every[0].rows_KV.shape[1]]
        thin = slice(None, None, len(alike))  # so that the rows kept stay as few
        known = [o.targets_R for o in every if o.targets_R is not None]
        return cls(
            log_z_R=torch.cat([o.log_z_R for o in every]),
            top_R=torch.cat([o.top_R for o in every]),
            winner_R=torch.cat([o.winner_R for o in every]),
            rows_KV=torch.cat([o.rows_KV[thin] for o, _ in alike]),
            indices_K=torch.cat([o.indices_K[thin] + s for o, s in alike]),
            targets_R=torch.cat(known) if len(known) == len(every) else None,
            dtype=every[0].dtype,
        )

    @property
    def log_z_mean(self) -> Tensor:
        """Mean over rows of log Z."""
        return self._mean(self.log_z_R)

    @property
    def log_z_min(self) -> Tensor:
        """The least log Z."""
        return self.log_z_R.masked_fill(~self._counted, torch.inf).amin()

    @property
    def max_logit(self) -> Tensor:
        """The largest logit."""
        return self.top_R.masked_fill(~self._counted, -torch.inf).amax()

    @property
    def collapse(self) -> Tensor:
        """Share of rows whose softmax has collapsed."""
        return self._mean((self.winner_R >= 0).to(torch.float32))

    def zero_losses(self, targets_R: Tensor | None = None) -> Tensor:
        """Share of rows whose cross-entropy is exactly 0 in the working precision: collapsed, onto their target.

        Args:
            targets_R: classes; negative ones do not count. By default those that the loss was called with.

        Raises:
            ValueError: if there are none, or not as many as rows.
        """
        targets = self.targets_R if targets_R is None else targets_R.reshape(-1)
        if targets is None or len(targets) != len(self.winner_R):
            got = "none" if targets is None else str(len(targets))
            raise ValueError(
                f"expected {len(self.winner_R)} targets, one a row, got {got}; give those of the same batch"
            )
        valid = targets >= 0
        return ((self.winner_R == targets) & valid).sum() / valid.sum()

    @property
    def _counted(self) -> Tensor:
        """Rows that the loss does not ignore; all of them where it ignores all."""
        if self.targets_R is None:
            return torch.ones_like(self.winner_R, dtype=torch.bool)
        return (self.targets_R >= 0) | ~(self.targets_R >= 0).any()

    def _mean(self, values_R: Tensor) -> Tensor:
        return values_R.masked_fill(~self._counted, 0).sum() / self._counted.sum()


def working_dtype(logits: Tensor) -> torch.dtype:
    """The precision of a cross-entropy of these logits here and now: autocast widens halves to float32."""
    half = logits.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and torch.is_autocast_enabled(logits.device.type) else logits.dtype


def _reduced(z_RV: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    top_R1, best_R1 = z_RV.max(dim=-1, keepdim=True)
    wide = torch.float64 if z_RV.dtype == torch.float64 else torch.float32
    total = (z_RV.to(wide) - top_R1).exp_().sum(dim=-1)
    narrow = total if dtype == wide else (z_RV.to(dtype) - top_R1.to(dtype)).exp_().sum(dim=-1)
    winner = best_R1[:, 0].masked_fill(narrow != 1, -1).to(torch.int32)
    return top_R1[:, 0].to(wide) + total.log(), top_R1[:, 0].to(wide), winner


def _spread(rows: int, classes: int, device: torch.device) -> Tensor:
    """Evenly spaced rows, from the first on."""
    wanted = max(1, min(_ROWS, _ENTRIES // classes))
    return torch.arange(0, rows, -(-rows // wanted), device=device)
