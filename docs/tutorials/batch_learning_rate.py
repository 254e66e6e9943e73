"""Learning rate against batch size, and the curvature of small batches behind it.

A batch of b examples has a Hessian of its own, that of all data plus noise. So its largest curvature lambda(b) is larger, and the
learning rate that a run can take, which is at most about 2 / lambda(b), is smaller. Granziol et al. (2022) derive how much: where the
largest eigenvalue stands out of the noise it is inflated by a term in 1 / b, and the rate may grow in proportion to the batch; where
it is the edge of the noise itself, by 1 / sqrt(b). Both end where the batch's own curvature is that of all data.

Here a small network learns digits images for 60 steps of plain SGD at eight batch sizes, on a grid of learning rates. Two rates are
read off for each batch size and seed: the best, and the largest that keeps half of its gain. `BatchRateLaw` is fitted to either, and
`regime` says which exponent the data leave. The same law is fitted to the largest curvature of batches, at three moments of a
training; each fit is repeated on thirds of the batches, to see whether they would have said the same. Run this file from its folder:

    python batch_learning_rate.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from draw import colour, panels
from noise_scale import images, judge, network, train_many
from torch.nn import functional as F

from towtank.laws.batch import BatchRateLaw, Regime, regime
from towtank.laws.formula_fit import FormulaFit
from towtank.problem import Problem
from towtank.signals.batch_curvature import Inflation, batch_curvature, drawn, inflation

GUESS = math.log(10)  # the loss of one who gives every digit a tenth


@dataclass(frozen=True, kw_only=True)
class Rates:
    """One kind of learning rate: batch size and rate of every row, the law, and its regime."""

    batch: tuple[int, ...]
    lr: tuple[float, ...]
    fit: FormulaFit
    regime: Regime


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """How the largest curvature depends on the batch after some steps of training, with the loss there; from all, and thirds."""

    steps: int
    loss: float
    inflation: Inflation
    thirds: tuple[Inflation, ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Best and largest useful rates by batch size, curvatures of batches, and what they show in a sentence."""

    best: Rates
    largest: Rates
    curvature: tuple[Curvature, ...]
    sentence: str


def losses(lrs: Sequence[float], seeds: Sequence[int], *, batch: int, width: int, steps: int) -> np.ndarray:
    """Loss (rates, seeds) after training, averaged over the last five steps; that of a guess where it is worse or not finite."""
    last = islice(train_many(lrs, seeds, batch=batch, width=width), steps - 5, steps)
    found = np.mean([judge(params, width) for params in last], axis=0).reshape(len(lrs), -1)
    return np.where(np.isfinite(found), np.minimum(found, GUESS), GUESS)


def best_rate(lrs: Sequence[float], loss: np.ndarray) -> float:
    """The rate of the lowest loss, by a parabola in log lr through the best of the grid and its neighbors."""
    j = int(np.clip(loss.argmin(), 1, len(lrs) - 2))
    x = np.log(lrs[j - 1 : j + 2])
    a, b, _ = np.polyfit(x, loss[j - 1 : j + 2], 2)
    return float(np.exp(np.clip(-b / (2 * a), x[0], x[-1]))) if a > 0 else lrs[j]


def largest_rate(lrs: Sequence[float], loss: np.ndarray) -> float:
    """Going up from the best rate, where half of the gain over guessing is lost, between two rates of the grid."""
    half, j = (loss.min() + GUESS) / 2, int(loss.argmin())
    above = next((i for i in range(j, len(lrs)) if loss[i] > half), None)
    if above is None:
        raise ValueError(f"expected rates that are too large, got {lrs[-1]:g} at most; give larger ones")
    share = (half - loss[above - 1]) / (loss[above] - loss[above - 1])
    return float(lrs[above - 1] * (lrs[above] / lrs[above - 1]) ** share)


def fitted(rows: Sequence[tuple[int, float]]) -> Rates:
    """The law of the learning rate fitted to rows of (batch size, rate)."""
    batch, lr = zip(*rows, strict=True)
    fit = BatchRateLaw().fit({"batch": batch, "lr": lr}, x="batch", y="lr")
    return Rates(batch=batch, lr=lr, fit=fit, regime=regime(fit))


def curvatures(
    moments: Sequence[int], sizes: Sequence[int], count: int, *, lr: float, width: int, seed: int
) -> tuple[Curvature, ...]:
    """Train with gradient descent, and measure the largest curvature of batches at some steps."""
    (x, y), model, found = images(), network(width, seed), []
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    batches = drawn((x, y), sizes, count, seed=seed)
    for step in range(max(moments) + 1):
        loss = F.cross_entropy(model(x), y)
        if step in moments:
            of = batch_curvature(lambda b: Problem(model, F.cross_entropy, b), batches, population=len(x), seed=seed)
            parts = [(of.batch[i::3], of.curvature[i::3]) for i in range(3)]  # rows are sorted by size
            thirds = tuple(inflation(b, c, population=len(x), seed=seed) for b, c in parts)
            found.append(Curvature(steps=step, loss=loss.item(), inflation=of, thirds=thirds))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return tuple(found)


