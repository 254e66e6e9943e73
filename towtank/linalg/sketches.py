"""A growing sketch of an operator's range with its leave-one-out quantities: what XTrace and XDiag share.

P: dimension; m: test vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from towtank.linalg.draws import dots
from towtank.linalg.products import Products
from towtank.linalg.sampling import Running


class Sketch:
    """Omega (P, m), Y = A Omega = Q R, and A Q, extended by new test vectors without repeating a product.

    Leaving test vector i out of the sketch turns the projector Q Q^T into Q (I - s_i s_i^T) Q^T, with s_i the normalized
    column i of R^-T; so m leave-one-out estimates cost no more than one.

    Source: Epperly, Tropp and Webber 2024, "XTrace: making the most of every sample", section 4.
    """

    def __init__(self, A: Products) -> None:
        self.A = A
        empty = torch.empty(A.op.shape[0], 0, dtype=A.op.dtype, device=A.op.device)
        self.Omega = self.Q = self.AQ = empty
        self.R = torch.empty(0, 0, dtype=torch.float64)

    @property
    def m(self) -> int:
        """How many test vectors there are."""
        return len(self.R)

    def grow(self, Omega: Tensor) -> None:
        """Add test vectors, the columns of (P, k): 2 k products."""
        k, Y = Omega.shape[1], self._multiply(Omega)
        overlap = torch.zeros(self.m, k, dtype=torch.float64)
        for _ in range(2):
            found = self.Q.T @ Y
            Y = Y - self.Q @ found
            overlap += found.double().cpu()
        Q, R = torch.linalg.qr(Y)
        for _ in range(2):  # where Y has no rank left, QR's columns are arbitrary: make them orthogonal to the rest
            Q = torch.linalg.qr(Q - self.Q @ (self.Q.T @ Q))[0]
        R = (Q.T @ Y).double().cpu().triu()
        top = torch.cat([self.R, overlap], dim=1)
        bottom = torch.cat([torch.zeros(k, self.m, dtype=torch.float64), R], dim=1)
        self.R = torch.cat([top, bottom])
        self.Q = torch.cat([self.Q, Q], dim=1)
        self.AQ = torch.cat([self.AQ, self._multiply(Q)], dim=1)
        self.Omega = torch.cat([self.Omega, Omega], dim=1)

    @property
    def spans(self) -> bool:
        """Whether Q holds the whole range of A, to rounding: then Q Q^T A = A and nothing is left to estimate."""
        if self.m >= self.A.op.shape[0]:
            return True
        size = self.R.diagonal().abs()
        return bool(size.min() <= 100 * torch.finfo(self.Q.dtype).eps * size.max())

    def small(self) -> Small:
        """The sketch as seen from inside its range."""
        H = (self.Q.T @ self.AQ).double().cpu()
        W = (self.Q.T @ self.Omega).double().cpu()
        return Small(
            len(self.Q), W, (H + H.T) / 2, self.R, dots(self.Omega, self.Omega), torch.eye(self.m, dtype=torch.float64)
        )

    def _multiply(self, X: Tensor) -> Tensor:
        return torch.cat([self.A(x[:, None]) for x in X.T], dim=1)


@dataclass(frozen=True)
class Small:
    """What leave-one-out estimates need of a sketch: no vector of P numbers.

    Args:
        P: dimension.
        W: Q^T Omega, (m, m).
        H: Q^T A Q, (m, m).
        R: of Y = Q R, (m, m).
        lengths: |omega_i|^2, (m,).
        rotation: what turned the sketch's Q into this one's, (m of the sketch, m).
    """

    P: int
    W: Tensor
    H: Tensor
    R: Tensor
    lengths: Tensor
    rotation: Tensor

    @property
    def m(self) -> int:
        """How many test vectors there are."""
        return len(self.lengths)

    def left_out(self) -> Tensor:
        """s_i as columns (m, m)."""
        eye = torch.eye(self.m, dtype=torch.float64)
        S = torch.linalg.solve_triangular(self.R.T, eye, upper=False)
        return S / torch.linalg.vector_norm(S, dim=0)

    def without(self, j: int) -> Small:
        """The sketch that would have been without test vector j: Y loses a column, and Q turns."""
        rest = [i for i in range(self.m) if i != j]
        turn, R = torch.linalg.qr(self.R[:, rest])
        return Small(self.P, turn.T @ self.W[:, rest], turn.T @ self.H @ turn, R, self.lengths[rest], turn)


def jackknife(without: Tensor) -> Tensor:
    """Standard error of an estimate from its values without each of m observations, (m, ...).

    sqrt((m - 1) / m sum_j (T_j - mean)^2), widened for small m and for skewness. On average not too small, whatever the
    estimate.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
        >>> plain = x.std() / 2
        >>> print(round(float(jackknife((x.sum() - x) / 3) / plain), 2) >= 1.0)
        True

    Source: Efron and Stein 1981, "The jackknife estimate of variance", theorem 2.
    """
    m = len(without)
    spread = Running()
    spread.add(-without)  # a large observation makes a small value without it
    return spread.stderr * (m - 1)


def shared_error(scatter: Tensor, jackknifed: Tensor) -> Tensor:
    """Standard error of the mean of leave-one-out estimates: the geometric mean of two that enclose it.

    The estimates share their sketches, so their scatter, as if they were independent, is too small. The jackknife is too
    large (Efron and Stein's inequality): without a vector the sketch is worse. Over spectra from flat to decaying by a
    fifth each step, and 200 seeds, the first covers the truth within two errors in 80 to 92 % of cases, the second in 98
    to 100 %.
    """
    return (scatter * torch.maximum(scatter, jackknifed)).sqrt()
