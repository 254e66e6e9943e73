"""Real loss curves under nine schedules, and synthetic ones; independent sums of both laws."""

from __future__ import annotations

import numpy as np

from tests.laws.tables import table
from towtank.laws.schedules import Schedule, constant, cosine, linear, staircase, wsd

TRAIN = ("cosine_24000", "constant_24000", "wsdcon_9")
WARMUP, PEAK, END = 2160, 3e-4, 3e-5


def schedule_of(name: str) -> Schedule:
    """The schedule behind a name of the table, in our words."""
    kind, *numbers = name.split("_")
    first, last = int(numbers[0]), int(numbers[-1])
    start = {"peak": PEAK, "warmup": WARMUP, "first": 0.0}
    if kind == "cosine":
        return cosine(steps=first, final=END, **start)
    if kind == "constant":
        return constant(steps=first, **start)
    if kind == "wsdcon":
        return staircase(steps=16000, drops={8000: first * 1e-5}, **start)
    return wsd(steps=last, decay=last - first, final=END, shape="exponential" if kind == "wsd" else "line", **start)


def real_curves(size: str) -> dict[str, list[tuple[int, float, float]]]:
    """Rows (step, lr, loss) of each curve of the table of one model size, without step 24000."""
    columns = table(f"lr_schedules_mpl/loss_curves_{size}.csv")
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for name, step, rate, loss in zip(*(columns[c] for c in ("curve", "step", "lr", "loss")), strict=True):
        if step != 24000:
            curves.setdefault(name, []).append((int(step), rate, loss))
    return curves


def taken(runs: dict, names) -> dict:
    """Some of the runs."""
    return {name: runs[name] for name in names}


def multipower_sum(c: dict[str, float], rates: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The multi-power law written out over every step: no blocks, no cache."""
    total = np.cumsum(rates)
    k = np.arange(1, rates.size)
    k = k[rates[1:] != rates[:-1]]
    loss = np.empty(steps.size)
    for i, t in enumerate(steps):
        past = k[k <= t]
        travelled = total[t] - total[past - 1]
        with np.errstate(all="ignore"):  # at rate zero: infinity where anything was travelled since, else nothing
            z = np.where(travelled > 0, c["C"] * rates[past] ** -c["gamma"] * travelled, 0.0)
        reach = (1 + z) ** -c["beta"]
        loss[i] = (
            c["L0"] + c["A"] * total[t] ** -c["alpha"] + c["B"] * np.sum((rates[past] - rates[past - 1]) * (1 - reach))
        )
    return loss


def short_runs(count: int = 9, *, peak: float = 1e-3, steps: int = 3000) -> dict[str, Schedule]:
    """Small schedules of every kind."""
    start = {"peak": peak, "warmup": 100}
    runs = {
        "constant": constant(steps=steps, **start),
        "cosine": cosine(steps=steps, final=peak / 10, **start),
        "wsd": wsd(steps=steps, decay=steps // 5, final=peak / 10, **start),
        "stairs 3": staircase(steps=steps, drops={steps // 2: 0.3 * peak}, **start),
        "stairs 1": staircase(steps=steps, drops={steps // 2: 0.1 * peak}, **start),
        "linear": linear(steps=steps, final=peak / 10, **start),
        "long constant": constant(steps=2 * steps, **start),
        "long cosine": cosine(steps=2 * steps, final=peak / 10, **start),
        "two stairs": staircase(steps=steps, drops={steps // 3: 0.6 * peak, 2 * steps // 3: 0.2 * peak}, **start),
    }
    return dict(list(runs.items())[:count])


def synthetic(law, coefficients, runs, rng=None, *, rows: int = 40, each: float = 0.0, offset: float = 0.0, sizes=None):
    """Rows of each run under a law, with relative noise of each row and of each run."""
    found = {}
    for name, run in runs.items():
        steps = np.unique(np.linspace(150, len(run) - 1, rows).astype(int))
        size = (sizes or {}).get(name, np.nan)
        loss = law.value(coefficients, law.features(run, steps, size))[0]
        if rng is not None:
            loss = loss * np.exp(each * rng.standard_normal(steps.size) + offset * rng.standard_normal())
        found[name] = [(int(s), float(run.rates[s]), float(v)) for s, v in zip(steps, loss, strict=True)]
    return found
