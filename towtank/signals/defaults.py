"""What a monitor watches when nobody says: cheap probes at a common cadence, dear ones within the budget."""

from __future__ import annotations

import torch

from towtank.signals.rules import RULES, Rule
from towtank.signals.step import Probe


def default_probes(optimizer: torch.optim.Optimizer | None) -> list[Probe]:
    """Tensors, clipping, activations, attention and outputs; epsilon of Adam; the stability limit; gradient noise.

    Args:
        optimizer: whose kind decides what applies.
    """
    from towtank.signals.activations import activations
    from towtank.signals.attention import attention
    from towtank.signals.noise import ExampleNoise, PartNoise
    from towtank.signals.output import output
    from towtank.signals.stability import StabilityLimit
    from towtank.signals.tensors import clipping, epsilon, tensors

    found: list[Probe] = [tensors(), activations(), attention(), output()]
    if optimizer is not None:
        averages = any("betas" in group for group in optimizer.param_groups)
        # averages of a single step say nothing yet
        found += [clipping(), StabilityLimit(first=2 if averages and not optimizer.state else 1)]
        if averages and any("eps" in group for group in optimizer.param_groups):
            found.append(epsilon())
    return [*found, PartNoise(quiet=True), ExampleNoise(spare=True)]


def default_rules() -> tuple[Rule, ...]:
    """Every rule of `towtank.signals.rules`, and the detector of loss spikes."""
    from towtank.signals.spike_rule import LossSpike

    return (LossSpike(), *RULES)
