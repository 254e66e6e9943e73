"""The neural tangent kernel of a fixed batch as it moves in training: lazy or rich.

n examples, C outputs of one example, S directions in the space of outputs, P parameters. J_i (C, P): derivative of the outputs
of example i by the parameters. The kernel is summed over outputs: K_ij = tr(J_i J_j^T) = sum_c <J_ic, J_jc>.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from towtank.curvature.jacobian import Jacobian
from towtank.linalg.draws import as_generator, rademacher
from towtank.problem import Batch, Problem
from towtank.problem import data as source
from towtank.signals.step import CannotTell, Step

F64 = torch.float64
LAZY, RICH = 0.1, 0.5


@dataclass(frozen=True, eq=False)
class Kernel:
    """K (n, n) of the examples of a problem, summed over outputs.

    Args:
        parts_Snn: kernels whose mean is K: one that is exact, or one of each random direction.
        exact: whether all outputs were summed.
        convention: what was measured.
    """

    parts_Snn: Tensor
    exact: bool
    convention: str = ""

    @property
    def matrix(self) -> Tensor:
        """K (n, n)."""
        return self.parts_Snn.mean(dim=0)


@dataclass(frozen=True, kw_only=True)
class KernelMotion:
    """How far a kernel has moved.

    Args:
        drift: |K_t - K_0| / |K_0|, Frobenius.
        cosine: <K_t, K_0> / (|K_t| |K_0|): 1 where only the scale has changed.
        cka: the same of the centered kernels.
        alignment: centered alignment of K_t with the targets; None where targets do not vary.
        start_alignment: that of K_0.
        drift_error: standard error from the choice of random directions; 0 if all outputs were summed.
        alignment_error: the same of the alignment.
        verdict: "lazy" if the drift is below 0.1, "rich" if above 0.5, else "between".
    """

    drift: float
    cosine: float
    cka: float
    alignment: float | None
    start_alignment: float | None
    drift_error: float
    alignment_error: float
    verdict: Literal["lazy", "between", "rich"]

    def __str__(self) -> str:
        toward = "" if self.alignment is None else f", alignment {self.start_alignment:.3g} -> {self.alignment:.3g}"
        return f"{self.verdict}: kernel moved by {self.drift:.3g} of its norm, cosine {self.cosine:.4g}{toward}"


def gram(rows: Tensor, columns: int = 1 << 18) -> Tensor:
    """Rows rows^T in float64, widened a piece at a time so that no second copy of the rows is held.

    Args:
        rows: (n, P).
        columns: width of a piece.

    Example:
        >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        tensor([[5., 2.],
                [2., 1.]], dtype=torch.float64)
    """
    total = torch.zeros(len(rows), len(rows), dtype=F64, device=rows.device)
    for piece in rows.detach().split(columns, dim=1):
        wide = piece.to(F64)
        total += wide @ wide.T
    return total


def tangent_kernel(problem: Problem, *, directions: int | None = None, seed: int = 0) -> Kernel:
    """K_ij = tr(J_i J_j^T), exactly or from random directions u of signs: K_ij = E <J_i^T u, J_j^T u>.

    Each example goes through the network by itself, so that a backward pass costs that of one example; where examples are
    coupled (mode "train" with batch normalization) or cannot be told apart, the batch goes as a whole. The time is that of one
    forward and C (or `directions`) backward passes of the data; the memory is that of the graphs and n P numbers.

    Args:
        problem: model and data; the loss does not enter.
        directions: number of random directions; None: all C outputs.
        seed: of the directions, the same at every call so that kernels can be compared.

    Raises:
        ValueError: if examples differ in their number of outputs, or `directions` is less than 1.

    Example:
        A linear model of one output: K = X X^T.

        >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> problem = Problem(torch.nn.Linear(2, 1, bias=False), torch.nn.functional.mse_loss, (x, torch.zeros(2, 1)))
        >>> tangent_kernel(problem).matrix
        tensor([[5., 2.],
                [2., 1.]], dtype=torch.float64)

    Source: Jacot, Gabriel, Hongler 2018, section 4.
    """
    if directions is not None and directions < 1:
        raise ValueError(f"expected at least one direction, got {directions}; give None for all outputs")
    with problem.measuring():
        leaves = problem.leaves()
        pieces = [(Jacobian(problem, batch, leaves), m) for batch, m in _pieces(problem)]
        C = _outputs_each([(j.graph, m) for j, m in pieces])
        graph = pieces[0][0].graph
        if directions is None:
            u_SC = torch.eye(C, dtype=graph.dtype, device=graph.device)
        else:
            signs = rademacher(C, directions, as_generator(seed, graph.device), like=graph.dtype, device=graph.device)
            u_SC = signs.T
        parts_Snn = _kernels(pieces, u_SC, directions is None)
    how = f"{C} outputs" if directions is None else f"{directions} random directions of {C} outputs"
    return Kernel(parts_Snn, directions is None, f"neural tangent kernel summed over {how}: {problem.convention}")


def _kernels(pieces: list[tuple[Jacobian, int | None]], u_SC: Tensor, exact: bool) -> Tensor:
    parts = []
    for u_C in u_SC:
        part = gram(torch.stack([row for jacobian, m in pieces for row in _rows(jacobian, m, u_C)]))
        parts = [parts[0] + part] if exact and parts else [*parts, part]
    return torch.stack(parts)


def _pieces(problem: Problem) -> list[tuple[Batch, int | None]]:
    """Batches of one example each with 1, or whole batches with None, where the first axis of the outputs tells examples."""
    found: list[tuple[Batch, int | None]] = []
    for batch in problem.batches():
        m = source.examples(batch.raw) if problem.mode == "eval" and not problem.dropout else None
        if m is None:
            found.append((batch, None))
        else:
            found += [(replace(batch, raw=source.part(batch.raw, i, i + 1)), 1) for i in range(m)]
    return found


def _outputs_each(outputs: list[tuple[Tensor, int | None]]) -> int:
    """C, of every example alike.

    Raises:
        ValueError: if examples differ.
    """
    sizes = {z.numel() // (m or len(z)) for z, m in outputs}
    if len(sizes) != 1:
        raise ValueError(f"expected as many outputs of every example, got {sorted(sizes)}; pad or cut them alike")
    return sizes.pop()


def _rows(jacobian: Jacobian, m: int | None, u_C: Tensor) -> list[Tensor]:
    """J_i^T u (P,) of the examples of a piece."""
    z = jacobian.graph
    rows = []
    for i in range(m or len(z)):
        u = torch.zeros(m or len(z), len(u_C), dtype=z.dtype, device=z.device)
        u[i] = u_C
        rows.append(jacobian.transposed(u.view(z.shape)))
    return rows


def cosine(K: Tensor, L: Tensor) -> float:
    """<K, L> / (|K| |L|), Frobenius; NaN if either is zero.

    Example:
        >>> round(cosine(torch.eye(2), torch.ones(2, 2)) ** 2, 12)
        0.5
    """
    K, L = K.to(F64), L.to(F64)
    norm = float(K.norm() * L.norm())
    return float((K * L).sum()) / norm if norm else float("nan")


def cka(K: Tensor, L: Tensor) -> float:
    """Centered alignment of two kernels: cosine(H K H, H L H) with H = I - 1 1^T / n, between 0 and 1.

    Args:
        K: (n, n), positive semidefinite.
        L: (n, n), positive semidefinite.

    Raises:
        ValueError: if shapes differ.
        CannotTell: if a kernel is not finite.

    Example:
        >>> y = torch.tensor([[1.0], [-1.0], [1.0]])
        >>> round(cka(y @ y.T, 5 + 3 * y @ y.T), 12)
        1.0

    Source: Cortes, Mohri, Rostamizadeh 2012, section 2; Kornblith et al. 2019, section 3.
    """
    if K.shape != L.shape or K.ndim != 2:
        raise ValueError(f"expected two kernels (n, n), got {tuple(K.shape)} and {tuple(L.shape)}")
    if not (bool(K.isfinite().all()) and bool(L.isfinite().all())):
        raise CannotTell("expected finite kernels, got NaN or infinity")
    centered = [_centered(A) for A in (K, L)]
    rounding = torch.finfo(F64).eps * len(K)
    if any(float(c.norm()) <= rounding * float(A.to(F64).norm()) for c, A in zip(centered, (K, L))):
        return float("nan")  # constant: nothing but rounding is left
    return cosine(*centered)


def _centered(A: Tensor) -> Tensor:
    A = A.to(F64)
    A = A - A.mean(dim=0)
    return A - A.mean(dim=1, keepdim=True)


def target_kernel(targets: Tensor) -> Tensor:
    """Y Y^T (n, n) of targets (n, ...); of class indices (n,) that of their one-hot vectors.

    Example:
        >>> target_kernel(torch.tensor([2, 0, 2]))
        tensor([[1., 0., 1.],
                [0., 1., 0.],
                [1., 0., 1.]], dtype=torch.float64)
    """
    if targets.is_floating_point():
        return gram(targets.reshape(len(targets), -1))
    flat = targets.reshape(len(targets), -1)
    return (flat[:, None, :] == flat[None, :, :]).to(F64).sum(dim=-1)


def compare_kernels(now: Kernel, start: Kernel, targets: Tensor | None = None) -> KernelMotion:
    """How far a kernel has moved since the start of training, and whether toward the targets.

    Drift eps means that the rates at which errors shrink, the eigenvalues of K, have changed by up to about eps, and with
    them the error of the model linearized at the start. The two limits of the verdict, 0.1 and 0.5, are conventions. A kernel
    that moved is needed for rich learning; it does not prove it.

    Args:
        now: K_t.
        start: K_0, of the same examples and directions.
        targets: (n, ...) values, or class indices (n,).

    Raises:
        ValueError: if the kernels are of different examples or directions.
        CannotTell: if K_0 is zero or a kernel is not finite.

    Example:
        >>> start = Kernel(torch.eye(2)[None], exact=True)
        >>> print(compare_kernels(Kernel(torch.tensor([[[1.0, -0.6], [-0.6, 1.0]]]), exact=True), start))
        rich: kernel moved by 0.6 of its norm, cosine 0.8575

    Source: Chizat, Oyallon, Bach 2019, section 1; Kumar et al. 2023, "Grokking as the transition from lazy to rich".
    """
    a, b = now.parts_Snn.to(F64), start.parts_Snn.to(F64)
    if a.shape != b.shape or now.exact != start.exact:
        raise ValueError(
            f"expected kernels of the same examples and directions, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise CannotTell("expected finite kernels, got NaN or infinity")
    if not float(b.mean(0).norm()):
        raise CannotTell("expected a kernel at the start that is not zero, got zero: no parameter moved the outputs")
    drift = _drift(a.mean(0), b.mean(0))
    y = None if targets is None else target_kernel(targets)
    aligned, first = (None if y is None else _number(cka(K, y)) for K in (a.mean(0), b.mean(0)))
    return KernelMotion(
        drift=drift,
        cosine=cosine(a.mean(0), b.mean(0)),
        cka=cka(a.mean(0), b.mean(0)),
        alignment=aligned,
        start_alignment=first,
        drift_error=0.0 if now.exact else _jackknife(_drift, a, b),
        alignment_error=0.0 if now.exact or y is None or aligned is None else _jackknife(lambda K: cka(K, y), a),
        verdict="lazy" if drift < LAZY else "rich" if drift > RICH else "between",
    )


def _drift(now: Tensor, start: Tensor) -> float:
    return float((now - start).norm() / start.norm())


def _number(x: float) -> float | None:
    return None if x != x else x


def _jackknife(of: Callable[..., float], *parts: Tensor) -> float:
    """Standard error of a function of means over S parts, from leaving out one at a time; NaN for one part."""
    S = len(parts[0])
    if S < 2:
        return float("nan")
    values = torch.tensor([of(*((p.sum(0) - p[s]) / (S - 1) for p in parts)) for s in range(S)], dtype=F64)
    return float((values.var(correction=0) * (S - 1)).sqrt())


@dataclass(frozen=True, kw_only=True)
class KernelDrift:
    """Motion of the tangent kernel on the probe batch: "representation/ntk_drift", "ntk_cosine", "ntk_alignment".

    The first call keeps K_0 (n, n): it is the kernel of that step, so let the probe be due at the first one. Errors stand
    beside the numbers where random directions are used. The alignment is left out where targets do not vary.

    Args:
        examples: at most so many of the probe batch are used.
        outputs: at most so many backward passes of them; models with more outputs are seen through as many random directions.
        seed: of the directions.
    """

    examples: int = 32
    outputs: int = 16
    seed: int = 0

    def cost(self, problem: Problem) -> float:
        """One forward and as many backward passes of the examples as there are directions, in gradients of the probe batch.

        That is the arithmetic; examples go one at a time, which on small networks takes a few times longer.

        Args:
            problem: on the probe batch.
        """
        own = self._part(problem)
        return (1 + 2 * (self._directions(own) or _count(own))) / 3 * own.survey.total / problem.survey.total

    def __call__(self, step: Step) -> dict[str, float]:
        """Readings of a step.

        Raises:
            CannotTell: if the probe batch is not that of the first call, or a kernel is not finite.
        """
        own = step.shared(f"ntk/problem/{self.examples}", lambda: self._part(step.problem))
        now = tangent_kernel(own, directions=self._directions(own), seed=self.seed)
        start = step.kept.setdefault(f"ntk/start/{self.examples}/{self.outputs}/{self.seed}", now)
        if start.parts_Snn.shape != now.parts_Snn.shape:
            raise CannotTell("expected the probe batch of the first call, got one of another size; keep it fixed")
        found = compare_kernels(now, start, _targets(own, now.parts_Snn.shape[-1]))
        readings = {"ntk_drift": found.drift, "ntk_cosine": found.cosine}
        readings |= {} if found.alignment is None else {"ntk_alignment": found.alignment}
        if not now.exact:
            readings["ntk_drift_error"] = found.drift_error
            readings |= {} if found.alignment is None else {"ntk_alignment_error": found.alignment_error}
        return {f"representation/{key}": value for key, value in readings.items()}

    def _part(self, problem: Problem) -> Problem:
        """The problem on the first examples of its first batch."""
        raw = next(problem.batches()).raw
        few = source.cut(raw, min(self.examples, source.examples(raw) or self.examples))
        return problem.replace(data=raw if few is None else few, checks=False)

    def _directions(self, problem: Problem) -> int | None:
        return None if _count(problem) <= self.outputs else self.outputs


def _count(problem: Problem) -> int:
    """C, from a forward pass of one example."""
    with problem.measuring(), torch.no_grad():
        batch, m = _pieces(problem)[0]
        return _outputs_each([(problem.outputs(batch), m)])


def _targets(problem: Problem, n: int) -> Tensor | None:
    """Targets (n, ...), or None where they are no tensor or do not tell examples apart."""
    targets = next(problem.batches()).targets
    return targets if isinstance(targets, Tensor) and targets.ndim and len(targets) == n else None


def kernel_drift(examples: int = 32, outputs: int = 16, seed: int = 0) -> KernelDrift:
    """The probe of the tangent kernel; see `KernelDrift`.

    Args:
        examples: at most so many of the probe batch are used.
        outputs: at most so many backward passes of them.
        seed: of the random directions.
    """
    return KernelDrift(examples=examples, outputs=outputs, seed=seed)
