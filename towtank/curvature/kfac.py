"""K-FAC and EK-FAC: Kronecker-factored approximations of the Gauss-Newton matrix, with exact damped inverses.

For a layer whose gradient is sum_r rho_r kappa_r^T (see `captures`), K-FAC takes the block as A (x) B with the second moments
A of rho and B of kappa, as if the two were independent. EK-FAC keeps the eigenvectors of A (x) B and measures its spectrum:
the second moments of the gradients in that basis, so that no other spectrum in the basis is closer in Frobenius norm.

Decisions:
- A weight used by several modules (embedding and head, say) has the sum of their blocks, in the eigenbasis of its partial
  traces; for one use this is K-FAC itself. The sum has the exact trace of its parts, and its inverse stays exact.
- Positions that the loss does not see (padding) have no part in the factors, so padding changes nothing.
- Parameters of other layers are refused by name, not dropped: a missing block would be a wrong matrix. Scales and biases of
  normalization layers are taken as exact diagonals of the Gauss-Newton matrix, if asked by `rest="diagonal"`, because their
  exact blocks are no Kronecker products. LSTM, grouped convolution and bare parameters are always refused.
- The captured vectors are checked once: their outer products must give the gradient that autograd gives.

E examples, R positions, m, n: shape of a weight, K: outputs of one example.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from towtank.curvature.captures import Layer, Rest, Sides
from towtank.curvature.kronecker import KroneckerBlock, KroneckerOperator
from towtank.curvature.passes import Kind, Passes, gradients
from towtank.problem import Batch, Problem

Sharing = Literal["expand", "reduce"]
LARGEST = 8192  # most rows of a factor whose eigenvectors are computed
CHUNK = 2**24  # numbers in the gradients of single examples that are held at once


class KFAC(KroneckerOperator):
    """K-FAC: each layer's Gauss-Newton block as A (x) B.

    Args:
        problem: model, loss and data.
        kind: "exact", a backward pass for each output of an example; "sampled", for labels drawn from the model;
            "empirical", for the given labels.
        sharing: for weights used at many positions of an example. "expand" counts each position as an example by itself
            (right for a loss of every position); "reduce" sums gradients and averages inputs over positions first (right
            for a loss of their mean).
        samples: draws of the labels for "sampled".
        rest: see above.
        generator: of the labels, or a seed.

    Raises:
        NotImplementedError: if a parameter cannot be treated; its name is in the message.
        ValueError: if an example has too many outputs for "exact", or the loss is not convex in the outputs.

    Example:
        A linear layer under squared error, where K-FAC is exact: G = 2 mean x^2.

        >>> x = torch.tensor([[1.0], [3.0]])
        >>> problem = Problem(torch.nn.Linear(1, 1, bias=False), torch.nn.functional.mse_loss, (x, torch.zeros(2, 1)))
        >>> KFAC(problem).inverse(0.0) @ torch.ones(1)
        tensor([0.1000])

    Source: Martens, Grosse 2015; expand and reduce: Eschenhagen et al. 2023, section 3.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        kind: Kind = "exact",
        sharing: Sharing = "expand",
        samples: int = 1,
        rest: Rest = None,
        generator: torch.Generator | int | None = None,
    ) -> None:
        passes = Passes(problem, kind, samples, rest, generator)
        blocks = _kfac_blocks(passes, sharing)
        super().__init__(blocks, slices=problem.slices, convention=_convention("K-FAC", problem, kind, sharing))
        self.problem = problem


