"""Gradient descent sharpens a network until its learning rate is at the limit, and then stays there.

On a quadratic bowl of curvature S, gradient descent of learning rate lr diverges where S > 2 / lr. One would expect a careful
user to choose lr so that training stays far below. Cohen et al. (2021) saw something else: full-batch gradient descent first
raises the sharpness S, the largest eigenvalue of the Hessian, whatever the learning rate (progressive sharpening), until S
reaches 2 / lr. Then it hovers there, the loss no longer falls at every step, and still falls in the long run.

Here a small tanh network learns the digits images with squared error, at three learning rates. The monitor measures the
sharpness as it goes; `sharpness_trend` puts a name to each series. Run this file from its folder:

    python edge_of_stability.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import torch
from draw import colour, linear_axis, log_axis, panels, rule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from towtank.signals import Monitor, every
from towtank.signals.stability import sharpness
from towtank.signals.trend import Trend, sharpness_trend


@dataclass(frozen=True, kw_only=True)
class Descent:
    """One run: its learning rate, the loss of every step, the sharpness now and then, and what that is called."""

    lr: float
    loss: tuple[float, ...]
    step: tuple[float, ...]
    sharpness: tuple[float, ...]
    trend: Trend

    @property
    def ratio(self) -> tuple[float, ...]:
        """Sharpness over its limit 2 / lr."""
        return tuple(self.lr * s / 2 for s in self.sharpness)


@dataclass(frozen=True, kw_only=True)
class Result:
    """A run for each learning rate, and what they show in a sentence."""

    runs: tuple[Descent, ...]
    sentence: str


def digits(images: int) -> tuple[Tensor, Tensor]:
    """The first images, centered, and their digits one-hot."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels[:images] / 16, dtype=torch.float32)
    return x - x.mean(), F.one_hot(torch.tensor(labels[:images]), 10).float()


def network(width: int, seed: int) -> nn.Module:
    """Two hidden layers with tanh, drawn from a generator of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


def loss_of(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error of an example, averaged over examples."""
    return 0.5 * (outputs - targets).square().sum(dim=1).mean()


def descend(lr: float, *, out: Path | None, steps: int, images: int, width: int, seed: int, cadence: int) -> Descent:
    """Train with plain gradient descent on all images, and watch the sharpness."""
    batch, model = digits(images), network(width, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    probe = every(cadence, sharpness(tol=0.02))
    with Monitor(model, optimizer, loss=loss_of, probes=[probe], out=out and out / f"lr{lr:g}") as monitor:
        for _ in range(steps):
            loss = loss_of(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            monitor.step(loss, batch)
            optimizer.zero_grad()
    step, measured = monitor.history["curvature/sharpness"]
    return Descent(
        lr=lr,
        loss=tuple(monitor.history["train/loss"][1]),
        step=tuple(step),
        sharpness=tuple(measured),
        trend=sharpness_trend(step, measured, lr=lr),
    )


def main(
    out: Path | None = None,
    *,
    lrs: tuple[float, ...] = (0.1, 0.15, 0.2),
    steps: int = 3000,
    images: int = 500,
    width: int = 64,
    seed: int = 0,
    cadence: int = 25,
) -> Result:
    """Train at each learning rate, and compare where the sharpness ends with 2 / lr."""
    sizes = {"steps": steps, "images": images, "width": width, "seed": seed, "cadence": cadence}
    runs = tuple(descend(lr, out=out, **sizes) for lr in lrs)
    told = [
        f"lr {r.lr:g}: sharpness {r.sharpness[0]:.1f} at the start, {2 / r.lr * r.trend.ratio:.1f} at the end, "
        f"{r.trend.ratio:.2f} of 2 / lr = {2 / r.lr:g} ({r.trend.kind})"
        for r in runs
    ]
    return Result(runs=runs, sentence="; ".join(told))


def figure(result: Result) -> go.Figure:
    """Sharpness with its limits, and the loss, against the step."""
    fig = panels(
        [
            ("Sharpness; dashed: 2 / lr", linear_axis("step"), linear_axis("largest eigenvalue of the Hessian")),
            ("Loss", linear_axis("step"), log_axis("squared error", [v for run in result.runs for v in run.loss])),
        ]
    )
    for i, run in enumerate(result.runs):
        ink, name = colour(i), f"lr = {run.lr:g}"
        fig.add_trace(go.Scatter(x=run.step, y=run.sharpness, name=name, line={"color": ink, "width": 1.8}), 1, 1)
        fig.add_shape(rule(ink, y=2 / run.lr), row=1, col=1)
        every_step = tuple(range(1, len(run.loss) + 1))
        fig.add_trace(go.Scatter(x=every_step, y=run.loss, showlegend=False, line={"color": ink, "width": 1.2}), 1, 2)
    return fig


if __name__ == "__main__":
    print(main(Path("runs/edge_of_stability")).sentence)
