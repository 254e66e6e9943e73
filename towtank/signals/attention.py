"""Attention logits: the first thing to watch in a transformer at a high learning rate."""

from __future__ import annotations

from collections.abc import Callable

import torch

from towtank.signals.step import CannotTell, Readings, Step

_ROOT = "model"  # in keys, where the model attends itself


class _Attention:
    name = "attention"
    needs = frozenset({"seen"})

    def __call__(self, step: Step) -> Readings:
        seen = step.seen
        attended = {name or _ROOT: a for name, a in seen.attention.items()}
        if not attended and seen.unseen:
            raise CannotTell("; ".join(seen.unseen))
        if not attended:  # the model has none
            return {}
        home = next(iter(attended.values())).max_logit.device
        found = {"attention/max_logit": torch.stack([a.max_logit.to(home) for a in attended.values()]).amax()}
        for name, a in attended.items():
            found |= {f"attention/max_logit/{name}": a.max_logit, f"attention/entropy/{name}": a.entropy}
            found |= {f"attention/q_norm/{name}": a.q_norm, f"attention/k_norm/{name}": a.k_norm}
        return found


def attention() -> Callable[[Step], Readings]:
    """A probe of attention: largest logit, entropy, norms of queries and keys.

    The logit z_ij = q_i . k_j / sqrt(D) grows quadratically with the size of activations, through the norms of q and k; runs in
    which it passed 1e4 diverged. The entropy -sum_j p_ij log p_ij (mean over queries, nats) falls to 0 when attention
    collapses onto single keys.

    Readings: `attention/max_logit` over all modules; `attention/max_logit|entropy|q_norm|k_norm/{module}`.

    Raises:
        CannotTell: by the probe, if attention could not be seen.

    Example:
        >>> from torch import nn
        >>> from towtank.signals.capture import capture
        >>> class Model(nn.Module):
        ...     def forward(self, x):
        ...         return nn.functional.scaled_dot_product_attention(x, x, x)
        >>> model = Model()
        >>> with capture(model) as seen:
        ...     _ = model(torch.full((1, 1, 5, 4), 3.0))
        >>> step = Step(number=1, loss=torch.tensor(0.0), model=model, recorded={"seen": seen})
        >>> found = attention()(step)  # 4 * 3^2 / sqrt(4); log 5; 3 sqrt(4)
        >>> [round(float(found[f"attention/{key}/model"]), 3) for key in ("max_logit", "entropy", "q_norm")]
        [18.0, 1.609, 6.0]

    Source: Wortsman et al. 2023, sections 3.1.1 and 3.3; entropy: Zhai et al. 2023.
    """
    return _Attention()