class EKFAC(KroneckerOperator):
    """EK-FAC: the eigenbasis of K-FAC with the exact second moments of the examples' gradients in it.

    With `kind="exact"` its trace is that of the Gauss-Newton matrix. The first axis of every layer's input must run over
    examples.

    Args:
        problem: model, loss and data.
        kind: as for `KFAC`.
        sharing: as for `KFAC`, of the basis.
        samples: as for `KFAC`.
        rest: as for `KFAC`.
        generator: of the labels, or a seed.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> EKFAC(Problem(model, torch.nn.functional.mse_loss, (x, torch.zeros(2, 1)))).dense()
        tensor([[1., 0.],
                [0., 4.]])

    Source: George et al. 2018, equation 9.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        kind: Kind = "exact",
        sharing: Sharing = "expand",
        samples: int = 1,
        rest: Rest = None,
        generator: torch.Generator | int | None = None,
    ) -> None:
        passes = Passes(problem, kind, samples, rest, generator)
        blocks = _corrected(passes, _kfac_blocks(passes, sharing))
        super().__init__(blocks, slices=problem.slices, convention=_convention("EK-FAC", problem, kind, sharing))
        self.problem = problem


def _convention(name: str, problem: Problem, kind: Kind, sharing: Sharing) -> str:
    return f"{name} ({kind}, {sharing}) of the Gauss-Newton matrix of the {problem.convention}"


# Pass 1: factors


class _Factors:
    """Sums of second moments of one use: of the gradient's side over all passes, of the other side over positions."""

    def __init__(self) -> None:
        self.gradient: Tensor | None = None
        self.given: Tensor | None = None
        self.count = 0
        self.gradient_is_rho = True

    def finished(self) -> tuple[Tensor, Tensor]:
        """A and B; a vector stands for a diagonal."""
        assert self.gradient is not None and self.given is not None
        given = self.given / max(1, self.count)
        return (self.gradient, given) if self.gradient_is_rho else (given, self.gradient)


def _kfac_blocks(passes: Passes, sharing: Sharing) -> list[KroneckerBlock]:
    if sharing not in ("expand", "reduce"):
        raise ValueError(f'expected sharing "expand" or "reduce", got {sharing!r}')
    reduce = sharing == "reduce"
    factors: dict[tuple[int, int], _Factors] = {}
    latest: dict[tuple[int, int], tuple[Sides, Tensor]] = {}  # of the batch: which positions any pass has seen
    plain: dict[int, Tensor] = {}

    def visit(place: int, shown: list[Sides], batch: Batch) -> None:
        if passes.layers[place].plain:
            return
        for index, s in enumerate(shown):
            key = place, index
            seen = latest[key][1] | s.seen if key in latest else s.seen
            latest[key] = s, seen
            made = factors.setdefault(key, _Factors())
            made.gradient_is_rho = s.gradient_is_rho
            g = s.rho if s.gradient_is_rho else s.kappa
            moment = batch.weight * _moment(g.sum(1) if reduce else g.flatten(0, 1))
            made.gradient = moment if made.gradient is None else made.gradient + moment

    def done(batch: Batch) -> None:
        for (place, index), (s, seen) in latest.items():
            rows = passes.layers[place].shape[0]
            moment, count = _given_moment(s, seen, rows, reduce)
            made = factors[place, index]
            made.given = moment if made.given is None else made.given + moment
            made.count += count
        latest.clear()

    passes.walk(grouped=reduce, visit=visit, done=done)
    if any(layer.plain for layer in passes.layers):
        plain = _second_moments(passes, {i: (None, None) for i, layer in enumerate(passes.layers) if layer.plain})
    return [_block(passes, i, layer, factors, plain) for i, layer in enumerate(passes.layers)]


def _block(
    passes: Passes, place: int, layer: Layer, factors: dict[tuple[int, int], _Factors], plain: dict[int, Tensor]
) -> KroneckerBlock:
    if place in plain:
        return KroneckerBlock(names=layer.names, left=None, right=None, spectrum=plain[place])
    pairs = [factors[key].finished() for key in sorted(factors) if key[0] == place]
    if not pairs:  # a layer that the forward pass does not use
        zeros = torch.zeros(layer.shape, dtype=passes.problem.dtype, device=passes.problem.device)
        return KroneckerBlock(names=layer.names, left=None, right=None, spectrum=zeros)
    left = _basis(_added([(A, _trace(B)) for A, B in pairs]), layer)
    right = _basis(_added([(B, _trace(A)) for A, B in pairs]), layer)
    spectrum = sum(torch.outer(_within(A, left), _within(B, right)) for A, B in pairs)
    dtype = passes.problem.dtype
    return KroneckerBlock(
        names=layer.names,
        left=None if left is None else left.to(dtype),
        right=None if right is None else right.to(dtype),
        spectrum=torch.as_tensor(spectrum).clamp(min=0).to(dtype),
    )


def _moment(x: Tensor) -> Tensor:
    return x.T @ x


