"""Optima of sweeps: exact on bowls, near-best rows by brute force, sweeps that do not bracket."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.laws.hyperparameters import step_law
from towtank.laws.optima import find_optima, near_best, nearest_excess, read_sweeps

SHAPE = np.array([[0.018, -0.008], [-0.008, 0.02]])
CENTRE = {"lr": (5.98, -0.785, 0.145), "batch": (-0.545, 0.0, 0.571)}  # log c, exponents of N and D
CELLS = [(n, d * n) for n in (1e8, 2e8, 4e8, 8e8) for d in (20, 60, 200)]
NAMES = {"N": "N", "D": "D"}, {"lr": "lr", "batch": "batch"}


def bowls(noise=0.0, scatter=0.0, seed=0, cells=CELLS, reach=2.2):
    """Grids of 8 learning rates x 8 batch sizes about each optimum, with the loss of one common bowl."""
    rng, found = np.random.default_rng(seed), {"N": [], "D": [], "lr": [], "batch": [], "loss": [], "centre": []}
    for n, d in cells:
        best = np.array([c + a * np.log(n) + b * np.log(d) for c, a, b in CENTRE.values()])
        best = best + scatter * rng.standard_normal(2)
        offset = rng.uniform(-0.3, 0.3, 2)  # optima fall between the rates that were tried
        steps = np.linspace(-reach, reach, 8)
        z = best + offset + np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
        excess = np.einsum("ri,ij,rj->r", z - best, SHAPE, z - best) / 2
        found["loss"] += list((3 + 100 * d**-0.25) * np.exp(excess + noise * rng.standard_normal(64)))
        found["lr"] += list(np.exp(z[:, 0]))
        found["batch"] += list(np.exp(z[:, 1]))
        found["N"] += [n] * 64
        found["D"] += [d] * 64
        found["centre"] += [tuple(np.exp(best))] * 64
    return found


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000))
def test_bowls_without_noise_give_their_optima(seed):
    table = bowls(seed=seed)
    optima = find_optima(read_sweeps(table, *NAMES, "loss"))
    found, true = optima.table(), {(n, d): c for n, d, c in zip(table["N"], table["D"], table["centre"], strict=True)}
    assert optima.bracketed_C.all() and len(found["N"]) == len(CELLS)
    for n, d, lr, batch in zip(found["N"], found["D"], found["lr"], found["batch"], strict=True):
        key = min(true, key=lambda k: abs(np.log(k[0] / n)) + abs(np.log(k[1] / d)))
        assert np.log([lr, batch]) == pytest.approx(np.log(true[key]), abs=1e-6)
    assert optima.hessian_TT == pytest.approx(SHAPE, rel=1e-6)


def test_rows_may_come_in_any_order_and_diverged_runs_change_nothing():
    table = bowls(noise=1e-3)
    order = np.random.default_rng(1).permutation(len(table["N"]))
    mixed = {k: [v[i] for i in order] for k, v in table.items()}
    n, d = table["N"][0], table["D"][0]
    for name, value in (("N", n), ("D", d), ("lr", 1.0), ("batch", 1e6), ("loss", None)):
        mixed[name] = [*mixed[name], value]
    one, two = (find_optima(read_sweeps(t, *NAMES, "loss")).table() for t in (table, mixed))
    assert all(one[name] == pytest.approx(two[name], rel=1e-9) for name in one)


def test_near_best_rows_are_those_of_a_plain_loop():
    table = step_law()
    found = near_best(table, cell=["N", "D"], y="smooth_loss", within=0.0025)
    cells = {}
    for n, d, loss in zip(table["N"], table["D"], table["smooth_loss"], strict=True):
        cells[n, d] = min(loss, cells.get((n, d), np.inf))
    kept = [
        lr
        for n, d, lr, loss in zip(table["N"], table["D"], table["lr"], table["smooth_loss"], strict=True)
        if loss <= cells[n, d] * 1.0025
    ]
    assert found["lr"] == kept and len(kept) == 129 and len(set(found["cell"])) == 17


def test_flat_range_of_every_published_sweep_holds_its_best_run():
    table = {name: np.array(values) for name, values in step_law().items()}
    found = find_optima(read_sweeps(table, *NAMES, "smooth_loss")).table()
    assert len(found["N"]) == 17
    for i, (n, d) in enumerate(zip(found["N"], found["D"], strict=True)):
        mine = np.isclose(table["N"], n) & np.isclose(table["D"], d)
        best = np.flatnonzero(mine)[np.argmin(table["smooth_loss"][mine])]
        for name in ("lr", "batch"):
            low, high = np.log(found[f"{name}_low"][i]), np.log(found[f"{name}_high"][i])
            assert low - 1e-12 <= np.log(table[name][best]) <= high + 1e-12


def test_nearest_run_is_found_in_logarithms():
    table = {"N": [1] * 3, "D": [1] * 3, "lr": [1e-3, 4e-3, 1e-2], "batch": [64] * 3, "loss": [2.0, 2.2, 3.0]}
    sweeps = read_sweeps(table, *NAMES, "loss")
    # 2.1e-3 is nearer to 1e-3 on a linear scale, and to 4e-3 on a logarithmic one
    assert nearest_excess(sweeps, np.log([[2.1e-3, 64]]))[0] == pytest.approx(0.1)


def test_optimum_outside_the_sweep_is_not_bracketed():
    table = bowls()
    sweeps = read_sweeps(table, *NAMES, "loss")
    inside = np.exp(sweeps.tuned_RT[:, 0]) < np.array(table["centre"])[:, 0] * 0.5
    first = (np.array(table["N"]) == 1e8) & (np.array(table["D"]) == 2e9)
    cut = {k: [v for v, keep in zip(values, ~first | inside, strict=True) if keep] for k, values in table.items()}
    optima = find_optima(read_sweeps(cut, *NAMES, "loss"))
    assert list(optima.bracketed_C) == [False] + [True] * 11
    assert len(optima.table()["N"]) == 11


def test_losses_that_only_fall_have_no_optimum():
    table = bowls()
    table["loss"] = [3 * lr**-0.01 for lr in table["lr"]]
    assert find_optima(read_sweeps(table, *NAMES, "loss"), 0.05) is None


def test_one_learning_rate_alone_is_no_sweep():
    table = bowls()
    table["lr"] = [1e-3] * len(table["lr"])
    assert find_optima(read_sweeps(table, *NAMES, "loss")) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": [-1.0, 1.0, 2.0]}, "positive numbers in 'lr'.*row 0"),
        ({"loss": [None, np.nan, np.inf]}, "finished run in every sweep.*N = 1"),
        ({"loss": [2.0, 0.0, 1.0]}, "positive numbers in 'loss'"),
    ],
)
def test_bad_rows_are_named(change, message):
    table = {"N": [1] * 3, "D": [1] * 3, "lr": [1.0, 2.0, 3.0], "batch": [1.0] * 3, "loss": [1.0, 2.0, 3.0]} | change
    with pytest.raises(ValueError, match=message):
        read_sweeps(table, *NAMES, "loss")


def test_missing_column_suggests_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'batch'"):
        read_sweeps(bowls(), {"N": "N"}, {"lr": "lr", "batch": "bach"}, "loss")
