"""Opposing signals: a few examples that pull in opposite directions carry most of the sharpness.

Rosenfeld and Risteski (2023) looked for what makes a network sharp. They found pairs of small groups of examples that share one
strong feature and pull it in opposite directions: pictures with much blue sky, for example, of planes and of other things. What lowers
the loss of one group raises that of the other. Training ends up in a narrow valley that balances the two, and the curvature across it
limits the learning rate of everybody.

Here such a pair is planted in digits images: 40 of 1000 images get a bright bar in the top row, half of them fours and half of them
nines. `opposing_signals` orders all examples by their slope along the sharpest direction, compares both ends, and tests that they are
more than chance. It is asked during training for a bar six times as bright as ink, for one three times as bright, and for the images
as they are; after the last step also in the paper's way, by how much the loss of each example has changed across it. Run this file
from its folder:

    python opposing_signals.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
import torch
from draw import colour, panels
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from towtank.problem import Problem
from towtank.signals.along import example_losses
from towtank.signals.opposing import OpposingSignals, opposing_signals
from towtank.signals.step import CannotTell
from towtank.train.digits import MLP

FIRST, SECOND = 4, 9  # digits of the two groups


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training: the bar's brightness, what was found now and then, and how much of the planted groups that is.

    Args:
        brightness: of the bar, in the ink's; 0 where nothing was planted.
        planted: places of the two groups.
        loss: of every step.
        step: at which signals were looked for; found: the answer.
        digits: the most frequent digit of both ends of the last answer.
        by_change: the last answer with examples ordered by the change of their loss across the step; None where it cannot tell.
        sharpness_without: largest curvature at the end without the examples of both groups, found or planted.
    """

    brightness: float
    planted: tuple[frozenset[int], frozenset[int]]
    loss: tuple[float, ...]
    step: tuple[int, ...]
    found: tuple[OpposingSignals, ...]
    digits: tuple[int, int]
    by_change: OpposingSignals | None
    sharpness_without: float

    def recovered(self, signals: OpposingSignals) -> int:
        """How many planted examples an answer names, on opposite sides as they were planted."""
        (a, b), up, down = self.planted, set(signals.up), set(signals.down)
        return max(len(a & up) + len(b & down), len(a & down) + len(b & up))


@dataclass(frozen=True, kw_only=True)
class Result:
    """A run for each brightness, and what they show in a sentence."""

    runs: tuple[Run, ...]
    sentence: str


def planted_digits(images: int, count: int, brightness: float, seed: int) -> tuple[Tensor, Tensor, list[int]]:
    """Images, digits, and the places of `count` images with a bar in the top row: the first half of them fours, the rest nines."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels[:images] / 16, dtype=torch.float32), torch.tensor(labels[:images])
    if not brightness:
        return x, y, []
    at = torch.randperm(images, generator=torch.Generator().manual_seed(seed))[:count]
    x[at, :8] = brightness
    y[at[: count // 2]], y[at[count // 2 :]] = FIRST, SECOND
    return x, y, at.tolist()


def train(
    brightness: float, *, images: int, count: int, width: int, lr: float, steps: int, cadence: int, seed: int
) -> Run:
    """Gradient descent on all images, and the search for opposing signals every few steps."""
    x, y, at = planted_digits(images, count, brightness, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MLP(width, 1)
    optimizer, problem, k = (
        torch.optim.SGD(model.parameters(), lr=lr),
        Problem(model, F.cross_entropy, (x, y)),
        count // 2,
    )
    losses, asked, found, before = [], [], [], torch.empty(0)
    for step in range(1, steps + 1):
        if step == steps:
            before = example_losses(problem)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % cadence == 0:
            asked.append(step)
            found.append(opposing_signals(problem, k=k))
    up, down = (int(y[list(group)].mode().values) for group in (found[-1].up, found[-1].down))
    both = set(at or found[-1].up + found[-1].down)
    rest = [i for i in range(images) if i not in both]
    return Run(
        brightness=brightness,
        planted=(frozenset(at[:k]), frozenset(at[k:])),
        loss=tuple(losses),
        step=tuple(asked),
        found=tuple(found),
        digits=(up, down),
        by_change=across(problem, before, k=k),
        sharpness_without=opposing_signals(problem.replace(data=(x[rest], y[rest])), k=k).sharpness,
    )


def across(problem: Problem, before: Tensor, *, k: int) -> OpposingSignals | None:
    """The groups by the change of their loss across the last step."""
    try:
        return opposing_signals(problem, change=example_losses(problem) - before, k=k)
    except CannotTell:  # fewer than k examples rise: the step was a small one
        return None


def main(
    out: Path | None = None,
    *,
    brightness: Sequence[float] = (6.0, 3.0, 0.0),
    images: int = 1000,
    count: int = 40,
    width: int = 32,
    lr: float = 0.4,
    steps: int = 200,
    cadence: int = 20,
    seed: int = 1,
) -> Result:
    """Train on bars of every brightness, 0 being none, and say what is found at the end."""
    sizes = {"images": images, "count": count, "width": width, "lr": lr, "steps": steps, "cadence": cadence}
    runs = tuple(train(b, seed=seed, **sizes) for b in brightness)
    return Result(runs=runs, sentence="; ".join(_said(run) for run in runs))


def _said(run: Run) -> str:
    last, planted = run.found[-1], len(run.planted[0] | run.planted[1])
    name = f"bar of brightness {run.brightness:g}" if planted else "plain digits"
    held = f", {run.recovered(last)} of {planted} planted" if planted else ""
    text = (
        f"{name}: {last}{held}, digits {run.digits[0]} against {run.digits[1]}, found at {sum(f.found for f in run.found)} of "
        f"{len(run.found)} looks; sharpness {last.sharpness:.2f}, without these examples {run.sharpness_without:.2f}"
    )
    if run.by_change is None:
        return text + "; by the change across a step: cannot tell"
    held = f", {run.recovered(run.by_change)} of {planted} planted" if planted else ""
    return f"{text}; by the change across a step: {run.by_change}{held}"


def figure(result: Result) -> go.Figure:
    """Share of the sharpness, cosine of the two groups, and sharpness, against the step; open where not significant."""
    fig = panels(
        [
            (
                "Share of the sharpness",
                {"title": "step"},
                {"title": "share of 4 % of the examples", "tickformat": ".0%"},
            ),
            ("Cosine of the two gradients", {"title": "step"}, {"title": "cosine", "range": [-1.05, 0.05]}),
            ("Sharpness", {"title": "step"}, {"title": "largest eigenvalue", "rangemode": "tozero"}),
        ]
    )
    for i, run in enumerate(result.runs):
        name = f"bar, {run.brightness:g} times the ink" if run.brightness else "plain digits"
        symbols = ["circle" if f.found else "circle-open" for f in run.found]
        marks = {"color": colour(i), "size": 7, "symbol": symbols}
        columns = ([f.share for f in run.found], [f.cosine for f in run.found], [f.sharpness for f in run.found])
        for column, y in enumerate(columns, 1):
            line = {"name": name, "legendgroup": name, "line": {"color": colour(i), "width": 1.8}, "mode": "lines"}
            fig.add_trace(go.Scatter(x=run.step, y=y, showlegend=column == 1, **line), 1, column)
            fig.add_trace(go.Scatter(x=run.step, y=y, showlegend=False, mode="markers", marker=marks), 1, column)
    return fig


if __name__ == "__main__":
    print(main(Path("runs/opposing_signals")).sentence)
