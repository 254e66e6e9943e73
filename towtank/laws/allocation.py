"""What a compute budget buys: parameters and tokens that minimise the loss, with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from towtank.estimate import Interval, Verdict
from towtank.laws.diagnose import percentiles
from towtank.laws.formula_fit import FormulaFit
from towtank.laws.loss import Chinchilla, OverTraining

FLOPS = 6.0  # floating-point operations per parameter and token: forward 2, backward 4


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """How to spend a budget.

    Args:
        compute: the budget, floating-point operations.
        N: parameters.
        D: tokens.
        ratio: tokens per parameter, D / N.
        loss: the loss it buys.
        verdict: how far to trust it.
    """

    compute: float
    N: Interval
    D: Interval
    ratio: Interval
    loss: Interval
    verdict: Verdict


def allocate(fit: FormulaFit, compute: float, *, flops: float = FLOPS) -> Allocation:
    """The N and D that minimise A / N^alpha + B / D^beta at compute = 6 N D.

        N* = G (C / 6)^(beta / (alpha + beta)),  D* = C / (6 N*),  G = (alpha A / (beta B))^(1 / (alpha + beta))

    Hoffmann et al. 2022, "Training compute-optimal large language models", equation 4.

    Args:
        fit: a fit of `Chinchilla` or `OverTraining`.
        compute: the budget, floating-point operations.
        flops: operations per parameter and token.

    Raises:
        TypeError: if the law has no parameters and tokens.
        ValueError: if the budget is not positive, or the fit is refused there.

    Example:
        >>> rows = [(n, d) for n in (1e7, 1e8, 1e9) for d in (1e9, 1e10, 1e11)]
        >>> table = {"n": [r[0] for r in rows], "d": [r[1] for r in rows],
        ...          "loss": [1.8 + 400 / n**0.35 + 400 / d**0.35 for n, d in rows]}
        >>> best = allocate(Chinchilla(draws=50).fit(table, x={"N": "n", "D": "d"}, y="loss"), 6e20)
        >>> round(best.N.value / 1e10, 5), round(best.ratio.value, 5)  # equal terms: N = D = sqrt(C / 6)
        (1.0, 1.0)
    """
    if not (np.isfinite(compute) and compute > 0):
        raise ValueError(f"expected a positive compute, got {compute}")
    n, d, loss = _optimum(fit, fit.inner[None], compute / flops)
    if not fit.draws.size:
        raise ValueError(f"no allocation by the law {fit.law!r}: {fit.verdict.reason}")
    draws = _optimum(fit, fit.draws, compute / flops)
    told = [
        percentiles(float(v[0]), b, fit.level)
        for v, b in zip((n, d, d / n, loss), (*draws[:2], draws[1] / draws[0], draws[2]))
    ]
    at = (
        {"N": float(n[0]), "D": float(d[0])}
        if "D" in fit.form.variables
        else {"N": float(n[0]), "M": float((d / n)[0])}
    )
    return Allocation(compute=compute, N=told[0], D=told[1], ratio=told[2], loss=told[3], verdict=fit.judge(at))


def _optimum(fit: FormulaFit, inner: Any, product: float) -> tuple[Any, Any, Any]:
    c = fit.form.coefficients(inner)
    if isinstance(fit.form, OverTraining):
        c = {"A": c["a"], "alpha": -c["b"], "B": c["beta"] * 6 ** (c["b"] / 2), "beta": -c["b"], "E": c["E"]}
    elif not isinstance(fit.form, Chinchilla):
        raise TypeError(
            f"expected a fit of a law in parameters and tokens, got {fit.law!r}; fit chinchilla or over-training"
        )
    both = c["alpha"] + c["beta"]
    with np.errstate(over="ignore"):
        log_g = (np.log(c["alpha"] * c["A"]) - np.log(c["beta"] * c["B"])) / both
        n = np.exp(log_g + c["beta"] / both * np.log(product))
        d = product / n
        return n, d, c["E"] + c["A"] * n ** -c["alpha"] + c["B"] * d ** -c["beta"]
