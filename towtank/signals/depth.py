"""What depth does to the signal: lengths and correlations layer by layer, and how many directions features use.

N examples (rows of the first axis), D numbers of one example in an activation, R positions (examples and, for images and
sequences, places), d features of one position.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from towtank.signals.step import CannotTell

F64 = torch.float64
FOLD = 100.0  # of mean squares over the whole depth: a factor of 10 in size


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How many directions some features use.

    Args:
        effective_rank: exp of the entropy of the singular values divided by their sum.
        participation: tr(C)^2 / tr(C^2) of the covariance C.
        limit: the largest rank that so many rows allow, min(R - 1, d). Near it, both numbers tell the number of rows: white
            noise of d features has a participation of about d / (1 + d / R).
    """

    effective_rank: float
    participation: float
    limit: int


@dataclass(frozen=True, kw_only=True)
class LayerMoments:
    """What one module makes of a batch.

    Args:
        name: of the module.
        kind: its class.
        depth: its place among the modules that were chosen, from 0.
        length: mean over examples of the mean square of the output, q.
        length_error: standard error over examples.
        correlation: mean over pairs of examples of q_ab / sqrt(q_aa q_bb); NaN for fewer than two examples.
        correlation_error: standard error over examples, by the jackknife; NaN for fewer than three.
        gain: RMS of the output over RMS of the first input; NaN if that is no floating-point tensor.
        mean: of all entries of the output.
        variance: of all entries of the output.
        spread: directions that the output uses; None where there are fewer than two positions.
    """

    name: str
    kind: str
    depth: int
    length: float
    length_error: float
    correlation: float
    correlation_error: float
    gain: float
    mean: float
    variance: float
    spread: Spread | None


@dataclass(frozen=True, kw_only=True)
class Propagation:
    """How the length of the signal changes from layer to layer.

    Args:
        factor: of the mean square, per layer: exp of the slope of log length against depth.
        factor_error: standard error of the fit; NaN for two layers.
        fold: factor over the whole depth.
        layers: number of layers in the fit.
        verdict: "exploding" if the fold is above 100, "vanishing" if below 1/100, else "steady".
    """

    factor: float
    factor_error: float
    fold: float
    layers: int
    verdict: Literal["steady", "vanishing", "exploding"]

    def __str__(self) -> str:
        return f"{self.verdict}: mean squares change by {self.factor:.3g} a layer, {self.fold:.3g} over {self.layers} layers"


@dataclass(frozen=True)
class DepthMap:
    """LayerMoments of activations in order of depth.

    Args:
        rows: one a module.
    """

    rows: tuple[LayerMoments, ...]

    def of(self, kind: str) -> DepthMap:
        """The modules of one class only."""
        return DepthMap(tuple(row for row in self.rows if row.kind == kind))

    def propagation(self) -> Propagation:
        """The trend of lengths over the modules of the most frequent class.

        Lengths before and after a nonlinearity differ by a factor, so that classes are not mixed.

        Raises:
            CannotTell: if there are fewer than two of them.
        """
        if not self.rows:
            raise CannotTell("expected at least two layers, got none")
        kind = Counter(row.kind for row in self.rows).most_common(1)[0][0]
        rows = self.of(kind).rows
        return propagation([row.length for row in rows], [row.depth for row in rows])

    def table(self) -> str:
        """The map as text, a line a module."""
        width = max([len(row.name) for row in self.rows] + [6])
        lines = [f"{'module':{width}}  mean square  correlation   gain    rank (of)"]
        for row in self.rows:
            rank = "" if row.spread is None else f"{row.spread.effective_rank:7.1f} ({row.spread.limit})"
            lines.append(f"{row.name:{width}}  {row.length:11.4g}  {row.correlation:11.4f}  {row.gain:5.3g}  {rank}")
        return "\n".join(lines)


