"""Activations: their size, their outliers, and units that no longer answer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from towtank.signals.step import CannotTell, Readings, Step

_ROOT = "model"  # in keys, where the model is itself the layer


class _Activations:
    name = "activations"
    needs = frozenset({"seen"})

    def __call__(self, step: Step) -> Readings:
        seen = step.seen
        found = {}
        for name, m in seen.activations.items():
            key = name or _ROOT
            found |= {f"activation/rms/{key}": m.rms, f"activation/max/{key}": m.max}
            found |= {f"activation/kurtosis/{key}": m.kurtosis}
        dead = {place or _ROOT: share for place, share in seen.dead.items()}
        found |= {f"activation/dead/{place}": share for place, share in dead.items()}
        if dead:
            home = next(iter(dead.values())).device
            found["activation/dead_max"] = torch.stack([share.to(home) for share in dead.values()]).amax()
        if not found:
            raise CannotTell("; ".join(seen.unseen) or "no activation was seen; the modules return no real tensors")
        return found


def activations() -> Callable[[Step], Readings]:
    """A probe of activations: RMS, largest magnitude, kurtosis, and the share of dead units.

    RMS = sqrt(E x^2) and kurtosis = E (x - E x)^4 / (E (x - E x)^2)^2 (3 for a Gaussian) over all entries of the outputs of a
    module in the step. A unit (entry of the last axis; channel of a convolution) is dead where it is exactly 0 for every example
    and position of the step; only of activation functions that can be 0, such as ReLU, wherever they are called.

    Readings: `activation/rms|max|kurtosis/{module}` of modules without children; `activation/dead/{place}`, where further uses
    of one function in a module are numbered; `activation/dead_max`.

    Raises:
        CannotTell: by the probe, if nothing was seen.

    Example:
        >>> from torch import nn
        >>> from towtank.signals.capture import capture
        >>> model = nn.ReLU()
        >>> with capture(model) as seen:
        ...     _ = model(torch.tensor([[1.0, -1.0], [7.0, -1.0]]))
        >>> step = Step(number=1, loss=torch.tensor(0.0), model=model, recorded={"seen": seen})
        >>> {key: round(float(value), 3) for key, value in activations()(step).items() if "dead" in key or "max" in key}
        {'activation/max/model': 7.0, 'activation/dead/relu': 0.5, 'activation/dead_max': 0.5}
    """
    return _Activations()
