"""The loss along lines and planes through the model's parameters.

theta: the parameters (P,); d: a direction; the slice is L(theta + x d1 + y d2).

Decisions: directions leave biases and normalization parameters alone (all parameters of one axis or none) unless they are
eigenvectors or a trajectory, which are meant as they are: the loss is invariant to scales that normalization removes, and a
step of the size of such a parameter is no step of the network's. Running statistics of BatchNorm stay those of the model in
mode "eval"; a Problem in mode "train" takes each point's own.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from towtank.curvature.hessian import Hessian
from towtank.curvature.measure import as_problem
from towtank.estimate import finite
from towtank.linalg.draws import as_generator
from towtank.linalg.eigsh import eigsh
from towtank.linalg.progress import Meter
from towtank.problem import Problem

if TYPE_CHECKING:
    import plotly.graph_objects as go

Kind = Literal["filter", "random", "eigen", "trajectory"]
_AXES = {
    "filter": "random direction {}, filter by filter as long as the weights",
    "random": "random direction {}, as long as the weights",
    "eigen": "distance along eigenvector {} of the Hessian",
    "trajectory": "distance along principal component {} of the trajectory",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Landscape:
    """The loss on a line or a plane.

    Args:
        kind: of the directions.
        x: coordinates along the first direction.
        y: along the second; empty for a line.
        loss: L at each point, rows along y: (1, len(x)) for a line. Not finite where the loss is not.
        centre: L at the model itself.
        directions: (P, 1) or (P, 2).
        curvature: eigenvalues that belong to the directions, for "eigen".
        path: coordinates (checkpoints, 1 or 2) of the trajectory, for "trajectory".
        explained: share of the trajectory's squared length that each direction holds.
        convention: which loss of which parameters.
        time_s: seconds it took.
    """

    kind: Kind
    x: tuple[float, ...]
    y: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]
    centre: float
    directions: Tensor
    curvature: tuple[float, ...] = ()
    path: tuple[tuple[float, ...], ...] = ()
    explained: tuple[float, ...] = ()
    convention: str = ""
    time_s: float = math.nan

    def to_json(self) -> dict[str, Any]:
        """Plain data without the directions: numbers that are not finite are None."""
        kept = ("kind", "x", "y", "centre", "curvature", "path", "explained", "convention", "time_s")
        return {k: getattr(self, k) for k in kept} | {
            "loss": [[v if finite(v) else None for v in r] for r in self.loss]
        }

    def figure(self) -> go.Figure:
        """A plotly figure: a curve, or contours of the logarithm where the loss is positive over decades."""
        import plotly.graph_objects as go

        titles = [_AXES[self.kind].format(i + 1) for i in range(2)]
        layout = {"xaxis": {"title": {"text": titles[0]}}, "template": "plotly_white"}
        if not self.y:
            marks = [
                go.Scatter(x=self.x, y=[v if finite(v) else None for v in self.loss[0]], mode="lines", name="loss")
            ]
            marks += [go.Scatter(x=[0.0], y=[self.centre], mode="markers", name="model")]
            return go.Figure(marks, {**layout, "yaxis": {"title": {"text": "loss"}}})
        level, shown = self._levels()
        contours = go.Contour(x=self.x, y=self.y, z=shown, contours={"coloring": "heatmap"}, colorbar={"title": level})
        marks = [contours, go.Scatter(x=[0.0], y=[0.0], mode="markers", name="model")]
        if self.path:
            xs, ys = zip(*self.path, strict=True)
            marks.append(go.Scatter(x=xs, y=ys, mode="lines+markers", name="trajectory"))
        return go.Figure(marks, {**layout, "yaxis": {"title": {"text": titles[1]}}})

    def _levels(self) -> tuple[str, list[list[float | None]]]:
        values = [v for row in self.loss for v in row if finite(v)]
        wide = bool(values) and min(values) > 0 and max(values) > 30 * min(values)
        change: Callable[[float], float] = math.log10 if wide else float
        shown = [[change(v) if finite(v) else None for v in row] for row in self.loss]
        return ("log10 loss" if wide else "loss"), shown


def landscape(
    model: nn.Module | Problem,
    loss: Callable[..., Any] | None = None,
    data: Any = None,
    *,
    kind: Kind = "filter",
    dims: Literal[1, 2] = 1,
    span: float | None = None,
    points: int = 21,
    checkpoints: Iterable[Mapping[str, Tensor]] = (),
    generator: torch.Generator | int | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Landscape:
    """The loss along random, filter-normalized, Hessian-eigenvector or trajectory directions.

    - "filter": Gaussian directions whose every filter (row of a weight) is as long as that filter of the model
    - "random": Gaussian directions as long as all weights together
    - "eigen": unit eigenvectors of the largest one or two eigenvalues of the Hessian
    - "trajectory": unit principal components of the checkpoints seen from the model

    Args:
        model: the model; or a `Problem`, then without loss and data.
        loss: see `Problem`.
        data: see `Problem`.
        kind: see above.
        dims: 1, a line; 2, a plane.
        span: the slice runs from -span to span. Default: 1 for "filter" and "random", a tenth of |theta| for "eigen", and a
            little more than the trajectory needs.
        points: along each direction.
        checkpoints: state dicts of the model, in order, for "trajectory".
        generator: of random directions, or a seed.
        progress: show a bar; by default on a terminal for long work.
        **options: of `Problem`.

    Raises:
        ValueError: if an argument does not fit, or every parameter is one that random directions leave alone.

    Example:
        Along its eigenvector a bowl of curvature 4 is L = 2 x^2.

        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> bowl = lambda z, y: 2 * (z - y).square().mean()
        >>> data = (torch.ones(1, 1), torch.zeros(1, 1))
        >>> slice = landscape(model, bowl, data, kind="eigen", span=1, points=3)
        >>> slice.x, slice.loss, slice.curvature
        ((-1.0, 0.0, 1.0), ((2.0, 0.0, 2.0),), (4.0,))

    Source: Goodfellow et al. 2015; Li et al. 2018, sections 4 and 7 (filter normalization, trajectories).
    """
    problem = as_problem(model, loss, data, options)
    if dims not in (1, 2) or points < 2:
        raise ValueError(f"expected 1 or 2 dims and at least 2 points, got dims={dims}, points={points}")
    began = time.perf_counter()
    found = _directions(problem, kind, dims, list(checkpoints), generator, progress)
    if span is not None and not (span > 0 and math.isfinite(span)):
        raise ValueError(f"expected a positive span, got {span}")
    reach = span or found.span
    x = tuple(torch.linspace(-reach, reach, points, dtype=torch.float64).tolist())
    y = x if dims == 2 else ()
    return Landscape(
        kind=kind,
        x=x,
        y=y,
        loss=_losses(problem, found.D, x, y, progress),
        centre=problem.value(),
        directions=found.D,
        curvature=found.curvature,
        path=found.path,
        explained=found.explained,
        convention=problem.convention,
        time_s=time.perf_counter() - began,
    )


def _losses(
    problem: Problem, D: Tensor, x: Sequence[float], y: Sequence[float], progress: bool | None
) -> tuple[tuple[float, ...], ...]:
    centre, rows = _theta(problem), []
    with Meter("landscape", len(x) * max(1, len(y)), show=progress) as meter:
        for b in y or (0.0,):
            row = []
            for a in x:
                moved = centre + a * D[:, 0] + (b * D[:, 1] if y else 0.0)
                row.append(problem.value(problem.unflatten(moved)))
                meter.advance(1)
            rows.append(tuple(row))
    return tuple(rows)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Found:
    """Directions (P, 1 or 2), a span that suits them, and what is known of them."""

    D: Tensor
    span: float
    curvature: tuple[float, ...] = ()
    path: tuple[tuple[float, ...], ...] = ()
    explained: tuple[float, ...] = ()


def _directions(
    problem: Problem,
    kind: Kind,
    dims: int,
    checkpoints: list[Mapping[str, Tensor]],
    generator: torch.Generator | int | None,
    progress: bool | None,
) -> _Found:
    if kind not in _AXES:
        raise ValueError(f"expected kind to be one of {', '.join(_AXES)}; got {kind!r}")
    if (kind == "trajectory") != bool(checkpoints):
        raise ValueError('expected checkpoints for kind="trajectory", and for no other')
    if dims > problem.size:
        raise ValueError(f"expected at least {dims} parameters for a plane, got {problem.size}")
    if kind == "eigen":
        pairs = eigsh(Hessian(problem), dims, tol=1e-2, generator=generator, progress=progress)
        span = 0.1 * float(_theta(problem).norm()) or 1.0
        return _Found(D=pairs.vectors, span=span, curvature=tuple(pairs.values.tolist()))
    if kind == "trajectory":
        return _trajectory(problem, dims, checkpoints)
    draws = as_generator(generator, problem.device)
    return _Found(D=torch.stack([_random(problem, kind, draws) for _ in range(dims)], dim=1), span=1.0)


def _theta(problem: Problem) -> Tensor:
    return problem.flatten(dict(zip(problem.names, problem.parameters(), strict=True)))


def _random(problem: Problem, kind: Kind, generator: torch.Generator) -> Tensor:
    """A Gaussian direction that leaves biases and normalization alone, scaled to the weights.

    Raises:
        ValueError: if there is nothing else.
    """
    theta, parts, kept = problem.unflatten(_theta(problem)), {}, []
    for name, p in theta.items():
        d = torch.randn(p.shape, generator=generator, dtype=p.dtype, device=p.device)
        if p.ndim < 2:
            d = torch.zeros_like(d)
        elif kind == "filter":
            d = d * (p.flatten(1).norm(dim=1) / d.flatten(1).norm(dim=1)).view(-1, *[1] * (p.ndim - 1))
        kept += [p.reshape(-1)] if p.ndim >= 2 else []
        parts[name] = d
    if not kept:
        raise ValueError(
            'expected a weight of two or more axes for random directions, got only biases and scales; use kind="eigen"'
        )
    direction = problem.flatten(parts)
    return direction if kind == "filter" else direction * (torch.cat(kept).norm() / direction.norm())


def _trajectory(problem: Problem, dims: int, checkpoints: list[Mapping[str, Tensor]]) -> _Found:
    """Principal components of checkpoints minus the model (Li et al. 2018, section 7.2), and the path in them.

    Raises:
        ValueError: if the checkpoints are not of this model, or span too little.
    """
    missing = [n for n in problem.names for c in checkpoints if n not in c]
    if missing:
        raise ValueError(f"expected state dicts with all parameters of the problem, got one without {missing[0]}")
    centre = _theta(problem)
    steps = torch.stack([problem.flatten({n: c[n] for n in problem.names}) - centre for c in checkpoints])
    _, lengths, rows = torch.linalg.svd(steps.double(), full_matrices=False)
    rank = int((lengths > torch.finfo(centre.dtype).eps * lengths.max()).sum()) if lengths.max() > 0 else 0
    if rank < dims:
        raise ValueError(
            f"expected checkpoints that span {dims} direction(s) from the model, got {rank}; use more, or dims=1"
        )
    D = rows[:dims].T
    path = steps.double() @ D
    return _Found(
        D=D.to(centre.dtype),
        span=1.2 * float(path.abs().max()),
        path=tuple(map(tuple, path.tolist())),
        explained=tuple((lengths.square() / lengths.square().sum())[:dims].tolist()),
    )
