"""A softmax that has collapsed gives no gradient, and what had not yet been understood never is: two cures.

On modular addition, a + b mod p, a network knows all training pairs by heart long before it gets others right. Without weight
decay it often never does. Prieto et al. (2025) found why: once the training pairs are right, the loss is lowered most easily by
making all logits larger (naive loss minimization), until sum_j exp(z_j - max z) is exactly 1 in the working precision. The loss of
such a pair is exactly 0 and its gradient with it (softmax collapse). Their two cures:

- StableMax: s(z) = z + 1 for z >= 0 and 1 / (1 - z) below takes the place of exp(z), in float64. It grows too slowly to swallow
  the other classes. As log s(z) takes the place of the logits, the cross-entropy and the monitor stay what they are.
- The orthogonal gradient: of each tensor's gradient the part along the weights is left out, which only makes them longer.

Three networks train from the same start with the same AdamW and no weight decay. The output probe of the monitor tells the share
of collapsed pairs, the share of losses that are exactly 0, and the cosine between the step and the weights.
Run this file from its folder:

    python grokking_collapse.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import torch
from draw import colour, linear_axis, panels
from torch import Tensor, nn
from torch.nn import functional as F

from towtank.optim import AdamW
from towtank.optim.transforms import orthograd
from towtank.signals import Monitor, Probe, Step, every
from towtank.signals.output import output

Pairs = tuple[Tensor, Tensor]
PLAIN, STABLEMAX, ORTHOGRAD = "plain", "StableMax", "orthogonal gradient"


@dataclass(frozen=True, kw_only=True)
class Run:
    """Series of one network against the step.

    Args:
        name: what was done against the collapse.
        step: at which the monitor looked.
        collapse: share of training pairs whose softmax is exactly one-hot.
        zero_losses: share of training pairs whose loss is exactly 0.
        alignment: cosine between minus the gradient and the weights.
        train, test: share of pairs that are right.
        alarm: step at which the monitor warned of a softmax collapse, None if it did not.
    """

    name: str
    step: tuple[float, ...]
    collapse: tuple[float, ...]
    zero_losses: tuple[float, ...]
    alignment: tuple[float, ...]
    train: tuple[float, ...]
    test: tuple[float, ...]
    alarm: int | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """The runs by name, and what they show in a sentence."""

    runs: dict[str, Run]
    sentence: str


def addition(p: int, share: float, seed: int) -> tuple[Pairs, Pairs]:
    """All pairs (a, b) one-hot with a + b mod p, split into those to learn from and the others."""
    a, b = torch.cartesian_prod(torch.arange(p), torch.arange(p)).T
    x, y = torch.cat((F.one_hot(a, p), F.one_hot(b, p)), dim=1).float(), (a + b) % p
    order = torch.randperm(p * p, generator=torch.Generator().manual_seed(seed))
    train, test = order[: int(share * p * p)], order[int(share * p * p) :]
    return (x[train], y[train]), (x[test], y[test])


class Precision(nn.Module):
    """Logits in the precision in which the loss is computed."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, logits: Tensor) -> Tensor:
        return logits.to(self.dtype)


class StableMax(nn.Module):
    """log s(z) in float64: a softmax of it is s(z) / sum s(z)."""

    def forward(self, logits: Tensor) -> Tensor:
        z = logits.double()
        return torch.where(z >= 0, z.clamp(min=0).log1p(), -(-z.clamp(max=0)).log1p())


def network(p: int, width: int, last: nn.Module, seed: int) -> nn.Module:
    """One hidden layer with ReLU and no biases, drawn from a generator of its own, and what comes before the loss."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2 * p, width, bias=False), nn.ReLU(), nn.Linear(width, p, bias=False), last)


def accuracy(**sets: Pairs) -> Probe:
    """A probe of one's own: the share of pairs of each set that are right."""

    def probe(step: Step) -> dict[str, Tensor]:
        return {f"right/{name}": (step.model(x).argmax(dim=1) == y).float().mean() for name, (x, y) in sets.items()}

    return probe


def train(
    name: str,
    *,
    out: Path | None,
    p: int,
    share: float,
    width: int,
    lr: float,
    steps: int,
    cadence: int,
    dtype: torch.dtype,
    seed: int,
) -> Run:
    """Learn from the whole training set at every step."""
    batch, held_out = addition(p, share, seed)
    model = network(p, width, StableMax() if name == STABLEMAX else Precision(dtype), seed)
    transforms = [orthograd] if name == ORTHOGRAD else []
    optimizer = AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), eps=1e-30, weight_decay=0.0, transforms=transforms)
    probes = [every(cadence, output()), every(cadence, accuracy(train=batch, test=held_out))]
    with Monitor(model, optimizer, loss=F.cross_entropy, probes=probes, out=out and out / name) as monitor:
        for _ in range(steps):
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            monitor.step(loss, batch)
            optimizer.zero_grad()
    keys = {
        "collapse": "output/collapse",
        "zero_losses": "output/zero_losses",
        "alignment": "output/gradient_alignment",
        "train": "right/train",
        "test": "right/test",
    }
    series = {field: tuple(monitor.history[key][1]) for field, key in keys.items()}
    alarms = [a.step for a in monitor.alarms if a.name == "softmax collapse"]
    return Run(name=name, step=tuple(monitor.history["right/test"][0]), alarm=min(alarms, default=None), **series)


def main(
    out: Path | None = None,
    *,
    p: int = 47,
    share: float = 0.8,
    width: int = 128,
    lr: float = 0.02,
    steps: int = 4000,
    cadence: int = 50,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Result:
    """Train with the plain softmax in a precision, with StableMax, and with the orthogonal gradient."""
    sizes = {"p": p, "share": share, "width": width, "lr": lr, "steps": steps, "cadence": cadence, "seed": seed}
    runs = {name: train(name, out=out, dtype=dtype, **sizes) for name in (PLAIN, STABLEMAX, ORTHOGRAD)}
    told = [
        f"{name}: {run.collapse[-1]:.0%} of the training pairs collapsed, {run.test[-1]:.0%} of the others right"
        + (f" (alarm at step {run.alarm})" if run.alarm else "")
        for name, run in runs.items()
    ]
    return Result(runs=runs, sentence="; ".join(told))


def figure(result: Result) -> go.Figure:
    """Collapse, alignment and accuracy against the step."""
    step = linear_axis("step")
    fig = panels(
        [
            ("Collapsed softmaxes", step, linear_axis("share of training pairs", range=(-0.03, 1.03))),
            ("Gradient along the weights", step, linear_axis("cosine of -gradient and weights")),
            ("Accuracy on other pairs", step, linear_axis("share", range=(-0.03, 1.03))),
        ]
    )
    for i, (name, run) in enumerate(result.runs.items()):
        for column, values in enumerate((run.collapse, run.alignment, run.test), 1):
            line = {"color": colour(i), "width": 1.8}
            fig.add_trace(
                go.Scatter(x=run.step, y=values, name=name, line=line, showlegend=column == 1), row=1, col=column
            )
    return fig


if __name__ == "__main__":
    print(main(Path("runs/grokking_collapse")).sentence)