def spread(features: Tensor) -> Spread:
    """Effective rank exp(-sum p_i log p_i), p = s / sum s, of centered features, and their participation ratio.

    Args:
        features: (R, d).

    Raises:
        ValueError: if they are no matrix.
        CannotTell: if there are fewer than two rows, or a feature is not finite.

    Example:
        Four points on a cross: two directions of equal strength.

        >>> spread(torch.tensor([[1.0, 0.0, 5.0], [-1.0, 0.0, 5.0], [0.0, 1.0, 5.0], [0.0, -1.0, 5.0]]))
        Spread(effective_rank=2.0, participation=2.0, limit=3)

    Source: Roy, Vetterli 2007, "The effective rank", section 2; Gao et al. 2017 for the participation ratio.
    """
    if features.ndim != 2:
        raise ValueError(f"expected features (R, d), got {tuple(features.shape)}; flatten the positions")
    if len(features) < 2 or not features.shape[1]:
        raise CannotTell(f"expected at least two rows of features, got {tuple(features.shape)}")
    X_Rd = _wide(features)
    if not bool(X_Rd.isfinite().all()):
        raise CannotTell("expected finite features, got NaN or infinity")
    limit = min(len(X_Rd) - 1, X_Rd.shape[1])
    C_Rd = X_Rd - X_Rd.mean(dim=0)
    s = torch.linalg.svdvals(C_Rd)
    s = s[s > torch.finfo(F64).eps * max(X_Rd.shape) * X_Rd.norm()]
    if not len(s):
        return Spread(effective_rank=0.0, participation=0.0, limit=limit)
    p, squares = s / s.sum(), (s / s[0]).square()
    rank = float((-(p * p.log()).sum()).exp())
    return Spread(effective_rank=rank, participation=float(squares.sum() ** 2 / squares.square().sum()), limit=limit)


def relu_correlation(correlation: float) -> float:
    """Correlation after a wide ReLU layer: (sqrt(1 - c^2) + (pi - arccos c) c) / pi.

    Args:
        correlation: c between two inputs of the layer, from -1 to 1.

    Raises:
        ValueError: if it is outside.

    Example:
        >>> relu_correlation(1.0), relu_correlation(-1.0), relu_correlation(0.0) == 1 / math.pi
        (1.0, 0.0, True)

    Source: Cho, Saul 2009, equation 6; as a map of depth Schoenholz et al. 2017, section 3.
    """
    if not -1 <= correlation <= 1:
        raise ValueError(f"expected a correlation from -1 to 1, got {correlation}")
    return (math.sqrt(1 - correlation**2) + (math.pi - math.acos(correlation)) * correlation) / math.pi


def propagation(lengths: Sequence[float], depths: Sequence[int] | None = None) -> Propagation:
    """The factor by which lengths change per layer, and whether the signal vanishes or explodes.

    log q_l = a + l log(factor), by least squares. The limits, a hundredfold over the whole depth, are a convention.

    Args:
        lengths: mean square of each layer.
        depths: place of each; default 0, 1, 2.

    Raises:
        CannotTell: if there are fewer than two layers, or a length is NaN.

    Example:
        >>> print(propagation([1.0, 0.1, 0.01, 0.001]))
        vanishing: mean squares change by 0.1 a layer, 0.001 over 4 layers

    Source: Schoenholz et al. 2017, section 3; He et al. 2015, section 2.2.
    """
    n = len(lengths)
    if n < 2:
        raise CannotTell(f"expected at least two layers, got {n}; choose more modules")
    if any(math.isnan(q) for q in lengths):
        raise CannotTell("expected finite activations, got NaN; look at the first layer that has one")
    if min(lengths) <= 0 or math.isinf(max(lengths)):
        over = math.isinf(max(lengths))
        size = math.inf if over else 0.0
        return Propagation(
            factor=size, factor_error=math.nan, fold=size, layers=n, verdict="exploding" if over else "vanishing"
        )
    x = torch.tensor(list(depths) if depths is not None else range(n), dtype=F64)
    y = torch.tensor(list(lengths), dtype=F64).log()
    dx = x - x.mean()
    slope = float((dx * y).sum() / dx.square().sum())
    rest = y - y.mean() - slope * dx
    error = math.sqrt(float(rest.square().sum()) / (n - 2) / float(dx.square().sum())) if n > 2 else math.nan
    total = slope * float(x.max() - x.min())
    verdict = "exploding" if total > math.log(FOLD) else "vanishing" if total < -math.log(FOLD) else "steady"
    factor, fold = (math.exp(min(v, 700.0)) for v in (slope, total))
    return Propagation(factor=factor, factor_error=factor * error, fold=fold, layers=n, verdict=verdict)


