"""The best learning rate and batch size against size, from full sweeps at several sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from towtank.estimate import Verdict
from towtank.laws.diagnose import Selection
from towtank.laws.formula_fit import FormulaFit, refused
from towtank.laws.law import Law
from towtank.laws.optima import WITHIN, Optima, Sweeps, find_optima, nearest_excess, read_sweeps
from towtank.laws.product import ProductLaw, RateLaw
from towtank.laws.rows import Rows, read_rows
from towtank.laws.table import Floats, Table

THRESHOLDS = (0.0025, 0.005, 0.0075, 0.01, 0.02)  # excess losses up to which runs are used, to see what hangs on them


@dataclass(frozen=True, kw_only=True)
class SweepLaw(Law):
    """The best value of a tuned hyperparameter against size: the optima of all sweeps, then a product of powers.

        log loss = best of the sweep + (z - z*)' H (z - z*) / 2,    z* = log c + sum of exponent log size

    z are the logarithms of the tuned hyperparameters; see `find_optima`. One sweep is one row of the fit, weighted by how
    sharply it tells its optimum. Runs that diverged (no loss) may stay in the table.

    Args:
        name: what the command line calls it.
        of: the hyperparameter that is predicted.
        tuned: all that were swept.
        sizes: what tells one sweep from another.
        form: the law of the optimum, in some or all of the sizes.
        within: relative excess loss up to which runs are used.

    Example:
        >>> from towtank.laws.product import HorizonLaw
        >>> rows = [(d, lr) for d in (1e9, 4e9, 16e9, 64e9) for lr in 2.0 ** np.arange(-12, -5)]
        >>> table = {"D": [d for d, _ in rows], "lr": [lr for _, lr in rows],
        ...          "loss": [3 * np.exp(0.01 * np.log(lr * (d / 1e9)**0.25 / 0.007)**2) for d, lr in rows]}
        >>> law = SweepLaw(of="lr", tuned=("lr",), sizes=("D",), form=HorizonLaw())
        >>> round(law.fit(table, x={"D": "D", "lr": "lr"}, y="loss").values["exponent_D"], 6)
        -0.25
    """

    name: str = "sweep-rate"
    of: str = "lr"
    tuned: tuple[str, ...] = ("lr", "batch")
    sizes: tuple[str, ...] = ("N", "D")
    form: ProductLaw = RateLaw()
    within: float = WITHIN

    source: ClassVar[str] = "the form: Li et al. 2025, Predictable Scale: Part I, Step Law, equation 1"
    needs: ClassVar[str] = (
        "full sweeps, best run inside, at 6 or more combinations of sizes that lie not along one line"
    )

    @property
    def formula(self) -> str:
        """The law, in plain text."""
        return f"{self.of}* = c " + " ".join(f"{v}^exponent_{v}" for v in self.form.variables)

    @property
    def variables(self) -> dict[str, str]:
        """Sizes and tuned hyperparameters; a forecast needs the variables of the form alone."""
        sizes = {name: self.form.variables.get(name, "size, any unit") for name in self.sizes}
        return {**sizes, **{name: "tuned, any unit" for name in self.tuned}}

    def fit(
        self,
        table: Table,
        *,
        x: Mapping[str, str],
        y: str,
        weights: str | None = None,
        seed: int = 0,
        drop: bool = False,
    ) -> FormulaFit:
        """Fit the law to a table of runs.

        Args:
            table: columns by name, one row per run.
            x: column of each size and of each tuned hyperparameter.
            y: column of the loss; None, NaN and inf mean the run diverged.
            weights: not used by this law.
            seed: seed of the bootstrap over sweeps.
            drop: ignored: a run without a loss is one that diverged.

        Raises:
            ValueError: if a column is missing, a number is not positive, every run of a sweep diverged, or weights are
                given.
        """
        if weights is not None:
            raise ValueError(f"expected no weights, got {weights!r}: every run counts alike; leave them out")
        sweeps = self.sweeps(table, x, y)
        optima = find_optima(sweeps, self.within)
        if optima is None:
            return refused(self.form, self.rows(None), "the losses have no minimum inside the sweeps; widen them")
        fit = self.form.fit_rows(self.rows(optima), seed=seed)
        said = _doubts(optima)
        return replace(fit, verdict=fit.verdict.worse(Verdict("weak", said))) if said else fit

    def sweeps(self, table: Table, x: Mapping[str, str], y: str) -> Sweeps:
        """The sweeps of a table; see `fit`.

        Raises:
            ValueError: if the variables do not fit, or the table is wrong as `fit` says.
        """
        if not isinstance(x, Mapping) or set(x) != set(self.variables):
            raise ValueError(
                f"expected columns for the variables {list(self.variables)}, got {x if isinstance(x, str) else sorted(x)}"
            )
        return read_sweeps(table, {v: x[v] for v in self.sizes}, {v: x[v] for v in self.tuned}, y)

    def selection(self, table: Table, x: Mapping[str, str], y: str) -> tuple[Selection, ...]:
        """The coefficients with other thresholds of "near the best": how far they hang on the choice of runs.

        Raises:
            ValueError: as `fit`.
        """
        return tuple(
            Selection(y, "within", within, replace(self, within=within).fit(table, x=x, y=y).values)
            for within in THRESHOLDS
        )

    def rows(self, optima: Optima | None) -> Rows:
        """The bracketed optima as rows of the form; none without optima."""
        columns, weight = {v: v for v in self.form.variables}, f"{self.of}_weight"
        table = optima.table() if optima else {name: [] for name in (*columns, self.of, weight)}
        return read_rows(table, columns, self.of, weights=weight)


@dataclass(frozen=True)
class ExcessLoss:
    """What following a law costs: loss of the run nearest to its prediction over the best run of the sweep, minus 1.

    Args:
        sizes: sizes of each sweep, in the order of the law.
        values: excess of each sweep, as a fraction.
    """

    sizes: tuple[tuple[float, ...], ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean over the sweeps."""
        return float(np.mean(self.values))

    @property
    def worst(self) -> float:
        """The largest."""
        return max(self.values)


