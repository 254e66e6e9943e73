"""Laws that are products of powers: one straight line, or plane, in logarithms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from towtank.estimate import Verdict
from towtank.laws.formula_fit import FormulaFit
from towtank.laws.parametric import Parameter, ParametricLaw, Values
from towtank.laws.table import Floats

SCATTER_WEAK = 2.0  # scatter over stated noise above which one of the two is wrong


def powers(*variables: str) -> tuple[Parameter, ...]:
    """Coefficient and exponents of y = c product of v^exponent_v.

    Example:
        >>> [p.name for p in powers("N", "D")]
        ['c', 'exponent_N', 'exponent_D']
    """
    return (Parameter("c", 1e-300, 1e300), *(Parameter(f"exponent_{v}", -30.0, 30.0, log=False) for v in variables))


@dataclass(frozen=True, kw_only=True)
class ProductLaw(ParametricLaw):
    """y = c product of v^exponent_v over the variables: ordinary least squares in logarithms.

    A leaf is its texts and its variables.
    """

    delta: float = np.inf

    def value(self, c: Values, x: Values) -> Any:
        """The formula."""
        return c["c"] * np.exp(sum(c[f"exponent_{v}"] * np.log(x[v]) for v in self.variables))

    def starts(self, x: Mapping[str, Floats], y: Floats) -> dict[str, Floats]:
        """The solution of least squares itself, without weights."""
        logs_RV = np.log(np.stack([x[v] for v in self.variables], axis=1))
        middle_V = logs_RV.mean(axis=0)
        columns_RK = np.concatenate([np.ones((y.size, 1)), logs_RV - middle_V], axis=1)
        found = np.asarray(np.linalg.lstsq(columns_RK, np.log(y), rcond=None)[0], dtype=np.float64)
        exponents = {f"exponent_{v}": found[i + 1 : i + 2] for i, v in enumerate(self.variables)}
        return {"c": np.exp(found[:1] - np.dot(middle_V, found[1:])), **exponents}


@dataclass(frozen=True, kw_only=True)
class AllocationLaw(ProductLaw):
    """Compute-optimal size (or tokens) against compute: n = c C^a.

    Example:
        >>> fit = AllocationLaw().fit({"flops": [1e17, 1e18, 1e19, 1e20], "n": [1e7, 3e7, 1e8, 3e8]}, x="flops", y="n")
        >>> round(fit.values["exponent_C"], 3)
        0.495
    """

    name: ClassVar[str] = "allocation"
    formula: ClassVar[str] = "n = c C^exponent_C"
    variables: ClassVar[dict[str, str]] = {"C": "compute, FLOP"}
    source: ClassVar[str] = "Kaplan et al. 2020, equation 1.7; Porian et al. 2024, section 3"
    needs: ClassVar[str] = "the compute-optimal size at 5 or more budgets over 2 decades"
    parameters: ClassVar[tuple[Parameter, ...]] = powers("C")


@dataclass(frozen=True, kw_only=True)
class HorizonLaw(ProductLaw):
    """Best learning rate against length of training at one model: lr* = c D^exponent_D, an exponent near -0.32.

    Example:
        >>> fit = HorizonLaw().fit({"tokens": [1e9, 4e9, 16e9, 64e9], "lr": [8e-3, 4e-3, 2e-3, 1e-3]}, x="tokens", y="lr")
        >>> round(fit.values["exponent_D"], 6)
        -0.5
    """

    name: ClassVar[str] = "horizon"
    formula: ClassVar[str] = "lr* = c D^exponent_D"
    variables: ClassVar[dict[str, str]] = {"D": "tokens or steps of the run"}
    source: ClassVar[str] = "Bjorck et al. 2024, Scaling optimal LR across token horizons"
    needs: ClassVar[str] = "the best learning rate (or all near-best ones, grouped) at 4 or more lengths"
    parameters: ClassVar[tuple[Parameter, ...]] = powers("D")


@dataclass(frozen=True, kw_only=True)
class RateLaw(ProductLaw):
    """Best learning rate against parameters and tokens, from near-best runs: lr* = c N^exponent_N D^exponent_D.

    Give it the rows of `near_best` with groups="cell". `SweepLaw` uses all runs near the optima, and is the sharper law.

    Example:
        >>> rows = [(n, d) for n in (1e8, 1e9) for d in (1e9, 1e10, 1e11)]
        >>> table = {"N": [n for n, _ in rows], "D": [d for _, d in rows], "lr": [n**-0.7 * d**0.3 for n, d in rows]}
        >>> fit = RateLaw().fit(table, x={"N": "N", "D": "D"}, y="lr")
        >>> round(fit.values["exponent_N"], 6), round(fit.values["exponent_D"], 6)
        (-0.7, 0.3)
    """

    name: ClassVar[str] = "rate"
    formula: ClassVar[str] = "lr* = c N^exponent_N D^exponent_D"
    variables: ClassVar[dict[str, str]] = {"N": "non-embedding parameters", "D": "tokens"}
    source: ClassVar[str] = "Li et al. 2025, Predictable Scale: Part I, Step Law, equation 1"
    needs: ClassVar[str] = "near-best runs of sweeps at 6 or more (N, D), not along one line"
    parameters: ClassVar[tuple[Parameter, ...]] = powers("N", "D")


@dataclass(frozen=True, kw_only=True)
class BatchLaw(ProductLaw):
    """Best batch size against tokens, from near-best runs: b* = c D^exponent_D.

    Example:
        >>> fit = BatchLaw().fit({"D": [1e9, 1e10, 1e11, 1e12], "b": [1e5, 4e5, 1.6e6, 6.4e6]}, x="D", y="b")
        >>> round(fit.values["exponent_D"], 3)
        0.602
    """

    name: ClassVar[str] = "batch"
    formula: ClassVar[str] = "b* = c D^exponent_D"
    variables: ClassVar[dict[str, str]] = {"D": "tokens"}
    source: ClassVar[str] = "Li et al. 2025, Predictable Scale: Part I, Step Law, equation 1"
    needs: ClassVar[str] = "near-best runs of sweeps at 4 or more lengths"
    parameters: ClassVar[tuple[Parameter, ...]] = powers("D")


def with_noise(fit: FormulaFit, sd: Sequence[float]) -> FormulaFit:
    """The fit with intervals from the known noise of its rows instead of from a bootstrap over them.

    Rows drawn anew with their noise are refitted, to first order (exactly, for a `ProductLaw`). Where the rows scatter
    more than the noise explains, it is inflated by the Birge ratio; it is never shrunk.

    Args:
        fit: a least-squares fit (`delta` infinite).
        sd: standard deviation of the logarithm of y of each fitted row, (R,); of y itself where the link is "identity".

    Raises:
        ValueError: if there is not one positive number per fitted row, or the fit is not one of least squares.
    """
    sd_R = np.asarray(sd, dtype=np.float64)
    if sd_R.shape != fit.rows.y.shape or not (np.isfinite(sd_R) & (sd_R > 0)).all():
        raise ValueError(
            f"expected {len(fit.rows)} positive standard deviations, got {sd_R.size}: {sd_R}; leave rows without one out of the fit"
        )
    if not np.isinf(fit.form.delta):
        raise ValueError(
            f"expected a fit by least squares, got delta = {fit.form.delta}; give delta=numpy.inf to the law"
        )
    if not fit.draws.size:
        return fit
    root_R, residual_R, jacobian_RP = (
        np.sqrt(fit.rows.weight),
        *(a[0] for a in fit.form.model(fit.rows)(fit.inner[None])),
    )
    scale = 1.0 if fit.form.link == "log" else float(np.ptp(fit.rows.y))
    birge = float(np.sqrt(np.mean((residual_R * scale / sd_R) ** 2) * sd_R.size / max(sd_R.size - fit.inner.size, 1)))
    solve_PR = np.linalg.pinv(jacobian_RP * root_R[:, None]) * root_R
    normal_BR = np.random.default_rng([fit.seed, 6]).standard_normal((fit.draws.shape[0], sd_R.size))
    draws_BP = fit.inner + normal_BR * (sd_R / scale * max(birge, 1.0)) @ solve_PR.T
    doubt = (
        Verdict("weak", f"the rows scatter {birge:.2g} times more than their noise")
        if birge > SCATTER_WEAK
        else Verdict("ok")
    )
    return replace(fit, draws=draws_BP, verdict=fit.verdict.worse(doubt))
