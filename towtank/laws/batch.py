"""Laws of the batch size: the learning rate it allows, and the steps and examples it costs to reach a loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from towtank.estimate import Interval, Verdict
from towtank.laws.formula_fit import FormulaFit
from towtank.laws.parametric import Parameter, ParametricLaw, Values, grid
from towtank.laws.solve import solve
from towtank.laws.table import Floats, Table, column, positive

LINEAR, ROOT = 1.0, 0.5  # exponents of the two regimes
DECIDED = 1.92  # half the 95 % quantile of chi-squared with one degree of freedom
ROUNDING = 1e-6  # of an exponent fitted to rows without noise
Exponent = Literal["1/b", "1/sqrt(b)", "neither", "cannot tell"]


@dataclass(frozen=True, kw_only=True)
class BatchRateLaw(ParametricLaw):
    """Best or largest stable learning rate against batch size: a power of b that saturates.

        1 / lr(b) = u + s / b^p,   so  lr = lr_max / (1 + (B / b)^p)  with lr_max = 1 / u, B = (s / u)^(1/p)

    p = 1: linear scaling, then saturation, McCandlish et al. 2018, "An empirical model of large-batch training",
    equation 2.9. p = 1/2: square-root scaling, as of adaptive optimizers. Granziol et al. 2020, "Learning rates as a
    function of batch size", derives either from the largest curvature lambda(b) of a batch: in the noise of b examples an
    eigenvalue that stands out moves by a term in 1/b, one that does not is the edge of the noise, in 1/sqrt(b). For
    curvatures give lr = 2 / lambda. `regime` says which of the two the data support. Data that never saturate leave u
    about 0, on either side of it, and lr_max and B without an upper end.

    Example:
        >>> b = 2.0 ** np.arange(4, 13)
        >>> fit = BatchRateLaw().fit({"batch": b, "lr": 0.01 / (1 + 256 / b)}, x="batch", y="lr")
        >>> round(fit.values["p"], 6), round(fit.coefficients["lr_max"].value, 6), regime(fit).exponent
        (1.0, 0.01, '1/b')
    """

    delta: float = np.inf

    name: ClassVar[str] = "batch-rate"
    formula: ClassVar[str] = "1/lr = u + s/b^p,  lr_max = 1/u, B = (s/u)^(1/p)"
    variables: ClassVar[dict[str, str]] = {"b": "batch size, examples or tokens"}
    source: ClassVar[str] = "McCandlish et al. 2018, equation 2.9 (p = 1); Granziol et al. 2020 (p = 1 or 1/2)"
    needs: ClassVar[str] = "6 or more batch sizes over 2 decades, each with its best (or largest stable) learning rate"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("u", -np.inf, np.inf, log=False),
        Parameter("s", 1e-300, 1e300),
        Parameter("p", 0.1, 3.0),
    )
    derived: ClassVar[dict[str, Any]] = {
        "lr_max": lambda c: ratio(1.0, c["u"]),
        "B": lambda c: ratio(c["s"], c["u"]) ** (1 / c["p"]),
    }

    def value(self, c: Values, x: Values) -> Any:
        """The formula."""
        inverse = c["u"] + c["s"] * x["b"] ** -c["p"]
        return np.where(np.real(inverse) > 0, 1 / np.where(np.real(inverse) > 0, inverse, 1.0), np.inf)

    def starts(self, x: Mapping[str, Floats], y: Floats) -> dict[str, Floats]:
        """The saturation within, below and above the data."""
        found = grid(B=np.geomspace(x["b"].min() / 10, x["b"].max() * 10, 5), p=[ROOT, LINEAR])
        u = 1 / (y.max() * (1 + (found["B"] / x["b"].max()) ** found["p"]))
        return {"u": u, "s": u * found["B"] ** found["p"], "p": found["p"]}


@dataclass(frozen=True, kw_only=True)
class CriticalBatchLaw(ParametricLaw):
    """Steps to reach a loss against batch size: perfect scaling below the critical batch size, none above.

        (S / S_min - 1) (E / E_min - 1) = 1  with E = b S,  so  S(b) = S_min + E_min / b,  B_crit = E_min / S_min

    All rows are of one target loss, each with its learning rate tuned. `with_batch` makes the batch column from steps and
    examples. A run that ended before the target is a censored row. Where no batch is large enough to show S_min, its
    interval reaches below 0 and that of B_crit has no upper end. McCandlish et al. 2018, "An empirical model of
    large-batch training", equation 2.11.

    Example:
        >>> steps, examples = [3000, 2000, 1500, 1250], [1.5e6, 2e6, 3e6, 5e6]
        >>> table = with_batch({"steps": steps, "examples": examples}, steps="steps", examples="examples")
        >>> fit = CriticalBatchLaw().fit(table, x="batch", y="steps")
        >>> {name: round(i.value, 3) for name, i in fit.coefficients.items()}
        {'S_min': 1000.0, 'E_min': 1000000.0, 'B_crit': 1000.0}
    """

    delta: float = np.inf

    name: ClassVar[str] = "critical-batch"
    formula: ClassVar[str] = "S = S_min + E_min/b,  B_crit = E_min/S_min"
    variables: ClassVar[dict[str, str]] = {"b": "batch size, examples or tokens"}
    source: ClassVar[str] = "McCandlish et al. 2018, equation 2.11"
    needs: ClassVar[str] = "steps to one target loss at 4 or more batch sizes, both sides of the critical one"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("S_min", -np.inf, np.inf, log=False),
        Parameter("E_min", -np.inf, np.inf, log=False),
    )
    derived: ClassVar[dict[str, Any]] = {"B_crit": lambda c: ratio(c["E_min"], c["S_min"])}

    def value(self, c: Values, x: Values) -> Any:
        """The formula."""
        steps = c["S_min"] + c["E_min"] / x["b"]
        return np.where(np.real(steps) > 0, steps, 0.0)

    def starts(self, x: Mapping[str, Floats], y: Floats) -> dict[str, Floats]:
        """The critical batch size within, below and above the data."""
        b = np.geomspace(x["b"].min() / 10, x["b"].max() * 10, 5)
        least = y.min() / (1 + b / x["b"].max())
        return {"S_min": least, "E_min": least * b}


def ratio(top: Any, bottom: Any) -> Any:
    """The ratio of two numbers that are not negative; infinite where the bottom is 0 or, being an estimate, below.

    Example:
        >>> ratio(np.array([1.0, 1.0]), np.array([4.0, 0.0]))
        array([0.25,  inf])
    """
    return np.where(bottom > 0, np.maximum(top, 0.0) / np.where(bottom > 0, bottom, 1.0), np.inf)


def with_batch(table: Table, *, steps: str, examples: str) -> dict[str, Any]:
    """The table with a column "batch" = examples / steps.

    Args:
        table: columns by name.
        steps: column of optimizer steps.
        examples: column of examples (or tokens) seen in them.

    Raises:
        ValueError: if a column is missing, or a number is not positive.
    """
    return {**table, "batch": positive(column(table, examples), examples) / positive(column(table, steps), steps)}


@dataclass(frozen=True, kw_only=True)
class Regime:
    """How the learning rate grows with the batch size below saturation.

    Args:
        exponent: of the batch noise: "1/b" (linear scaling), "1/sqrt(b)" (square-root scaling), "neither" or
            "cannot tell".
        p: the exponent itself; None where the fit is refused.
        log_likelihood_ratio: log likelihood of p = 1 minus that of p = 1/2, rows taken as independent.
        verdict: "ok" where the data decide.
    """

    exponent: Exponent
    p: Interval | None
    log_likelihood_ratio: float
    verdict: Verdict


def regime(fit: FormulaFit) -> Regime:
    """Whether the data are of linear or of square-root scaling, or cannot tell.

    The exponent p decides: a regime is excluded where the interval of p leaves it out and the log likelihood with p held
    there is 1.92 lower (95 % of chi-squared) than with p free.

    Args:
        fit: of a `BatchRateLaw`.

    Raises:
        TypeError: if it is a fit of another law.
    """
    if not isinstance(fit.form, BatchRateLaw):
        raise TypeError(f"expected a fit of BatchRateLaw, got one of {fit.law!r}")
    if not fit.draws.size:
        return Regime(exponent="cannot tell", p=None, log_likelihood_ratio=0.0, verdict=fit.verdict)
    p, known = fit.coefficients["p"], int((~fit.rows.censored).sum())
    least = np.finfo(np.float64).tiny + fit.objective
    worse = {e: known / 2 * float(np.log(max(_held(fit, e), least) / least)) for e in (LINEAR, ROOT)}
    fits = {e: p.low - ROUNDING <= e <= p.high + ROUNDING or worse[e] < DECIDED for e in worse}
    likelier = worse[ROOT] - worse[LINEAR]
    if fits[LINEAR] == fits[ROOT]:
        exponent: Exponent = "cannot tell" if fits[LINEAR] else "neither"
        said = "both regimes lie" if fits[LINEAR] else "neither regime lies"
        verdict = Verdict("weak", f"{said} in the interval of p = {p}; measure batch sizes further below saturation")
    else:
        exponent, verdict = "1/b" if fits[LINEAR] else "1/sqrt(b)", Verdict("ok")
    return Regime(exponent=exponent, p=p, log_likelihood_ratio=likelier, verdict=verdict.worse(fit.verdict))


def _held(fit: FormulaFit, p: float) -> float:
    """The objective with the exponent held."""
    starts = fit.form.starts(fit.rows.x, fit.rows.y)
    inner_MP = fit.form.inner({**starts, "p": np.full_like(starts["p"], p)})
    low, high = (np.where(np.arange(3) == 2, np.log(p), bound) for bound in fit.form.box)
    found = solve(
        fit.form.model(fit.rows), inner_MP, weights=fit.rows.weight, lower=low, upper=high, delta=fit.form.delta
    )
    return float(found.objective.min())
