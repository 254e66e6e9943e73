"""Best hyperparameters of full sweeps: one optimum per combination of sizes, from bowls of one common shape.

Capitals in names of arrays: R rows, C cells (one combination of sizes), T tuned hyperparameters, S sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from towtank.laws.table import Floats, Ints, Table, column, positive

NEAR = 0.0025  # runs within this of the best are as good as the best: what an optimum may be off by
WITHIN = 0.005  # runs within this of the best of their cell give the shape of the bowl
SAME = 1e-9  # relative strength below which a combination of log sizes does not vary


@dataclass(frozen=True, kw_only=True)
class Sweeps:
    """Runs of full sweeps, one sweep per cell.

    Args:
        sizes: names of the sizes.
        tuned: names of the tuned hyperparameters.
        size_CS: natural logarithm of the sizes of each cell.
        tuned_RT: natural logarithm of the hyperparameters of each run.
        loss_R: loss of each run; infinite where it diverged.
        cell_R: cell of each run.
    """

    sizes: tuple[str, ...]
    tuned: tuple[str, ...]
    size_CS: Floats
    tuned_RT: Floats
    loss_R: Floats
    cell_R: Ints

    @property
    def excess_R(self) -> Floats:
        """Loss over the best of the cell, minus 1."""
        best_C = np.full(len(self.size_CS), np.inf)
        np.minimum.at(best_C, self.cell_R, self.loss_R)
        return self.loss_R / best_C[self.cell_R] - 1

    def take(self, cells: Sequence[int]) -> Sweeps:
        """The sweeps of some cells."""
        new_C = np.full(len(self.size_CS), -1)
        new_C[list(cells)] = np.arange(len(cells))
        rows = np.flatnonzero(new_C[self.cell_R] >= 0)
        return replace(
            self,
            size_CS=self.size_CS[list(cells)],
            tuned_RT=self.tuned_RT[rows],
            loss_R=self.loss_R[rows],
            cell_R=new_C[self.cell_R[rows]],
        )


@dataclass(frozen=True, kw_only=True)
class Optima:
    """The optimum of each cell, and how flat it is.

    Args:
        sweeps: the runs.
        centre_CT: bottom of the bowl, natural logarithm of the hyperparameters.
        weight_CT: inverse variance of the centre, up to a common factor.
        low_CT: least value among the near-best runs.
        high_CT: largest value among them.
        bracketed_C: whether the bottom lies inside the sweep.
        hessian_TT: shape of the bowl: relative loss = z' hessian z / 2 for z natural logarithms from the bottom.
    """

    sweeps: Sweeps
    centre_CT: Floats
    weight_CT: Floats
    low_CT: Floats
    high_CT: Floats
    bracketed_C: NDArray[np.bool_]
    hessian_TT: Floats

    def table(self) -> dict[str, list[float]]:
        """The bracketed optima as a table, one row per cell: sizes, hyperparameters, and the flat range of each.

        Columns are named as the variables, with "_low" and "_high" for the range of the near-best runs, and "_weight" for
        the weight of the optimum.
        """
        keep, s = self.bracketed_C, self.sweeps
        columns = {name: s.size_CS[keep, i] for i, name in enumerate(s.sizes)}
        for i, name in enumerate(s.tuned):
            for suffix, values in (("", self.centre_CT), ("_low", self.low_CT), ("_high", self.high_CT)):
                columns[name + suffix] = values[keep, i]
            columns[name + "_weight"] = np.log(self.weight_CT[keep, i])
        return {name: [float(v) for v in np.exp(values)] for name, values in columns.items()}


def read_sweeps(table: Table, sizes: Mapping[str, str], tuned: Mapping[str, str], y: str) -> Sweeps:
    """Sweeps from a table of runs.

    Args:
        table: columns by name, one row per run.
        sizes: column of each size.
        tuned: column of each tuned hyperparameter.
        y: column of the loss; None, NaN and inf mean the run diverged.

    Raises:
        ValueError: if a column is missing, a number is not positive, or every run of a cell diverged.
    """
    size_RS = np.log(np.stack([positive(column(table, c), c) for c in sizes.values()], axis=1))
    tuned_RT = np.log(np.stack([positive(column(table, c), c) for c in tuned.values()], axis=1))
    loss_R = column(table, y)
    done_R = np.isfinite(loss_R)
    positive(loss_R[done_R], y)
    size_CS, cell_R = np.unique(size_RS, axis=0, return_inverse=True)
    cell_R = cell_R.reshape(-1).astype(np.int64)
    lost = np.setdiff1d(np.arange(len(size_CS)), cell_R[done_R])
    if lost.size:
        where = _where(tuple(sizes), size_CS[lost[0]])
        raise ValueError(f"expected a finished run in every sweep, got none at {where}; remove its rows")
    return Sweeps(
        sizes=tuple(sizes),
        tuned=tuple(tuned),
        size_CS=size_CS,
        tuned_RT=tuned_RT,
        loss_R=np.where(done_R, loss_R, np.inf),
        cell_R=cell_R,
    )


def near_best(table: Table, *, cell: Sequence[str], y: str, within: float = NEAR) -> dict[str, list[Any]]:
    """The rows of a table whose loss is within a tolerance of the best of their cell, with the cell in a column "cell".

    An optimum is flat: its place is the range of these rows rather than the one lowest. Fitting a `ProductLaw` to them
    with groups="cell" is the selection rule of Li et al. 2025, "Predictable Scale: Part I, Step Law".

    Args:
        table: columns by name, one row per run.
        cell: columns that together say which runs compete.
        y: column of the loss; None, NaN and inf mean the run diverged.
        within: tolerance, relative to the best loss.

    Raises:
        ValueError: if a column is missing.

    Example:
        >>> runs = {"N": [1, 1, 1, 2, 2], "lr": [1e-3, 2e-3, 4e-3, 1e-3, 2e-3], "loss": [3.0, 3.001, 3.2, 2.9, None]}
        >>> near_best(runs, cell=["N"], y="loss")["lr"]
        [0.001, 0.002, 0.001]
    """
    loss_R = np.nan_to_num(column(table, y), nan=np.inf)
    _, cell_R = np.unique(np.stack([column(table, c) for c in cell], axis=1), axis=0, return_inverse=True)
    cell_R = cell_R.reshape(-1)
    best_C = np.full(int(cell_R.max(initial=-1)) + 1, np.inf)
    np.minimum.at(best_C, cell_R, loss_R)
    keep = np.flatnonzero(np.isfinite(loss_R) & (loss_R <= best_C[cell_R] * (1 + within)))
    return {
        **{name: [values[int(i)] for i in keep] for name, values in table.items()},
        "cell": [int(c) for c in cell_R[keep]],
    }


def find_optima(sweeps: Sweeps, within: float = WITHIN) -> Optima | None:
    """The optimum of each cell, by linear least squares; None if the losses have no minimum.

        log loss = best of the cell + (z - z*)' H (z - z*) / 2,   z = logarithms of the hyperparameters

    First the shape H, common to all cells, with bottoms that move in straight lines with the log sizes: a cell of a few
    noisy runs about a flat optimum would not tell its own curvature. Then, H known, the bottom z* of each cell from its
    own runs. Used are the runs within `within` of the best of their cell, for the bowl is a parabola only near its
    bottom, and at least the 2 T + 1 best of each.

    Args:
        sweeps: the runs.
        within: relative excess loss up to which runs are used.
    """
    used_R = np.flatnonzero(_used(sweeps, within))
    cell_R, z_RT = sweeps.cell_R[used_R], sweeps.tuned_RT[used_R]
    middle_CT = _means(z_RT, cell_R)
    hessian_TT = _shape(sweeps, used_R)
    if hessian_TT is None:
        return None
    z_RT = z_RT - middle_CT[cell_R]
    bowl_R = np.einsum("rt,tu,ru->r", z_RT, hessian_TT, z_RT) / 2
    left_R = _inner((np.log(sweeps.loss_R[used_R]) - bowl_R)[:, None], cell_R)[:, 0]
    inverse_TT, centre_CT, weight_CT = np.linalg.inv(hessian_TT), middle_CT.copy(), np.empty_like(middle_CT)
    for c in range(len(centre_CT)):
        mine_RT = z_RT[cell_R == c]
        spread_TT = np.linalg.pinv(mine_RT.T @ mine_RT)
        centre_CT[c] -= inverse_TT @ spread_TT @ (mine_RT.T @ left_R[cell_R == c])
        weight_CT[c] = 1 / np.diag(inverse_TT @ spread_TT @ inverse_TT)
    low_CT, high_CT = _range(sweeps, sweeps.excess_R <= NEAR)
    least_CT, most_CT = _range(sweeps, np.full(sweeps.loss_R.size, True))
    return Optima(
        sweeps=sweeps,
        centre_CT=centre_CT,
        weight_CT=weight_CT / weight_CT.mean(axis=0),
        low_CT=low_CT,
        high_CT=high_CT,
        bracketed_C=np.all((centre_CT > least_CT) & (centre_CT < most_CT), axis=1),
        hessian_TT=hessian_TT,
    )


def nearest_excess(sweeps: Sweeps, centre_CT: Floats) -> Floats:
    """Loss over the best of the cell, minus 1, of the run nearest in logarithms to given log hyperparameters, shape (C,)."""
    excess_R, out_C = sweeps.excess_R, np.empty(len(centre_CT))
    for c, centre_T in enumerate(centre_CT):
        mine = np.flatnonzero(sweeps.cell_R == c)
        out_C[c] = excess_R[mine[np.argmin(np.sum((sweeps.tuned_RT[mine] - centre_T) ** 2, axis=1))]]
    return out_C


def _used(sweeps: Sweeps, within: float) -> Any:
    """Runs near the best of their cell, and the few best of each in any case."""
    excess_R, least = sweeps.excess_R, 2 * len(sweeps.tuned) + 1
    rank_R = np.empty(excess_R.size, dtype=np.int64)
    order = np.lexsort((excess_R, sweeps.cell_R))
    start_C = np.searchsorted(sweeps.cell_R[order], np.arange(len(sweeps.size_CS)))
    rank_R[order] = np.arange(order.size) - start_C[sweeps.cell_R[order]]
    return np.isfinite(excess_R) & ((excess_R <= within) | (rank_R < least))


def _shape(sweeps: Sweeps, used_R: Ints) -> Floats | None:
    """The matrix common to all cells; None if it is not determined or has no minimum."""
    cell_R, z_RT = sweeps.cell_R[used_R], sweeps.tuned_RT[used_R]
    z_RT = z_RT - z_RT.mean(axis=0)
    one_CK = np.concatenate([np.ones((len(sweeps.size_CS), 1)), sweeps.size_CS - sweeps.size_CS.mean(axis=0)], axis=1)
    basis_CK, strength_K, _ = np.linalg.svd(one_CK, full_matrices=False)
    one_CK = basis_CK[:, strength_K > SAME * strength_K[0]]  # sizes along one line are one size here
    upper = np.triu_indices(z_RT.shape[1])
    square_RU = z_RT[:, upper[0]] * z_RT[:, upper[1]] * np.where(upper[0] == upper[1], 0.5, 1.0)
    slope_RX = (z_RT[:, :, None] * one_CK[cell_R][:, None, :]).reshape(used_R.size, -1)
    columns = _inner(np.concatenate([square_RU, slope_RX], axis=1), cell_R)
    found, _, rank, _ = np.linalg.lstsq(columns, np.log(sweeps.loss_R[used_R]), rcond=None)
    hessian_TT = np.zeros((z_RT.shape[1],) * 2)
    hessian_TT[upper] = hessian_TT.T[upper] = found[: upper[0].size]
    log_R = np.log(sweeps.loss_R[used_R])
    rounding = 64 * np.finfo(np.float64).eps * np.abs(log_R).max() / (np.square(z_RT).sum(axis=1).max() / 2)
    bottomless = (np.linalg.eigvalsh(hessian_TT) <= rounding).any()  # or no deeper than log loss is rounded
    return None if rank < columns.shape[1] or bottomless else hessian_TT


def _means(x_RP: Floats, cell_R: Ints) -> Floats:
    sums_CP = np.zeros((int(cell_R.max()) + 1, x_RP.shape[1]))
    np.add.at(sums_CP, cell_R, x_RP)
    return sums_CP / np.bincount(cell_R)[:, None]


def _inner(x_RP: Floats, cell_R: Ints) -> Floats:
    """Rows minus the mean of their cell."""
    return x_RP - _means(x_RP, cell_R)[cell_R]


def _range(sweeps: Sweeps, mask_R: Any) -> tuple[Floats, Floats]:
    shape = (len(sweeps.size_CS), len(sweeps.tuned))
    low_CT, high_CT = np.full(shape, np.inf), np.full(shape, -np.inf)
    np.minimum.at(low_CT, sweeps.cell_R[mask_R], sweeps.tuned_RT[mask_R])
    np.maximum.at(high_CT, sweeps.cell_R[mask_R], sweeps.tuned_RT[mask_R])
    return low_CT, high_CT


def _where(names: Sequence[str], logs_S: Floats) -> str:
    return ", ".join(f"{n} = {np.exp(v):.4g}" for n, v in zip(names, logs_S, strict=True))
