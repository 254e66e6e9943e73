"""Multi-power fit of nine real curves with 200 bootstraps, against the script way; coverage of the schedule laws.

    python bench/laws_schedules.py fit        # 2,059 rows, 9 curves, 200 bootstraps grouped by curve; one core
    python bench/laws_schedules.py coverage   # 300 synthetic replicates of each law, independent and grouped noise

The script way refits every bootstrap with scipy's L-BFGS-B. It is given our derivatives; its time per evaluation is
measured for the sum over every step that changes the rate, as a script would write it, on a tenth of the rows.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: one core

import datetime
import platform
import sys
import time
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.laws.schedule_runs import multipower_sum, real_curves, schedule_of, short_runs, synthetic  # noqa: E402
from towtank.laws.annealing import AnnealingLaw  # noqa: E402
from towtank.laws.curve_data import read_curves  # noqa: E402
from towtank.laws.multipower import MultiPowerLaw  # noqa: E402
from towtank.laws.schedules import wsd  # noqa: E402

TRUE = {
    "annealing": {"L0": 2.6, "A": 0.4, "alpha": 0.5, "C": 0.2},
    "multi-power": {"L0": 2.6, "A": 0.5, "alpha": 0.5, "B": 150.0, "C": 2.0, "beta": 0.6, "gamma": 0.6},
}
NOISE = {"independent": {"each": 1e-3}, "grouped": {"each": 4e-4, "offset": 1e-3}}


def main() -> None:
    print(f"{platform.processor() or platform.machine()}, numpy {np.__version__}, {datetime.date.today()}")
    {"fit": time_fit, "coverage": measure_coverage}[sys.argv[1] if len(sys.argv) > 1 else "fit"]()


def time_fit() -> None:
    curves = real_curves("25M")
    runs = {name: schedule_of(name) for name in curves}
    law = MultiPowerLaw(draws=200)
    wall, cpu = time.perf_counter(), time.process_time()
    fit = law.fit_curves(curves, schedules=runs)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    rows = fit.points.log_loss.size
    print(
        f"ours: {rows} rows, {len(curves)} curves, {law.draws} bootstraps: {wall:.1f} s wall, {cpu:.1f} s of one core"
    )
    print(f"  objective {fit.objective:.9g}, {fit.verdict}")
    script_way(law, fit, cpu)


def script_way(law, fit, ours: float) -> None:
    rng = np.random.default_rng(0)
    calls, took, worse = [], [], []
    for _ in range(3):
        weight = rng.dirichlet(np.ones(9))[fit.points.curve] * 9
        start = time.process_time()
        found = minimize(
            objective, fit.inner, args=(law, fit.points, weight), jac=True, method="L-BFGS-B",
            bounds=list(zip(*law.box, strict=True)), options={"maxiter": 10_000, "maxfun": 10_000, "ftol": 1e-12},
        )  # fmt: skip
        took.append(time.process_time() - start)
        calls.append(found.nfev)
        best = law._solve(fit.points, fit.inner[None], weights=weight).objective[0]
        worse.append(found.fun / 1e4 / best - 1)
    print(f"script way, our sum and derivatives: {np.mean(took):.2f} s a refit ({np.mean(calls):.0f} evaluations),")
    print(f"  200 refits {200 * np.mean(took):.0f} s; objective above ours by {', '.join(f'{w:.1%}' for w in worse)}")
    start = time.process_time()
    for curve in fit.points.curves:
        multipower_sum(fit.values, curve.schedule.rates, curve.steps[::10])
    each = 10 * (time.process_time() - start)
    print(f"script way, sum over every change, without derivatives: {each:.2f} s an evaluation,")
    print(
        f"  so 200 refits {200 * np.mean(calls) * each / 3600:.1f} hours: {200 * np.mean(calls) * each / ours:.0f} times ours"
    )


def objective(inner, law, points, weight):
    residual, jacobian = (v[0] for v in law.model(points)(inner[None]))
    size = np.abs(residual)
    value = np.sum(weight * np.where(size <= 1e-3, residual**2 / 2, 1e-3 * (size - 5e-4)))
    if not np.isfinite(value):
        return 1e10, np.zeros_like(inner)
    return 1e4 * value, 1e4 * (weight * np.clip(residual, -1e-3, 1e-3)) @ jacobian


def measure_coverage(replicates: int = 300) -> None:
    new = wsd(peak=1e-3, steps=4000, decay=1000, warmup=100, final=1e-4)
    steps = np.array([1000, 2500, 3999])
    for law, curves in (
        (AnnealingLaw(momentum=0.995), 9), (AnnealingLaw(momentum=0.995), 3), (MultiPowerLaw(draws=100), 9)
    ):  # fmt: skip
        true, runs = TRUE[law.name], short_runs(curves)
        mean = law.value(true, law.features(new, steps, np.nan))[0]
        for name, noise in NOISE.items():
            if curves < 5 and name == "grouped":
                continue  # blocks within curves do not claim to know it
            held: dict[str, list[bool]] = {}
            for seed in range(replicates):
                rng = np.random.default_rng([seed, 11])
                rows = synthetic(law, true, runs, rng, **noise)
                points = law.prepare(read_curves(rows, schedules=runs))
                fit = law.fit_points(points, start=law.inner(true), judge=False, seed=seed)
                for n, interval in fit.coefficients.items():
                    held.setdefault(n, []).append(true[n] in interval)
                run = mean * np.exp(
                    noise["each"] * rng.standard_normal(3) + noise.get("offset", 0.0) * rng.standard_normal()
                )
                for label, values, scatter in (("law", mean, False), ("run", run, True)):
                    _, low, high = fit.forecast([new], steps, np.nan, scatter)
                    for s, a, b, v in zip(steps, low, high, values, strict=True):
                        held.setdefault(f"{label} at {s}", []).append(bool(a <= v <= b))
            shares = ", ".join(f"{n} {np.mean(v):.3f}" for n, v in held.items())
            print(f"{law.name}, {curves} curves, {name} noise, {replicates} replicates: {shares}", flush=True)


if __name__ == "__main__":
    main()
