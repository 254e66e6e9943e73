"""A growing Krylov basis with its projected matrix: what `eigsh` and `spectral_density` share.

P: dimension; n: basis vectors; d: those already multiplied. Basis vectors are the rows of one matrix, so that a
Gram-Schmidt pass is two matrix-vector products. All coefficients are float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from towtank.linalg.draws import dot, norm

_FULL_BELOW = 8  # as long as the basis is this small, a full pass costs next to nothing and calibrates the prediction


class Krylov:
    """Orthonormal rows Q (n, P) and H (n, d) with A Q[:d]^T = Q^T H up to rounding.

    Multiplying A q_j and removing what lies in the basis gives the next vector. In exact arithmetic only the last few
    vectors need to be removed (three-term recurrence); in floating point the new vector then drifts towards converged
    eigenvectors, which return as false copies. `slack` says how much drift is let by before it is removed: with 0 every
    step makes a Gram-Schmidt pass over the whole basis; else the overlaps Q q_{n+1} are predicted by the recurrence

        Q A q_j = H^T (Q Q^T) e_j    minus    (Q Q^T) H e_j    plus rounding,

    and only the leading rows whose predicted overlap exceeds `slack` are passed over. With slack = sqrt(eps) the
    projected matrix is that of an orthonormal basis up to eps. A second pass follows when the first one shrank the
    vector tenfold. With several start vectors this is the block (band) method; after `restart` the thick-restart one.

    Args:
        apply: product with columns (P, K).
        start: independent start vectors, the rows of (b, P).
        capacity: largest n.
        slack: largest overlap of basis vectors let by, 0 for full orthogonalization.

    Sources: Lanczos 1950; Simon 1984, "The Lanczos algorithm with partial reorthogonalization", eq. 2.11; Wu and Simon
    2000 (thick restart); Giraud et al. 2005 (two passes are enough).
    """

    def __init__(self, apply: Callable[[Tensor], Tensor], start: Tensor, *, capacity: int, slack: float = 0.0) -> None:
        self.apply, self.slack = apply, slack
        P = start.shape[1]
        self.Q = start.new_empty(min(capacity, P), P)
        rows = len(self.Q) + len(start)
        self.H = torch.zeros(rows, len(self.Q), dtype=torch.float64)
        self.G = torch.eye(rows, dtype=torch.float64)  # predicted Q Q^T
        self.n = self.done = 0
        self.scale = 0.0  # largest |A q| seen
        self.noise = float(torch.finfo(start.dtype).eps)  # error of a predicted overlap, in units of scale
        for row in start:
            self.add(row)

    @property
    def complete(self) -> bool:
        """Whether the space is invariant: every basis vector was multiplied and nothing new came of it."""
        return self.done == self.n

    @property
    def full(self) -> bool:
        """Whether another block might not fit, and there is more of the space than is held."""
        return 2 * self.n - self.done > len(self.Q) and len(self.Q) < self.Q.shape[1]

    def add(self, start: Tensor) -> bool:
        """Begin a new direction from a vector (P,); False if it lies in the basis or there is no room."""
        if self.n == len(self.Q):
            return False
        w, before = start.clone(), norm(start)
        for _ in range(2):
            self._remove(w, slice(0, self.n))
        length = norm(w)
        return self._append(w, length, length > 100 * torch.finfo(w.dtype).eps * before)

    def expand(self) -> None:
        """Multiply the basis vectors not yet multiplied, as one block, and append what is new in the products."""
        for w in self.apply(self.Q[self.done : self.n].T).T:
            self._absorb(w.contiguous())

    def projected(self) -> Tensor:
        """Q A Q^T of the multiplied vectors, symmetric (d, d)."""
        T = self.H[: self.done, : self.done]
        return (T + T.T) / 2

    def restart(self, theta: Tensor, S: Tensor) -> None:
        """Keep only the Ritz pairs theta (p,), S (d, p), and the vectors not yet multiplied."""
        p, rest = len(theta), self.n - self.done
        coupling = self.H[self.done : self.n, : self.done] @ S
        _rotate_rows(self.Q, S, rest)
        self.H.zero_()
        self.H[:p, :p] = torch.diag(theta)
        self.H[p : p + rest, :p] = coupling
        self.G = torch.eye(len(self.G), dtype=torch.float64)
        self.done, self.n = p, p + rest

    def vectors(self, S: Tensor) -> Tensor:
        """The vectors Q^T S (P, k) of coefficients S (d, k)."""
        return self.Q[: self.done].T @ S.to(self.Q.device, self.Q.dtype)

    def state(self) -> dict[str, Tensor]:
        """All that a later process needs to go on, as tensors; the basis is not copied."""
        numbers = torch.tensor([self.n, self.done, self.scale, self.noise, self.slack], dtype=torch.float64)
        return {"Q": self.Q[: self.n], "H": self.H, "G": self.G, "numbers": numbers}

    @classmethod
    def resumed(cls, apply: Callable[[Tensor], Tensor], state: dict[str, Tensor], like: Tensor) -> Krylov:
        """The basis of a `state`, to go on bit for bit; `like` tells device and dtype."""
        new = cls.__new__(cls)
        new.apply = apply
        new.H, new.G = state["H"].clone(), state["G"].clone()
        n, done, new.scale, new.noise, new.slack = state["numbers"].tolist()
        new.n, new.done = int(n), int(done)
        new.Q = like.new_empty(new.H.shape[1], state["Q"].shape[1])
        new.Q[: new.n] = state["Q"].to(like)
        return new

    def _absorb(self, w: Tensor) -> None:
        """Column of H for A q_j = w, and the next basis vector from what remains of w."""
        j, n = self.done, self.n
        known = self.H[j, :j]
        nonzero = known.nonzero()
        low = int(nonzero[0]) if len(nonzero) else j
        self.H[low:j, j] = known[low:]
        before = norm(w)
        self.scale = max(self.scale, before)
        self._subtract(w, slice(low, j))
        for i in range(j, n):
            self.H[i, j] = dot(self.Q[i], w)
            self._subtract(w, slice(i, i + 1))
        self.done += 1
        if n == len(self.Q) < self.Q.shape[1]:
            self.H[n, j] = norm(w)  # no room for another vector, nor need
            return
        self._orthogonalize(w, j)

    def _orthogonalize(self, w: Tensor, j: int) -> None:
        n, length = self.n, norm(w)
        overlaps, rows = self._predicted(j, length)
        for _ in range(3):
            if not rows:
                break
            found = self._remove(w, slice(0, rows))
            self.H[:rows, j] += found
            before, length = length, norm(w)
            self._calibrate(found, overlaps[:rows])
            overlaps[:rows] = torch.finfo(w.dtype).eps * before
            if length > 0.1 * before:
                break
        fresh = length > 8 * torch.finfo(w.dtype).eps * self.scale and n < self.Q.shape[1]
        self.H[n, j] = length
        if self._append(w, length, fresh):
            self.G[n, :n] = self.G[:n, n] = overlaps / length

    def _predicted(self, j: int, length: float) -> tuple[Tensor, int]:
        """Overlaps of w with the basis (n,), and how many leading rows overlap too much."""
        n, d = self.n, self.done
        if not self.slack:
            return torch.zeros(n, dtype=torch.float64), n
        overlaps = torch.zeros(n, dtype=torch.float64)
        overlaps[:d] = self.H[:n, :d].T @ self.G[:n, j] - self.G[:d, :n] @ self.H[:n, j]
        overlaps[j:] = 0.0
        overlaps += torch.where(overlaps < 0, -1.0, 1.0) * self.noise * self.scale
        risky = (overlaps.abs() > self.slack * length).nonzero()
        return overlaps, n if n <= _FULL_BELOW else int(risky[-1]) + 1 if len(risky) else 0

    def _calibrate(self, found: Tensor, predicted: Tensor) -> None:
        """The rounding of products is the operator's own: learn it from overlaps that were seen."""
        if self.slack and self.scale:
            worst = float((found.abs() - predicted.abs()).max()) / self.scale
            self.noise = max(self.noise, worst)

    def _subtract(self, w: Tensor, rows: slice) -> None:
        if rows.stop - rows.start == 1:
            w.sub_(self.Q[rows.start], alpha=float(self.H[rows.start, self.done]))
        elif rows.stop > rows.start:
            w.addmv_(self.Q[rows].T, self.H[rows, self.done].to(w.device, w.dtype), alpha=-1)

    def _remove(self, w: Tensor, rows: slice) -> Tensor:
        found = self.Q[rows] @ w
        w.addmv_(self.Q[rows].T, found, alpha=-1)
        return found.double().cpu()

    def _append(self, w: Tensor, length: float, fresh: bool) -> bool:
        if fresh:
            torch.mul(w, 1 / length, out=self.Q[self.n])
            self.n += 1
        return fresh


def _rotate_rows(Q: Tensor, S: Tensor, rest: int, columns: int = 2**18) -> None:
    """Replace the leading rows of Q by S^T Q, a run of columns at a time, and move the `rest` behind them."""
    d, p = S.shape
    rotation = S.T.to(Q.device, Q.dtype)
    for part in Q.split(columns, dim=1):
        part[:p] = rotation @ part[:d]
        part[p : p + rest] = part[d : d + rest].clone()
