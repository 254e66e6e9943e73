"""The sum of the multi-power law over all past steps, with few terms: far steps in blocks, near steps one by one.

Capitals in names of arrays: R rows, K changes of the rate, Q nodes (ragged, by row).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from towtank.laws.table import Floats, Ints

OPEN = 0.4  # a block is summed as two nodes where its length is below this share of its distance ...
LOGS = 1.5  # ... and its extent in log eta below this many times the share: eta enters by a small power only
TINY = 1e-60  # rate zero, as a share of the peak: C eta^-gamma x is then finite, huge where x > 0 and 0 where x = 0


@dataclass(frozen=True)
class Nodes:
    """For each row t, sum over k <= t of d_k g(eta_k, S(t) - S(k-1)) as a shorter sum over nodes.

    Args:
        first: where the nodes of each row begin, shape (R,); rows without nodes are not in `filled`.
        filled: the rows that have nodes.
        weight: sum of the d_k that a node stands for.
        log_rate: log eta at the node.
        log_travel: log of S(t) - S(k-1) at the node, minus infinity where that is 0.
    """

    first: Ints
    filled: Ints
    weight: Floats
    log_rate: Floats
    log_travel: Floats

    def add_up(self, values: Floats, rows: int) -> Floats:
        """Sum of a value per node over the nodes of each row, shape (R,)."""
        total = np.zeros(rows)
        if values.size:
            total[self.filled] = np.add.reduceat(values, self.first)
        return total

    @classmethod
    def join(cls, parts: Sequence[Nodes], rows: Sequence[int]) -> Nodes:
        """The nodes of several schedules, with so many rows each, one after the other."""
        row = np.concatenate([[0], np.cumsum(rows)[:-1]])
        node = np.concatenate([[0], np.cumsum([p.weight.size for p in parts])[:-1]])
        return cls(
            first=np.concatenate([p.first + n for p, n in zip(parts, node, strict=True)]),
            filled=np.concatenate([p.filled + r for p, r in zip(parts, row, strict=True)]),
            weight=np.concatenate([p.weight for p in parts]), log_rate=np.concatenate([p.log_rate for p in parts]),
            log_travel=np.concatenate([p.log_travel for p in parts]),
        )  # fmt: skip


def find_nodes(rates: Floats, steps: Ints, *, open_share: float = OPEN) -> Nodes:
    """Nodes of a schedule at some of its steps.

    Only steps where the rate changes count. They form a binary tree; a block far from t (its length in S below `open_share` of
    its distance) is replaced by the two-point Gauss rule of its own weights d_k, which is exact for
    cubic polynomials of S, so the error falls with the fourth power of `open_share`; near t every step is a node.
    Barnes and Hut 1986, "A hierarchical O(N log N) force-calculation algorithm", is the same idea.

    Args:
        rates: rate of every step, shape (T,).
        steps: rows t, shape (R,).
        open_share: largest block, as a share of its distance; 0 gives every step.
    """
    change = np.diff(rates, prepend=rates[0])
    at_K = np.flatnonzero(change)
    done = np.cumsum(rates)
    tree = _Tree(change[at_K], done[at_K - 1], np.log(np.maximum(rates[at_K], TINY * rates.max())))
    rows = np.arange(steps.size)
    cover = _cover(tree, done[steps], np.searchsorted(at_K, steps, side="right"), rows, open_share)
    return _gather(tree, cover, done[steps])


class _Tree:
    """Moments of every block of 2^level changes, and its extent in S and in log eta."""

    def __init__(self, d_K: Floats, s_K: Floats, log_K: Floats) -> None:
        self.size = max(d_K.size, 1)
        self.depth = int(np.ceil(np.log2(self.size)))
        width = 1 << self.depth
        pad = width - d_K.size
        low_s, high_s = np.pad(s_K, (0, pad), constant_values=np.inf), np.pad(s_K, (0, pad), constant_values=-np.inf)
        low_g, high_g = (
            np.pad(log_K, (0, pad), constant_values=np.inf),
            np.pad(log_K, (0, pad), constant_values=-np.inf),
        )
        weight, size = np.pad(d_K, (0, pad)), np.pad(np.abs(d_K), (0, pad))
        self.s, self.log, self.d = s_K, log_K, d_K
        self.low, self.high, self.spread, self.pure = [], [], [], []
        for _ in range(self.depth + 1):
            self.low.append(low_s)
            self.high.append(high_s)
            self.spread.append(high_g - low_g)
            self.pure.append(np.abs(weight) >= size * (1 - 1e-12))  # all changes of one sign
            if low_s.size == 1:
                break
            low_s, high_s = low_s.reshape(-1, 2).min(1), high_s.reshape(-1, 2).max(1)
            low_g, high_g = low_g.reshape(-1, 2).min(1), high_g.reshape(-1, 2).max(1)
            weight, size = weight.reshape(-1, 2).sum(1), size.reshape(-1, 2).sum(1)

    def rule(self, block: Ints, level: int) -> tuple[Floats, Floats, Floats]:
        """Two-point Gauss rule of each block: weights, positions in S, log rates there; shape (blocks, 2)."""
        inside = (block[:, None] << level) + np.arange(1 << level)
        inside, there = np.minimum(inside, self.size - 1), inside < self.size
        d, s = np.where(there, self.d[inside], 0.0), self.s[inside]
        total = d.sum(1)
        mean = (d * s).sum(1) / total
        off = s - mean[:, None]
        sd = np.sqrt((d * off**2).sum(1) / total)
        skew = (d * off**3).sum(1) / total / np.maximum(sd**3, np.finfo(float).tiny) / 2
        root = np.sqrt(1 + skew**2)
        at = mean[:, None] + sd[:, None] * np.stack([skew - root, skew + root], 1)
        weight = total[:, None] * np.stack([1 + skew / root, 1 - skew / root], 1) / 2
        return weight, at, np.interp(at, self.s, self.log)


def _cover(tree: _Tree, end_R: Floats, count_R: Ints, rows: Ints, share: float) -> list[tuple[int, Ints, Ints]]:
    """Per level, rows and blocks that together cover the changes before each row: opened from the root until small against their distance."""
    row, block = rows[count_R > 0], np.zeros((count_R > 0).sum(), np.int64)
    found = []
    for level in range(tree.depth, -1, -1):
        first = block << level
        live = first < count_R[row]
        row, block, first = row[live], block[live], first[live]
        whole = np.minimum(first + (1 << level), tree.size) <= count_R[row]
        reach = share * (end_R[row] - tree.high[level][block])
        long = tree.high[level][block] - tree.low[level][block]
        small = (long <= reach) & (tree.spread[level][block] <= LOGS * share) & tree.pure[level][block]
        take = whole & (small if level > 1 else level == 0)
        found.append((level, row[take], block[take]))
        row, block = np.repeat(row[~take], 2), (2 * block[~take][:, None] + np.arange(2)).ravel()
    return found


def _gather(tree: _Tree, cover: list[tuple[int, Ints, Ints]], end_R: Floats) -> Nodes:
    parts: list[tuple[NDArray, ...]] = []
    for level, row, block in cover:
        if level == 0:
            parts.append((row, tree.d[block], tree.log[block], end_R[row] - tree.s[block]))
        elif row.size:
            known, which = np.unique(block, return_inverse=True)
            weight, at, log = (v[which].ravel() for v in tree.rule(known, level))
            row = np.repeat(row, 2)
            parts.append((row, weight, log, end_R[row] - at))
    row, weight, log, travel = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(row, kind="stable")
    filled, first = np.unique(row[order], return_index=True)
    with np.errstate(divide="ignore"):
        log_travel = np.log(np.maximum(travel[order], 0.0))
    return Nodes(first=first, filled=filled, weight=weight[order], log_rate=log[order], log_travel=log_travel)
