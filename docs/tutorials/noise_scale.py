"""The gradient noise scale, measured in one run, against what larger batches gain when they are tried.

A step on b examples gets 1 / (1 + B / b) of the way that the full gradient gets, with B the noise scale of the moment (McCandlish et
al. 2018, equation 2.7). If that were all, a run that takes S_min steps on huge batches would take

    S = sum over them of (1 + B / b) = S_min + E_min / b,   with E_min / S_min the mean of B over these steps.

So small batches scale perfectly, batches beyond B_crit = E_min / S_min gain little, and B_crit can be had from a single run by a probe,
with B_simple = tr(Sigma) / |G|^2 for B, which is exact where the Hessian is a multiple of the identity.

Here a small network learns digits images to a training loss of 0.2 at eight batch sizes. Each has its learning rate tuned on a grid;
the grid and the seeds are trained as one batched program. `CriticalBatchLaw` gives B_crit from the steps. Then one run of batch 128
is repeated in a plain loop with the monitor's probe `gradient_noise`. Run this file from its folder:

    python noise_scale.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
from draw import colour, panels, rule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn import functional as F

from towtank.laws.batch import CriticalBatchLaw
from towtank.laws.formula_fit import FormulaFit
from towtank.report import drawing
from towtank.signals import Monitor, every
from towtank.signals.noise import gradient_noise
from towtank.train.digits import MLP

JUDGED = 512  # the first images, whose loss is what a run is judged by
Tensors = dict[str, Tensor]


@lru_cache(maxsize=1)
def images() -> tuple[Tensor, Tensor]:
    """All digits images, pixels in [0, 1], and their digits."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)


def network(width: int, seed: int) -> MLP:
    """One hidden layer of ReLU, drawn from a generator of its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MLP(width, 1)


def places(batch: int, seed: int) -> Iterator[Tensor]:
    """The images of every batch of a run, drawn with replacement."""
    draw = np.random.default_rng((seed, batch))
    while True:
        yield torch.from_numpy(draw.integers(len(images()[0]), size=batch))


def judge(params: Tensors, width: int) -> np.ndarray:
    """Loss (runs,) of stacked parameters on the images that a run is judged by."""
    net, (x, y) = network(width, 0), images()

    def one(p: Tensors) -> Tensor:
        return F.cross_entropy(functional_call(net, p, (x[:JUDGED],)), y[:JUDGED])

    return vmap(one)(params).numpy()


def train_many(lrs: Sequence[float], seeds: Sequence[int], *, batch: int, width: int) -> Iterator[Tensors]:
    """Plain SGD for every rate and seed at once: the stacked parameters (rates * seeds, ...) after each step, without an end."""
    nets = [network(width, seed) for _ in lrs for seed in seeds]
    params = {name: p.detach().clone() for name, p in stack_module_state(nets)[0].items()}
    rates, (x, y) = torch.tensor([lr for lr in lrs for _ in seeds]), images()

    def loss(p: Tensors, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(nets[0], p, (inputs,)), targets)

    gradients = vmap(grad(loss))
    for drawn in zip(*(places(batch, seed) for seed in seeds)):
        at = torch.stack(drawn).repeat(len(lrs), 1)  # every rate sees the batches of its seed
        found = gradients(params, x[at], y[at])
        params = {n: p - rates.view(-1, *[1] * (p.dim() - 1)) * found[n] for n, p in params.items()}
        yield params


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The steps to the target at one batch size: of every seed, at the rate with the fewest on average."""

    batch: int
    lr: float
    steps: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """The noise scale of a run with its interval (95 %), step by step."""

    seed: int
    step: tuple[float, ...]
    scale: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Result:
    """Steps by batch size, the law fitted to them, the watched runs, and what they show in a sentence."""

    tuned: tuple[Tuned, ...]
    fit: FormulaFit
    watched: tuple[Watched, ...]
    predicted: float
    sentence: str


def steps_to(target: float, lrs: Sequence[float], seeds: Sequence[int], *, batch: int, width: int, most: int) -> Tuned:
    """Tune the learning rate for the fewest steps to the target.

    Raises:
        ValueError: if no rate brings all seeds there.
    """
    marks = set(np.geomspace(1, most, 120).round().astype(int).tolist())  # where the loss is measured, 7 % apart
    reached, before = np.full(len(lrs) * len(seeds), math.inf), (0, np.full(len(lrs) * len(seeds), math.log(10)))
    for step, params in enumerate(train_many(lrs, seeds, batch=batch, width=width), 1):
        if step in marks:
            loss = judge(params, width)
            new = ~np.isfinite(reached) & (loss <= target)
            above, below = (
                np.log(before[1][new] / target),
                np.log(target / loss[new]),
            )  # of the mark before, and of this one
            reached[new] = before[0] + above / (above + below) * (step - before[0])
            before = step, loss
        mean = reached.reshape(len(lrs), -1).mean(1)
        if step == most or step > 1.6 * mean.min():  # who is not there by now is not the fastest
            break
    best = int(mean.argmin())
    if not math.isfinite(mean[best]):
        raise ValueError(
            f"expected a rate that reaches {target} at batch {batch}, got none; allow more than {most} steps"
        )
    return Tuned(batch=batch, lr=lrs[best], steps=tuple(reached.reshape(len(lrs), -1)[best].tolist()))


