"""Neural collapse of a model: its last features against its classifier, on fixed data.

Definitions, also for imbalanced classes, are in `collapse_statistics`. N examples, K classes, d features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from towtank.problem import Batch, Problem
from towtank.signals.collapse_statistics import CollapseStatistics, NeuralCollapse, home, neural_collapse
from towtank.signals.representation import listening
from towtank.signals.step import CannotTell, Step

__all__ = [
    "CollapseStatistics",
    "NeuralCollapse",
    "NeuralCollapseProbe",
    "collapse_of",
    "measure_collapse",
    "neural_collapse",
    "neural_collapse_probe",
    "problem_on",
]


def measure_collapse(
    model: nn.Module, batches: Any, *, head: str | None = None, forward: Callable[[nn.Module, Any], Any] | None = None
) -> NeuralCollapse:
    """NC1 to NC4 of a model on data, in evaluation mode: two passes, the second for NC4.

    Args:
        model: a classifier whose last layer is `nn.Linear`.
        batches: one batch, or an iterable that gives the same ones in every pass, as `Problem` takes them. Targets are class
            indices (negative ones are left out) or one-hot.
        head: name of the last layer; default: the last `nn.Linear` whose output is that of the model, or has its size.
        forward: `forward(model, batch)` -> logits, as in `Problem`.

    Raises:
        CannotTell: if there is no such layer, the targets are no classes, or a class has no example.
        ValueError: if every parameter of the model is frozen.

    Example:
        >>> h = torch.tensor([[-1.5], [-0.5], [0.5], [1.5]])
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
        >>> with torch.no_grad(): _ = model[1].weight.copy_(torch.tensor([[-3.0], [3.0]]))
        >>> round(measure_collapse(model, (h, torch.tensor([0, 0, 1, 1]))).nc1, 12)
        0.125

    Source: Papyan, Han, Donoho 2020.
    """
    return collapse_of(problem_on(model, batches, forward), head)


def problem_on(model: nn.Module, batches: Any, forward: Callable[[nn.Module, Any], Any] | None = None) -> Problem:
    """A model on data where the loss does not matter."""
    loss = nn.functional.cross_entropy
    return Problem(model, loss, batches, forward=forward, checks=False)


def collapse_of(problem: Problem, head: str | None = None) -> NeuralCollapse:
    """NC1 to NC4 of a problem; see `measure_collapse`.

    Raises:
        CannotTell: if it has no linear head, its targets are no classes, or a class has no example.
    """
    with problem.measuring(), torch.no_grad():
        layer = _layer(problem, head)
        found: CollapseStatistics | None = None
        W_Kd = torch.empty(0)
        for H_Nd, y_N, _, W_Kd in _passes(problem, layer):
            found = found or CollapseStatistics.empty(len(W_Kd), W_Kd.shape[1], home(H_Nd))
            found = found.update(H_Nd, y_N)
        if found is None:
            raise CannotTell("expected at least one batch with targets that count, got none")
        found.measures(W_Kd)  # refuses before the second pass
        wrong = sum(found.disagreements(H_Nd, guess_N) for H_Nd, _, guess_N, _ in _passes(problem, layer))
        return found.measures(W_Kd, wrong / float(found.counts_K.sum()))


def _passes(problem: Problem, layer: nn.Linear) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each batch: features (N, d), labels (N,), predictions (N,), weights (K, d).

    Raises:
        CannotTell: if the layer is not called, or its inputs do not match the labels.
    """
    for batch in problem.batches():
        H_Nd, W_Kd, logits = _seen(problem, batch, layer)
        y_N, guess_N = _labels(batch, len(W_Kd)), logits.flatten(0, -2).argmax(dim=-1)
        if not len(H_Nd) == len(y_N) == len(guess_N):
            sizes = f"{len(H_Nd)} features, {len(y_N)} labels and {len(guess_N)} predictions"
            raise CannotTell(
                f"expected one label an input of the last layer, got {sizes}; give forward= without shifts"
            )
        valid = y_N >= 0
        yield H_Nd[valid], y_N[valid], guess_N[valid], W_Kd


