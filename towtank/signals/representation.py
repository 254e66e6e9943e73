"""The signal inside a model on fixed data: gains, lengths, correlations and ranks of features by depth.

Definitions are in `depth`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from towtank.problem import Problem
from towtank.signals.depth import DepthMap, LayerMoments, layer_moments
from towtank.signals.step import CannotTell, Step


def measure_depth(
    problem: Problem, *, names: Sequence[str] | None = None, rows: int = 32, modules: int = 16
) -> DepthMap:
    """LayerMoments of the activations of a model on the first batch of a problem, in order of depth.

    One forward pass; every activation is reduced to its moments as it passes, so that nothing else is held.

    Args:
        problem: model and data.
        names: globs of module names; default: the layers with a weight matrix, such as linear layers and convolutions.
        rows: at most so many examples are used, and 128 positions of the whole batch for the spread.
        modules: at most so many modules, evenly spaced over those that match.

    Raises:
        CannotTell: if no module matches, or none that does makes a tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> with torch.no_grad(): _ = [layer.weight.copy_(3 * torch.eye(2)) for layer in model]
        >>> problem = Problem(model, nn.functional.mse_loss, (torch.eye(2), torch.zeros(2, 2)))
        >>> [(row.name, row.length, round(row.gain, 6)) for row in measure_depth(problem).rows]
        [('0', 4.5, 3.0), ('1', 40.5, 3.0)]

    Source: Schoenholz et al. 2017, section 3.
    """
    chosen = _chosen(problem.network, names, modules)
    found: dict[str, LayerMoments] = {}

    def look(module: nn.Module, given: Any, made: Any) -> None:
        name, depth = chosen[module]
        if name not in found and isinstance(made, Tensor) and made.is_floating_point() and made.ndim and made.numel():
            found[name] = layer_moments(name, given, made, kind=type(module).__name__, depth=depth, rows=rows)

    with problem.measuring(), torch.no_grad(), listening(chosen, look):
        problem.outputs(next(problem.batches()))
    if not found:
        raise CannotTell("expected modules that make floating-point tensors, got none; choose others by names=")
    return DepthMap(tuple(found.values()))


def _chosen(model: nn.Module, names: Sequence[str] | None, limit: int) -> dict[nn.Module, tuple[str, int]]:
    """{module: (name, place among all that match)}, thinned evenly to at most `limit`.

    Raises:
        CannotTell: if nothing matches.
    """
    if names is None:
        matched = [(n, m) for n, m in model.named_modules() if _has_matrix(m)]
    else:
        globs = (names,) if isinstance(names, str) else names
        matched = [(n, m) for n, m in model.named_modules() if n and any(fnmatchcase(n, g) for g in globs)]
    if not matched:
        raise CannotTell(f"expected modules that match {names or 'layers with a weight matrix'}, got none; give names=")
    places = range(len(matched))
    if len(matched) > limit:
        places = sorted({round(i * (len(matched) - 1) / max(limit - 1, 1)) for i in range(limit)})
    return {matched[i][1]: (matched[i][0], i) for i in places}


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim >= 2 and not isinstance(module, nn.Embedding | nn.EmbeddingBag)


@contextmanager
def listening(modules: Iterable[nn.Module], hear: Callable[[Any, Any, Any], None]) -> Generator[None, None, None]:
    """Call `hear(module, first input, output)` at every call of some modules; the hooks are gone when the context ends.

    Args:
        modules: whose calls.
        hear: gets tensors detached; it must not change them.
    """

    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], made: Any) -> None:
        given = arguments[0] if arguments else next(iter(keywords.values()), None)
        hear(module, _detached(given), _detached(made))

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class Representation:
    """The depth map on the probe batch: "representation/length|correlation|gain|mean|variance|effective_rank/{module}".

    Besides, "representation/growth" is the factor of mean squares per layer, with "growth_error". What has no value, such as
    the correlation of a batch of one, is left out.

    Args:
        names: globs of module names; None: the layers with a weight matrix.
        rows: at most so many examples are used.
        modules: at most so many modules.
    """

    names: tuple[str, ...] | None = None
    rows: int = 32
    modules: int = 16

    def cost(self, problem: Problem) -> float:
        """One forward pass of the first batch, in gradients of the probe batch.

        Args:
            problem: on the probe batch.
        """
        return next(c for c in problem.survey.counts if c) / problem.survey.total / 3

    def __call__(self, step: Step) -> dict[str, float]:
        """Readings of a step."""
        found = measure_depth(step.problem, names=self.names, rows=self.rows, modules=self.modules)
        values: dict[str, float] = {}
        for row in found.rows:
            own = {key: getattr(row, key) for key in ("length", "correlation", "gain", "mean", "variance")}
            own |= {"length_error": row.length_error, "correlation_error": row.correlation_error}
            own |= {} if row.spread is None else {"effective_rank": row.spread.effective_rank}
            values |= {f"{key}/{row.name}": value for key, value in own.items()}
        try:
            trend = found.propagation()
            values |= {"growth": trend.factor, "growth_error": trend.factor_error}
        except CannotTell:
            pass  # one layer has no trend
        return {f"representation/{key}": value for key, value in values.items() if math.isfinite(value)}


def representation(names: Sequence[str] | None = None, rows: int = 32, modules: int = 16) -> Representation:
    """The probe of the depth map; see `Representation`.

    Args:
        names: globs of module names; None: the layers with a weight matrix.
        rows: at most so many examples are used.
        modules: at most so many modules.
    """
    globs = (names,) if isinstance(names, str) else names
    return Representation(names=None if globs is None else tuple(globs), rows=rows, modules=modules)


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x