def layer_moments(
    name: str, given: Any, made: Tensor, *, kind: str = "", depth: int = 0, rows: int = 32, positions: int = 128
) -> LayerMoments:
    """LayerMoments of one activation.

    Features are the last axis of (R, d) and (N, T, d), and the second of images (N, d, H, W).

    Args:
        name: of the module.
        given: its first input; of any other kind than a floating-point tensor, the gain is NaN.
        made: its output, examples first.
        kind: its class.
        depth: its place.
        rows: at most so many examples, the first ones, are used.
        positions: at most so many positions, evenly spaced over the whole batch, are used for the spread.

    Raises:
        ValueError: if the output has no axis of examples, or is empty.
    """
    if not made.ndim or not made.numel():
        raise ValueError(f"expected activations with examples first, got shape {tuple(made.shape)}")
    X_ND = made[:rows].reshape(min(rows, len(made)), -1)
    lengths_N, c_NN, mean = _lengths(X_ND)
    square = float(lengths_N.mean())
    length_error = float(lengths_N.std() / len(lengths_N) ** 0.5) if len(lengths_N) > 1 else math.nan
    correlation, correlation_error = _mean_pair(c_NN)
    before = _mean_square(given, rows)
    points_Rd = _positions(made, positions)
    usable = len(points_Rd) > 1 and bool(points_Rd.isfinite().all())
    return LayerMoments(
        name=name,
        kind=kind,
        depth=depth,
        length=square,
        length_error=length_error,
        correlation=correlation,
        correlation_error=correlation_error,
        gain=math.sqrt(square / before) if before else math.nan,
        mean=mean,
        variance=max(square - mean**2, 0.0),
        spread=spread(points_Rd) if usable else None,
    )


def depth_map(kept: Mapping[str, Sequence[tuple[Any, Any]]], *, rows: int = 32) -> DepthMap:
    """LayerMoments of activations that were captured: of each module, its first call.

    Args:
        kept: {module name: [(input, output) of each call]}, in order of depth.
        rows: at most so many examples are used.

    Example:
        >>> x = torch.tensor([[3.0, 4.0], [4.0, -3.0]])
        >>> row = depth_map({"double": [(x, 2 * x)]}).rows[0]
        >>> row.length, row.correlation, row.gain
        (50.0, 0.0, 2.0)
    """
    calls = [(name, found[0]) for name, found in kept.items() if found and isinstance(found[0][1], Tensor)]
    return DepthMap(tuple(layer_moments(n, a, b, depth=i, rows=rows) for i, (n, (a, b)) in enumerate(calls)))


def _wide(x: Tensor) -> Tensor:
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).to(F64)  # which has no float64


def _lengths(X_ND: Tensor, columns: int = 1 << 16) -> tuple[Tensor, Tensor, float]:
    """Mean square (N,) of each example, correlations (N, N), and mean; widened to float64 a piece at a time."""
    N, D = X_ND.shape
    q_NN, total = torch.zeros(N, N, dtype=F64, device=_wide(X_ND[:0]).device), 0.0
    for piece in X_ND.split(columns, dim=1):
        wide = _wide(piece)
        q_NN += wide @ wide.T / D
        total += float(wide.sum())
    q_N = q_NN.diagonal().clone()
    root = q_N.sqrt()
    return q_N, q_NN / torch.outer(root, root), total / X_ND.numel()


def _mean_pair(c_NN: Tensor) -> tuple[float, float]:
    """Mean over pairs of different examples, and its jackknife error; examples that are all zero have no correlation."""
    known = c_NN.diagonal().isfinite()
    c_NN = c_NN[known][:, known]
    n = len(c_NN)
    if n < 2:
        return math.nan, math.nan
    rows_N = c_NN.sum(dim=1) - c_NN.diagonal()
    mean = float(rows_N.sum() / (n * (n - 1)))
    if n < 3:
        return mean, math.nan
    without_N = (rows_N.sum() - 2 * rows_N) / ((n - 1) * (n - 2))
    return mean, float((without_N.var(correction=0) * (n - 1)).sqrt())


def _positions(made: Tensor, rows: int) -> Tensor:
    """(R, d): at most `rows` positions, evenly spaced."""
    made = made.movedim(1, -1) if made.ndim > 3 else made
    flat = made.reshape(-1, made.shape[-1]) if made.ndim > 1 else made[:, None]
    if len(flat) <= rows:
        return flat
    return flat[torch.linspace(0, len(flat) - 1, rows, device=flat.device).round().long()]


def _mean_square(x: Any, rows: int) -> float:
    """Of the first examples; NaN for what is no floating-point tensor."""
    if not (isinstance(x, Tensor) and x.is_floating_point() and x.ndim and x.numel()):
        return math.nan
    flat_ND = x[:rows].detach().reshape(min(rows, len(x)), -1)
    narrow = flat_ND.element_size() < 4  # half precision would overflow
    norms_N = torch.linalg.vector_norm(flat_ND, dim=1, dtype=torch.float32 if narrow else None)
    return float(_wide(norms_N).square().sum()) / flat_ND.numel()
