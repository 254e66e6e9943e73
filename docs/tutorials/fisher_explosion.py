"""At a learning rate too small, the trace of the Fisher matrix explodes early, and the network generalizes worse.

The trace of the Fisher matrix is the mean square of the gradient of log p(y | x) of single images, over labels drawn from the
model's own predictions. Jastrzebski et al. (2021) saw that it rises steeply in the first part of training and then falls, that a
learning rate 10 to 30 times below the best one lets it rise several times higher (catastrophic Fisher explosion), and that the
higher peak goes with a larger test error.

Here a small convolutional network learns 200 digits images by stochastic gradient descent at a small and a good learning rate,
from the same starts and with the same batches. The monitor measures the trace at log-spaced steps on images of the training set,
and `early_peak` looks for the explosion in the series. Run this file from its folder:

    python fisher_explosion.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import plotly.graph_objects as go
import torch
from draw import colour, linear_axis, log_axis, panels
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from towtank.signals import Monitor, log_spaced
from towtank.signals.sgd_stability import fisher_trace
from towtank.signals.trend import EarlyPeak, early_peak

Images = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Args:
        lr, seed: of the run.
        step, trace: steps of the readings and the trace of the Fisher matrix, squared nats per unit of the weights.
        loss: of the batch, at every step.
        peak: what `early_peak` says of the trace.
        train_error, test_error: share of images that are wrong at the end.
    """

    lr: float
    seed: int
    step: tuple[float, ...]
    trace: tuple[float, ...]
    loss: tuple[float, ...]
    peak: EarlyPeak
    train_error: float
    test_error: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """All runs, the small learning rate first, and what they show in a sentence."""

    runs: tuple[Run, ...]
    sentence: str

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates, ascending."""
        return tuple(sorted({run.lr for run in self.runs}))

    def at(self, lr: float) -> list[Run]:
        """The runs at a learning rate, by seed."""
        return [run for run in self.runs if run.lr == lr]


def digits(images: int, seed: int) -> tuple[Images, Images]:
    """A random set of training images, and half of all images to test."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    x, test = x - x.mean(), torch.arange(len(x)) % 2 == 0
    chosen = torch.randperm(int((~test).sum()), generator=torch.Generator().manual_seed(seed))[:images]
    return (x[~test][chosen], y[~test][chosen]), (x[test], y[test])


def network(channels: int, seed: int) -> nn.Module:
    """Two convolutions, pooling and two linear layers, drawn from a generator of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * channels, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


def error(model: nn.Module, images: Images) -> float:
    """Share of images that are classified wrong."""
    with torch.no_grad():
        return float((model(images[0]).argmax(dim=1) != images[1]).float().mean())


def train(
    lr: float,
    seed: int,
    *,
    out: Path | None,
    steps: int,
    images: int,
    channels: int,
    size: int,
    watched: int,
    per_decade: int,
) -> Run:
    """Train by plain stochastic gradient descent on batches of a size, and watch the Fisher trace on some of the images."""
    (x, y), test = digits(images, seed)
    model = network(channels, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    about = {"probe_batch": (x[:watched], y[:watched]), "out": out and out / f"lr{lr:g}-{seed}"}
    probe = log_spaced(fisher_trace(), per_decade=per_decade)
    with Monitor(model, optimizer, loss=F.cross_entropy, probes=[probe], rules=(), **about) as monitor:
        for _ in range(steps):
            chosen = torch.randint(len(y), (size,), generator=generator)
            batch = x[chosen], y[chosen]
            loss = F.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            monitor.step(loss, batch)
            optimizer.zero_grad()
    step, trace = monitor.history["curvature/fisher_trace"]
    return Run(
        lr=lr,
        seed=seed,
        step=tuple(step),
        trace=tuple(trace),
        loss=tuple(monitor.history["train/loss"][1]),
        peak=early_peak(step, trace, monitor.history["curvature/fisher_trace_error"][1]),
        train_error=error(model, (x, y)),
        test_error=error(model, test),
    )


def main(
    out: Path | None = None,
    *,
    small: float = 0.02,
    good: float = 0.3,
    seeds: Sequence[int] = (0, 1, 2, 3),
    steps: int = 3000,
    images: int = 200,
    channels: int = 8,
    size: int = 20,
    watched: int = 100,
    per_decade: int = 20,
) -> Result:
    """Train at a small and a good learning rate from several starts, and compare the peaks and the errors."""
    sizes = {"steps": steps, "images": images, "channels": channels, "size": size}
    sizes |= {"watched": watched, "per_decade": per_decade}
    runs = tuple(train(lr, seed, out=out, **sizes) for lr in (small, good) for seed in seeds)
    return Result(runs=runs, sentence=sentence(Result(runs=runs, sentence="")))


def sentence(result: Result) -> str:
    """Peaks, errors and their difference, with its standard error over seeds."""
    told = []
    for lr in result.rates:
        runs = result.at(lr)
        peaks = ", ".join(f"{run.peak.value:.0f} at step {run.peak.step:g} ({run.peak.kind})" for run in runs)
        errors = ", ".join(f"{run.test_error:.1%}" for run in runs)
        told.append(f"lr {lr:g}: peak {peaks}; test error {errors}")
    pairs = list(zip(*(result.at(lr) for lr in result.rates), strict=True))
    gaps = [small.test_error - good.test_error for small, good in pairs]
    spread = f" +- {stdev(gaps) / math.sqrt(len(gaps)):.1%} (standard error)" if len(gaps) > 1 else ""
    ratios = fmean(small.peak.value / good.peak.value for small, good in pairs)
    return f"{'; '.join(told)}; peaks differ {ratios:.1f} times, test errors by {fmean(gaps):+.1%}{spread}"


def figure(result: Result) -> go.Figure:
    """The trace against the step, and each run's test error against its peak."""
    top = max(v for run in result.runs for v in run.trace)
    peaks = [run.peak.value for run in result.runs]
    step = log_axis("step", [s for run in result.runs for s in run.step])
    fig = panels(
        [
            ("Trace of the Fisher matrix", step, linear_axis("squared gradient of one image", range=(0, 1.05 * top))),
            (
                "Test error against the peak",
                log_axis("peak of the trace", peaks),
                linear_axis("test error", tickformat=".0%"),
            ),
        ]
    )
    for i, lr in enumerate(result.rates):
        for first, run in enumerate(result.at(lr)):
            line = {"color": colour(i), "width": 1.8}
            trace = go.Scatter(
                x=run.step, y=run.trace, name=f"lr = {lr:g}", line=line, legendgroup=i, showlegend=first == 0
            )
            fig.add_trace(trace, row=1, col=1)
        runs = result.at(lr)
        dots = go.Scatter(
            x=[run.peak.value for run in runs],
            y=[run.test_error for run in runs],
            mode="markers",
            marker={"color": colour(i), "size": 10},
            showlegend=False,
        )
        fig.add_trace(dots, row=1, col=2)
    return fig


if __name__ == "__main__":
    print(main(Path("runs/fisher_explosion")).sentence)
