"""1,000 bootstrap refits of the compute-optimal law on its 240 rows: the batched solver against the plain script way.

The script way is scipy's BFGS with an analytic gradient, one call per resample, from the same start. Every refit of ours
must reach the script's objective or a lower one, within 1e-9 relative. Both are timed in turns within one run.

    OMP_NUM_THREADS=1 python bench/laws.py [--refits 1000] [--table ../shared/data/chinchilla_epoch/chinchilla_points.csv]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import time
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from towtank.laws.bootstrap import resample
from towtank.laws.loss import Chinchilla
from towtank.laws.rows import Rows, read_rows
from towtank.laws.solve import solve

DELTA, TURNS = 1e-3, 5
HERE = Path(__file__).resolve().parents[1]


def read(path: Path) -> Rows:
    """The table without the five rows of the largest loss."""
    with path.open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    rows.sort(key=lambda r: r["loss"])
    table = {name: [r[name] for r in rows[:-5]] for name in rows[0]}
    return read_rows(table, {"N": "params", "D": "tokens"}, "loss")


def script(rows: Rows, start: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The script way: objectives of one BFGS call per resample. Parameters log A, alpha, log B, beta, E."""
    n, d, y = np.log(rows.x["N"]), np.log(rows.x["D"]), np.log(rows.y)

    def objective(theta: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray]:
        first, second = np.exp(theta[0] - theta[1] * n), np.exp(theta[2] - theta[3] * d)
        value = theta[4] + first + second
        residual = y - np.log(value)
        size = np.abs(residual)
        huber = np.where(size <= DELTA, 0.5 * residual**2, DELTA * (size - 0.5 * DELTA))
        pull = -weight * np.clip(residual, -DELTA, DELTA) / value
        slope = pull @ np.stack([first, -n * first, second, -d * second, np.ones_like(n)], axis=1)
        return float(weight @ huber), slope

    with np.errstate(all="ignore"):
        return np.array([minimize(objective, start, args=(w,), jac=True, method="BFGS").fun for w in weights])


def main() -> None:
    """Print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--refits", type=int, default=1000)
    parser.add_argument(
        "--table", type=Path, default=HERE.parent / "shared" / "data" / "chinchilla_epoch" / "chinchilla_points.csv"
    )
    asked = parser.parse_args()
    law, rows = Chinchilla(), read(asked.table)
    best = law.minimum(rows)
    low, high = law.box
    weights = resample(rows, asked.refits, 0)
    print(f"{platform.processor() or platform.machine()}, numpy {np.__version__}, {datetime.date.today()}")
    print(f"{len(rows)} rows, objective {best.objective[0]:.8f}, {asked.refits} refits in {TURNS} turns")
    ours_s, script_s, worst, lower = [], [], -np.inf, 0
    for part in np.array_split(weights, TURNS):
        begin = time.perf_counter()
        starts = np.repeat(best.theta, len(part), axis=0)
        ours = solve(law.model(rows), starts, weights=part, lower=low, upper=high, delta=DELTA)
        middle = time.perf_counter()
        theirs = script(rows, best.theta[0], part)
        script_s.append(time.perf_counter() - middle)
        ours_s.append(middle - begin)
        worst = max(worst, float(np.max(ours.objective / theirs - 1)))
        lower += int(np.sum(ours.objective < theirs * (1 - 1e-9)))
        print(f"  solve {ours_s[-1]:.3f} s, script {script_s[-1]:.2f} s, ratio {script_s[-1] / ours_s[-1]:.1f}")
    print(f"solve {sum(ours_s):.2f} s, script {sum(script_s):.1f} s, ratio {sum(script_s) / sum(ours_s):.1f}")
    print(f"largest (ours / script - 1) of an objective: {worst:.1e}; ours lower by more than 1e-9 in {lower}")


if __name__ == "__main__":
    main()
