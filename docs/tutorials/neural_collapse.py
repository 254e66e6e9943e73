"""Long after every training image is classified right, the last layer goes on arranging itself: neural collapse.

Papyan, Han and Donoho (2020) trained classifiers far beyond the step at which the training error reaches zero, and looked at the
features that enter the last layer. In that terminal phase

- NC1: the features of a class shrink to their mean, compared with the distance between classes,
- NC2: the class means become equally long and equally far apart in angle, a simplex,
- NC3: the weights of the last layer turn towards the class means,
- NC4: the network decides for the class whose mean is nearest.

Here a small network learns digits by stochastic gradient descent with momentum and weight decay; the probe looks at log-spaced
steps. Each measure is 0 when its collapse is complete. Run this file from its folder:

    python neural_collapse.py
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

from towtank.signals import Monitor, Probe, Step, log_spaced
from towtank.signals.neural_collapse import neural_collapse_probe

MEASURES = {
    "nc1": "NC1 spread within classes",
    "nc2_features": "NC2 lengths",
    "nc2_angles": "NC2 angles",
    "nc3": "NC3 weights",
    "nc4": "NC4 nearest mean",
}


@dataclass(frozen=True, kw_only=True)
class Result:
    """Series against the step.

    Args:
        step: at which the probe looked.
        measures: {name: values}, names as in `MEASURES`.
        train_error, test_error: share of images, at the same steps.
        fitted: first of these steps from which on the training error stays 0: where the terminal phase begins.
        sentence: what came out.
    """

    step: tuple[float, ...]
    measures: dict[str, tuple[float, ...]]
    train_error: tuple[float, ...]
    test_error: tuple[float, ...]
    fitted: int
    sentence: str

    def of(self, measure: str, step: float) -> float:
        """A measure at a step."""
        return self.measures[measure][self.step.index(step)]


def digits(per_class: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """As many training images of each class, and all others to test."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
    rank = torch.stack([(y == c).cumsum(0) for c in range(10)], 1).gather(1, y[:, None])[:, 0]
    train = rank <= per_class
    return (x[train], y[train]), (x[~train], y[~train])


def network(width: int, seed: int, normalize: bool = True) -> nn.Module:
    """Three hidden layers with ReLU, drawn from a generator of their own; with batch normalization if asked for."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hidden: list[nn.Module] = []
        for inputs in (64, width, width):
            norm = [nn.BatchNorm1d(width)] if normalize else []
            hidden += [nn.Linear(inputs, width, bias=not normalize), *norm, nn.ReLU()]
        return nn.Sequential(*hidden, nn.Linear(width, 10))


def errors(**sets: tuple[Tensor, Tensor]) -> Probe:
    """A probe of one's own: the share of images of each set that are classified wrong."""

    def probe(step: Step) -> dict[str, Tensor]:
        assert step.problem_of is not None
        found: dict[str, Tensor] = {}
        for name, images in sets.items():
            problem = step.problem_of(images)
            with problem.measuring():  # the model stays as it is: in training mode, with its running statistics
                wrong = problem.outputs(next(problem.batches())).argmax(dim=1) != images[1]
            found[f"error/{name}"] = wrong.float().mean()
        return found

    return probe


def main(
    out: Path | None = None,
    *,
    epochs: int = 400,
    per_class: int = 100,
    width: int = 128,
    lr: float = 0.05,
    decay: float = 3e-3,
    size: int = 100,
    normalize: bool = True,
    seed: int = 0,
) -> Result:
    """Train long beyond zero error, and watch the last layer collapse."""
    train, test = digits(per_class)
    model = network(width, seed, normalize)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    probes = [log_spaced(neural_collapse_probe(train)), log_spaced(errors(train=train, test=test))]
    generator = torch.Generator().manual_seed(seed)
    with Monitor(model, optimizer, loss=F.cross_entropy, probes=probes, rules=(), mode="eval", out=out) as monitor:
        for _ in range(epochs):
            for chosen in torch.randperm(len(train[1]), generator=generator).split(size):
                batch = train[0][chosen], train[1][chosen]
                loss = F.cross_entropy(model(batch[0]), batch[1])
                loss.backward()
                optimizer.step()
                monitor.step(loss, batch)
                optimizer.zero_grad()
            schedule.step()
    return result(monitor)


def result(monitor: Monitor) -> Result:
    """What the history holds."""
    step, train_error = monitor.history["error/train"]
    wrong = [s for s, e in zip(step, train_error, strict=True) if e > 0]
    fitted = next((s for s in step if s > max(wrong, default=0)), step[-1])
    measures = {name: tuple(monitor.history[f"representation/{name}"][1]) for name in MEASURES}
    at = list(step).index(fitted)
    told = ", ".join(f"{name} {values[at]:.2g} to {values[-1]:.2g}" for name, values in measures.items())
    return Result(
        step=tuple(step),
        measures=measures,
        train_error=tuple(train_error),
        test_error=tuple(monitor.history["error/test"][1]),
        fitted=int(fitted),
        sentence=f"From step {fitted:g}, where every training image is right, to step {step[-1]:g}: {told}",
    )


def figure(result: Result) -> go.Figure:
    """The measures and the errors against the step."""
    x = log_axis("step", result.step)
    y = log_axis("0 when complete", [v for values in result.measures.values() for v in values])
    errors = linear_axis("share of images")
    fig = panels([("Distance from collapse", x, y), ("Errors", x, errors)])
    for i, (name, label) in enumerate(MEASURES.items()):
        shown = [v if v > 0 else None for v in result.measures[name]]
        fig.add_trace(go.Scatter(x=result.step, y=shown, name=label, line={"color": colour(i)}), 1, 1)
    for label, values, dash in (
        ("training error", result.train_error, "dot"),
        ("test error", result.test_error, "solid"),
    ):
        line = {"color": colour(5), "dash": dash}
        fig.add_trace(go.Scatter(x=result.step, y=values, name=label, line=line), 1, 2)
    for column in (1, 2):
        fig.add_shape(rule(x=result.fitted), row=1, col=column)
    return fig


if __name__ == "__main__":
    print(main(Path("runs/neural_collapse")).sentence)