def main(
    out: Path | None = None,
    *,
    batches: Sequence[int] = (2, 4, 8, 16, 32, 64, 128, 256),
    lrs: Sequence[float] = tuple(2 ** (k / 2) for k in range(-8, 7)),
    seeds: Sequence[int] = (0, 1, 2, 3, 4, 5),
    steps: int = 60,
    moments: Sequence[int] = (0, 30, 100),
    sizes: Sequence[int] = (4, 8, 16, 32, 64, 128, 256, 512),
    count: int = 18,
    width: int = 32,
) -> Result:
    """Find the rates of every batch size, fit how they grow, and measure the curvature of batches."""
    best, largest = [], []
    for batch in batches:
        for loss in losses(lrs, seeds, batch=batch, width=width, steps=steps).T:
            best.append((batch, best_rate(lrs, loss)))
            largest.append((batch, largest_rate(lrs, loss)))
    rates = fitted(best), fitted(largest)
    measured = curvatures(moments, sizes, count, lr=0.5, width=width, seed=seeds[0])
    said = [_rate("best rate", rates[0]), _rate("largest useful rate", rates[1])]
    said += [_inflation(c) for c in measured]
    return Result(best=rates[0], largest=rates[1], curvature=measured, sentence="; ".join(said))


def _rate(name: str, rates: Rates) -> str:
    found = rates.fit.coefficients
    p, top, half = found["p"], found["lr_max"], found["B"]
    return (
        f"{name}: exponent {p.value:.2f} ({p.low:.2f} to {p.high:.2f}), {rates.regime.exponent}; {top.value:.2g} for large "
        f"batches, half of that at batch {half.value:.2g} ({half.low:.2g} to {half.high:.2g})"
    )


def _inflation(curvature: Curvature) -> str:
    found, p = curvature.inflation, curvature.inflation.p
    text = f"curvature after {curvature.steps} steps (loss {curvature.loss:.2f}): "
    if p is None or found.limit is None or found.critical is None:
        return text + f"{found.exponent}, {found.verdict.reason}"
    return (
        f"{text}exponent {p.value:.2f} ({p.low:.2f} to {p.high:.2f}), {found.exponent}; {found.limit.value:.2g} for large batches, "
        f"twice that at batch {found.critical.value:.2g} ({found.critical.low:.2g} to {found.critical.high:.2g}); thirds of the "
        f"batches say {', '.join(t.exponent for t in curvature.thirds)}"
    )


def figure(result: Result) -> go.Figure:
    """Rates against batch size, and curvature against batch size, each with its law."""
    log = {"title": "batch size", "type": "log"}
    fig = panels(
        [
            ("Learning rate", log, {"title": "learning rate", "type": "log"}),
            ("Largest curvature of a batch", log, {"title": "largest eigenvalue", "type": "log"}),
        ]
    )
    for i, (name, rates) in enumerate((("best", result.best), ("largest useful", result.largest))):
        b = np.geomspace(min(rates.batch), max(rates.batch), 60)
        law = rates.fit.form.value(rates.fit.values, {"b": b})
        _points(fig, 1, rates.batch, rates.lr, i, f"{name} rate", b, law)
    for i, c in enumerate(result.curvature, 2):
        sizes = np.unique(c.inflation.batch)
        b = np.geomspace(sizes[0], sizes[-1], 60)
        _points(fig, 2, c.inflation.batch, c.inflation.curvature, i, f"after {c.steps} steps", b, _law(c.inflation, b))
    for column, shown in ((1, np.unique(result.best.batch)), (2, np.unique(result.curvature[0].inflation.batch))):
        fig.update_xaxes(tickvals=shown, row=1, col=column)
    fig.update_yaxes(tickvals=[0.1, 0.2, 0.5, 1, 2, 5], row=1, col=1)
    fig.update_yaxes(tickvals=[0.5, 1, 2, 5, 10, 20, 50], row=1, col=2)
    return fig


def _law(found: Inflation, b: np.ndarray) -> np.ndarray:
    """The fitted curvature at batch sizes, drawn without replacement from all images."""
    if found.p is None or found.limit is None or found.critical is None:
        return np.full_like(b, np.nan)
    of_many = b / (1 - b / len(images()[0]))
    return found.limit.value * (1 + (found.critical.value / of_many) ** found.p.value)


def _points(fig: go.Figure, column: int, x: Any, y: Any, i: int, name: str, at: np.ndarray, law: np.ndarray) -> None:
    mark = {"color": colour(i), "size": 5, "opacity": 0.6}
    fig.add_trace(go.Scatter(x=x, y=y, name=name, mode="markers", marker=mark, legendgroup=name), 1, column)
    line = {"color": colour(i), "width": 1.8}
    fig.add_trace(go.Scatter(x=at, y=law, mode="lines", line=line, legendgroup=name, showlegend=False), 1, column)


if __name__ == "__main__":
    print(main(Path("runs/batch_learning_rate")).sentence)