def excess_of(laws: Mapping[str, FormulaFit] | Mapping[str, Mapping[str, float]], sweeps: Sweeps) -> ExcessLoss:
    """What given laws cost on sweeps, whatever they were fitted to.

    Args:
        laws: for each tuned hyperparameter its fit, or its coefficients {"c": ..., "exponent_N": ..., ...} (an exponent
            that is not named is 0).
        sweeps: the runs.

    Example:
        >>> from towtank.laws.product import HorizonLaw
        >>> law = SweepLaw(of="lr", tuned=("lr",), sizes=("D",), form=HorizonLaw())
        >>> table = {"D": [1e9] * 3, "lr": [1e-3, 2e-3, 4e-3], "loss": [2.02, 2.0, 2.1]}
        >>> sweeps = law.sweeps(table, {"D": "D", "lr": "lr"}, "loss")
        >>> round(excess_of({"lr": {"c": 1e-3}}, sweeps).worst, 6)
        0.01
    """
    values = {t: law.values if isinstance(law, FormulaFit) else law for t, law in laws.items()}
    centre_CT = np.stack([_centre(values[t], sweeps) for t in sweeps.tuned], axis=1)
    return _excess(sweeps, nearest_excess(sweeps, centre_CT))


def held_out_excess(laws: Sequence[SweepLaw], table: Table, *, x: Mapping[str, str], y: str) -> ExcessLoss:
    """The excess loss of each sweep when the laws are fitted to all the others.

    Args:
        laws: one law for each tuned hyperparameter, alike but in `of` and `form`.
        table: columns by name, one row per run.
        x: column of each size and of each tuned hyperparameter.
        y: column of the loss.

    Raises:
        ValueError: as `SweepLaw.fit`, or if a hyperparameter has no law, or the other sweeps do not bracket their optima.
    """
    if sorted(law.of for law in laws) != sorted(laws[0].tuned):
        raise ValueError(f"expected one law for each of {list(laws[0].tuned)}, got {[law.of for law in laws]}")
    sweeps = laws[0].sweeps(table, x, y)
    count, values = len(sweeps.size_CS), []
    for c in range(count):
        optima = find_optima(sweeps.take([i for i in range(count) if i != c]), laws[0].within)
        if optima is None:
            raise ValueError(f"without sweep {c} the others do not bracket their optima; widen the sweeps")
        told = {law.of: _coefficients(law, optima) for law in laws}
        values += excess_of(told, sweeps.take([c])).values
    return _excess(sweeps, np.array(values))


def _coefficients(law: SweepLaw, optima: Optima) -> dict[str, float]:
    inner = law.form.minimum(law.rows(optima)).theta[0]
    return {name: float(v) for name, v in law.form.coefficients(inner).items()}


def _excess(sweeps: Sweeps, values_C: Floats) -> ExcessLoss:
    sizes = tuple(tuple(float(v) for v in row) for row in np.exp(sweeps.size_CS))
    return ExcessLoss(sizes, tuple(float(v) for v in values_C))


def _centre(values: Mapping[str, float], sweeps: Sweeps) -> Floats:
    exponents = np.array([values.get(f"exponent_{name}", 0.0) for name in sweeps.sizes])
    return np.log(values["c"]) + sweeps.size_CS @ exponents


def _doubts(optima: Optima) -> str:
    lost = int((~optima.bracketed_C).sum())
    total = optima.bracketed_C.size
    return f"{lost} of {total} sweeps have their optimum outside and are left out; widen them" if lost else ""