def _given_moment(s: Sides, seen: Tensor, rows: int, reduce: bool) -> tuple[Tensor, int]:
    """Sum of second moments of what the layer was given, over the positions that were seen, and their number."""
    x = s.kappa if s.gradient_is_rho else s.rho
    tokens = not x.is_floating_point()
    if not reduce:
        return (torch.bincount(x[seen], minlength=rows).to(s.kappa) if tokens else _moment(x[seen])), int(seen.sum())
    share = seen / seen.sum(1, keepdim=True).clamp(min=1)
    if tokens:
        means = torch.zeros(len(x), rows, dtype=s.kappa.dtype, device=x.device).scatter_add_(1, x, share.to(s.kappa))
    else:
        means = torch.einsum("er,ern->en", share.to(x), x)
    return _moment(means), int(seen.any(1).sum())


def _added(terms: list[tuple[Tensor, float]]) -> Tensor:
    """Weighted sum of factors, a vector only if all are diagonal."""
    if all(F.ndim == 1 for F, _ in terms):
        return torch.stack([w * F.double() for F, w in terms]).sum(0)
    return torch.stack([w * (torch.diag(F) if F.ndim == 1 else F).double() for F, w in terms]).sum(0)


def _basis(factor: Tensor, layer: Layer) -> Tensor | None:
    """Eigenvectors in float64; None for those of a diagonal factor."""
    if factor.ndim == 1:
        return None
    if len(factor) > LARGEST:
        raise NotImplementedError(
            f"expected factors of at most {LARGEST} rows, got {len(factor)} for {' and '.join(layer.names)}; leave it out by "
            "Problem(..., params=...)"
        )
    return torch.linalg.eigh((factor + factor.T) / 2)[1]


def _trace(factor: Tensor) -> float:
    return float((factor if factor.ndim == 1 else factor.diagonal()).double().sum())


def _within(factor: Tensor, basis: Tensor | None) -> Tensor:
    """The diagonal of a factor in a basis."""
    factor = factor.double()
    if basis is None:
        return factor if factor.ndim == 1 else factor.diagonal()
    if factor.ndim == 1:
        return factor @ basis.square()
    return ((factor @ basis) * basis).sum(0)


# Pass 2: second moments in a basis


def _corrected(passes: Passes, blocks: list[KroneckerBlock]) -> list[KroneckerBlock]:
    spectra = _second_moments(passes, {i: (b.left, b.right) for i, b in enumerate(blocks)})
    return [
        KroneckerBlock(names=b.names, left=b.left, right=b.right, spectrum=spectra[i]) for i, b in enumerate(blocks)
    ]


def _second_moments(passes: Passes, bases: dict[int, tuple[Tensor | None, Tensor | None]]) -> dict[int, Tensor]:
    """Sums over batches, passes and examples of the squared gradients in the bases of some layers."""
    problem = passes.problem
    sums = {i: torch.zeros(passes.layers[i].shape, dtype=problem.dtype, device=problem.device) for i in bases}

    def visit(place: int, shown: list[Sides], batch: Batch) -> None:
        if place not in bases or not shown:
            return
        left, right = bases[place]
        turned = [Sides(_turned(s.rho, left), _turned(s.kappa, right), s.gradient_is_rho) for s in shown]
        m, n = passes.layers[place].shape
        step = max(1, CHUNK // (m * n))
        for first in range(0, len(turned[0].kappa), step):
            part = [
                Sides(s.rho[first : first + step], s.kappa[first : first + step], s.gradient_is_rho) for s in turned
            ]
            sums[place] += batch.weight * _squares(passes.layers[place], part)

    passes.walk(grouped=True, visit=visit)
    return sums


def _squares(layer: Layer, shown: list[Sides]) -> Tensor:
    """Sum over examples of the squared gradients (m, n)."""
    if len(shown) == 1 and shown[0].kappa.shape[1] == 1 and shown[0].rho.is_floating_point():
        return shown[0].rho[:, 0].square().T @ shown[0].kappa[:, 0].square()
    return gradients(layer, shown).square().sum(0)


def _turned(x: Tensor, basis: Tensor | None) -> Tensor:
    """The vectors in a basis, x Q; row numbers of one-hot vectors pick rows of Q."""
    if basis is None:
        return x
    return x @ basis if x.is_floating_point() else basis[x]