def _seen(problem: Problem, batch: Batch, layer: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, d), weights (K, d) and outputs of the last call of a layer on a batch.

    Raises:
        CannotTell: if the layer is not called.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    with listening([layer], lambda m, given, _: calls.append((given, m.weight.detach().clone()))):
        logits = problem.outputs(batch)
    if not calls or not isinstance(logits, Tensor):
        raise CannotTell("expected the last layer to be called and to give logits, got none; give head= or forward=")
    return calls[-1][0].flatten(0, -2), calls[-1][1], logits


def _labels(batch: Batch, classes: int) -> Tensor:
    targets = batch.targets
    if isinstance(targets, Tensor) and not targets.is_floating_point():
        y_N = targets.reshape(-1)
        if len(y_N) and int(y_N.max()) >= classes:
            raise CannotTell(
                f"expected class indices below {classes}, the outputs of the last layer, got {int(y_N.max())}"
            )
        return y_N
    if isinstance(targets, Tensor) and targets.ndim and targets.shape[-1] == classes:
        flat_NK = targets.reshape(-1, classes)
        if bool(((flat_NK == flat_NK.amax(dim=1, keepdim=True)).sum(dim=1) == 1).all()) and len(flat_NK.unique()) == 2:
            return flat_NK.argmax(dim=1)
    raise CannotTell("expected class indices or one-hot targets, got others; neural collapse is about classes")


def _layer(problem: Problem, head: str | None) -> nn.Linear:
    linears = {name: m for name, m in problem.network.named_modules() if isinstance(m, nn.Linear)}
    if head is not None:
        if head not in linears:
            raise CannotTell(
                f"expected head= to name an nn.Linear, got {head!r}; the last ones are {list(linears)[-3:]}"
            )
        return linears[head]
    calls: list[tuple[nn.Linear, Tensor]] = []
    with listening(linears.values(), lambda m, _, made: calls.append((m, made))):
        logits = problem.outputs(next(problem.batches()))
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise CannotTell("expected logits (N, K) from the model, got something else; give forward= that returns them")
    same = [m for m, made in calls if made.numel() == logits.numel() and torch.equal(made.flatten(), logits.flatten())]
    alike = [m for m, made in calls if made.shape[-1] == logits.shape[-1]]
    if not (same or alike):
        raise CannotTell(f"expected an nn.Linear that makes the {logits.shape[-1]} outputs, got none; give head=")
    return (same or alike)[-1]


@dataclass(frozen=True, kw_only=True)
class NeuralCollapseProbe:
    """NC1 to NC4 on fixed data: "representation/nc1", "nc2_features", "nc2_weights", "nc2_angles", "nc3", "nc4".

    "nc2_angles" is that of the features. What has no value, such as the angles of weights that are all zero, is left out.

    Args:
        batches: one batch, or an iterable of batches to be read at every call; None: the probe batch of the monitor. Take at
            least several examples of each class.
        head: name of the last layer; None: found by itself.
    """

    batches: Any = None
    head: str | None = None

    def cost(self, problem: Problem) -> float:
        """Two forward passes over the data, and one over its first batch, in gradients of the probe batch.

        Args:
            problem: on the probe batch.
        """
        own = problem if self.batches is None else problem.replace(data=self.batches, checks=False)
        counts = own.survey.counts
        return (2 * own.survey.total + (counts[0] if self.head is None else 0.0)) / problem.survey.total / 3

    def __call__(self, step: Step) -> dict[str, float]:
        """Readings of a step."""
        found = collapse_of(self._problem(step), self.head)
        values = {
            "nc1": found.nc1,
            "nc2_features": found.equinorm_features,
            "nc2_weights": found.equinorm_weights,
            "nc2_angles": found.equiangle_features,
            "nc3": found.nc3,
            "nc4": found.nc4,
        }
        return {f"representation/{key}": value for key, value in values.items() if math.isfinite(value)}

    def _problem(self, step: Step) -> Problem:
        if self.batches is None:
            return step.problem
        return step.problem_of(self.batches) if step.problem_of else problem_on(step.model, self.batches)


def neural_collapse_probe(batches: Any = None, head: str | None = None) -> NeuralCollapseProbe:
    """The probe of neural collapse; see `NeuralCollapseProbe`.

    Args:
        batches: data to measure on; None: the probe batch.
        head: name of the last layer; None: found by itself.
    """
    return NeuralCollapseProbe(batches=batches, head=head)