def watch(target: float, lr: float, *, batch: int, width: int, seed: int, out: Path | None) -> Watched:
    """Train to the target in a plain loop, and measure the noise scale at every step."""
    (x, y), model = images(), network(width, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    probe = every(1, gradient_noise("examples"))
    folder = out and out / f"seed{seed}"
    with Monitor(model, optimizer, loss=F.cross_entropy, probes=[probe], rules=(), out=folder) as monitor:
        for at in places(batch, seed):
            loss = F.cross_entropy(model(x[at]), y[at])
            loss.backward()
            optimizer.step()
            monitor.step(loss, (x[at], y[at]))
            optimizer.zero_grad()
            if judged(model) <= target:
                break
    step, scale = monitor.history["noise/scale"]
    low, high = (monitor.history[f"noise/scale_{end}"][1] for end in ("low", "high"))
    return Watched(seed=seed, step=tuple(step), scale=tuple(scale), low=tuple(low), high=tuple(high))


def judged(model: nn.Module) -> float:
    """The loss of one network on the images that a run is judged by."""
    x, y = images()
    with torch.no_grad():
        return F.cross_entropy(model(x[:JUDGED]), y[:JUDGED]).item()


def mean_scale(runs: Sequence[Watched], batch: int) -> float:
    """The noise scale over the steps of a huge-batch run, from runs whose steps at this batch size are worth 1 / (1 + B / b).

    A step whose noise scale is infinite is worth nothing there, and costs b examples here.
    """
    worth = 1 / (1 + np.concatenate([run.scale for run in runs]) / batch)
    return float(batch * (1 - worth).sum() / worth.sum())  # B worth = b (1 - worth)


def main(
    out: Path | None = None,
    *,
    target: float = 0.2,
    batches: Sequence[int] = (2, 4, 8, 16, 32, 64, 128, 256),
    lrs: Sequence[float] = tuple(2 ** (k / 2) for k in range(-9, 4)),
    seeds: Sequence[int] = (0, 1, 2, 3),
    watched: int = 128,
    width: int = 32,
    most: int = 8000,
) -> Result:
    """Tune every batch size, fit the critical batch size, and compare it with the noise scale of one of them."""
    tuned = tuple(steps_to(target, lrs, seeds, batch=b, width=width, most=most) for b in batches)
    rows = [(t.batch, steps) for t in tuned for steps in t.steps]
    fit = CriticalBatchLaw().fit(dict(zip(("batch", "steps"), zip(*rows))), x="batch", y="steps")
    lr = next(t.lr for t in tuned if t.batch == watched)
    runs = tuple(watch(target, lr, batch=watched, width=width, seed=seed, out=out) for seed in seeds)
    scales, predicted = np.concatenate([run.scale for run in runs]), mean_scale(runs, watched)
    found = fit.coefficients["B_crit"]
    factor = max(predicted / found.value, found.value / predicted)
    sentence = (
        f"steps to a loss of {target:g} give a critical batch size of {found.value:.3g} ({found.low:.3g} to {found.high:.3g}) "
        f"images; the noise scale of runs of batch {watched} is {predicted:.3g} on average ({scales.min():.3g} to "
        f"{scales.max():.3g} on the way): they agree to a factor of {factor:.2g}"
    )
    return Result(tuned=tuned, fit=fit, watched=runs, predicted=predicted, sentence=sentence)


def figure(result: Result) -> go.Figure:
    """Steps against batch size with the law, and the noise scale of the watched runs with the critical batch size."""
    fig = panels(
        [
            ("Steps to the target loss", {"title": "batch size", "type": "log"}, {"title": "steps", "type": "log"}),
            ("Noise scale of the watched runs", {"title": "step"}, {"title": "examples", "type": "log"}),
        ]
    )
    each = [(t.batch, steps) for t in result.tuned for steps in t.steps]
    b = np.geomspace(each[0][0], each[-1][0], 60)
    law = result.fit.values["S_min"] + result.fit.values["E_min"] / b
    x, y = zip(*each)
    look = {"mode": "markers", "marker": {"color": colour(0), "size": 6, "opacity": 0.7}}
    fig.add_trace(go.Scatter(x=x, y=y, name="measured, by seed", **look), 1, 1)
    fig.add_trace(go.Scatter(x=b, y=law, name="S_min + E_min / b", mode="lines", line={"color": colour(1)}), 1, 1)
    fig.update_xaxes(tickvals=[t.batch for t in result.tuned], row=1, col=1)
    fig.update_yaxes(tickvals=[20, 50, 100, 200, 500, 1000], row=1, col=1)
    fig.update_yaxes(tickvals=[5, 10, 20, 50, 100, 200, 500], row=1, col=2)
    found = result.fit.coefficients["B_crit"]
    fig.add_shape(rule(colour(1), x=found.value), row=1, col=1)
    for run in result.watched:
        line = {"color": colour(2), "width": 1.2}
        name = "noise scale, by seed"
        shown = {"legendgroup": name, "showlegend": run is result.watched[0]}
        fig.add_trace(go.Scatter(x=run.step, y=run.scale, name=name, mode="lines", line=line, **shown), 1, 2)
    fig.add_shape(rule(colour(1), y=found.value), row=1, col=2)
    band = {"type": "rect", "xref": "x2 domain", "x0": 0, "x1": 1, "y0": found.low, "y1": found.high, "line_width": 0}
    fill = drawing.faded(drawing.arm_colour(1), 0.14)
    fig.add_shape(band | {"fillcolor": fill, "layer": "below"}, row=1, col=2)
    mean = {"color": colour(2), "width": 1.2, "dash": "dot"}
    ends = [1, max(run.step[-1] for run in result.watched)]
    fig.add_trace(
        go.Scatter(x=ends, y=[result.predicted] * 2, name="its mean, by progress", mode="lines", line=mean), 1, 2
    )
    return fig


if __name__ == "__main__":
    print(main(Path("runs/noise_scale")).sentence)
