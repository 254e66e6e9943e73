"""Published tables of hyperparameter sweeps and compute-optimal points, and what their authors state of them."""

import functools

from tests.laws.tables import table

STEP_LAW = {"lr": {"c": 1.79, "exponent_N": -0.713, "exponent_D": 0.307}, "batch": {"c": 0.58, "exponent_D": 0.571}}
STEP_X = {"N": "N", "D": "D", "lr": "lr", "batch": "batch"}
SETTING = ("summary", "dataset", "hparams", "warmup", "decay", "param_count", "val")


@functools.cache
def step_law():
    """17 grids of learning rate and batch size (in tokens)."""
    found = table("steplaw/dense_lr_bs_loss.csv")
    return {n: found[n] for n in STEP_X if n != "batch"} | {
        "batch": [2048 * b for b in found["batch_sequences"]],
        "smooth_loss": found["smooth_loss"],
    }


def porian():
    """Per setting: its table, and the exponents that the authors stored for it, "basic" and "weighted"."""
    points, stored = (_rows(f"porian/{name}.csv") for name in ("optimal_pairs", "stored_fits"))
    for setting in dict.fromkeys(tuple(r[k] for k in SETTING) for r in stored):
        mine = [r for r in points if tuple(r[k] for k in SETTING) == setting and r["n"] is not None]
        fits = {r["fit"]: r["n_exponent"] for r in stored if tuple(r[k] for k in SETTING) == setting}
        yield setting, {name: [r[name] for r in mine] for name in ("flops", "n", "n_star_std")}, fits


def _rows(name):
    columns = table(name)
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
