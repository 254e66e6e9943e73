"""The gradient noise scale from squared norms of gradients of batches of several sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from towtank.laws.batch import ratio
from towtank.laws.parametric import Parameter, ParametricLaw, Values
from towtank.laws.table import Floats


@dataclass(frozen=True, kw_only=True)
class NoiseScaleLaw(ParametricLaw):
    """Mean squared norm of the gradient of a batch against its size: the noise scale predicts the critical batch size.

        E |g_b|^2 = |G|^2 + tr(Sigma) / b = |G|^2 (1 + B_simple / b),  B_simple = tr(Sigma) / |G|^2

    The fit is least squares on the squared norms themselves, not on their logarithms, so with two batch sizes it is the
    unbiased pair of McCandlish et al. 2018, "An empirical model of large-batch training", equations A.2 and A.3:

        |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b),   tr(Sigma) = (|g_b|^2 - |g_B|^2) / (1/b - 1/B)

    averaged over steps before they are divided. Norms measured in one training step share its data: give the step as
    `groups`. With three or more batch sizes the small ones are the noisiest; `weights` may say so. Where the gradient
    cannot be told from its noise, the interval of |G|^2 reaches below 0 and that of B_simple has no upper end.

    Example:
        >>> fit = NoiseScaleLaw().fit({"step": [0, 0, 1, 1, 2, 2], "batch": [8, 64] * 3,
        ...                            "square": [3.1, 1.3, 2.9, 1.2, 3.0, 1.25]}, x="batch", y="square", groups="step")
        >>> round(fit.coefficients["trace"].value, 3), round(fit.coefficients["B_simple"].value, 3)
        (16.0, 16.0)
    """

    delta: float = np.inf
    link: Literal["log", "identity"] = "identity"

    name: ClassVar[str] = "noise-scale"
    formula: ClassVar[str] = "|g|^2 = G2 + trace/b,  B_simple = trace/G2"
    variables: ClassVar[dict[str, str]] = {"b": "batch size, examples or tokens"}
    source: ClassVar[str] = "McCandlish et al. 2018, equations A.2 and A.3"
    needs: ClassVar[str] = "squared gradient norms at two or more batch sizes, at 20 or more steps of nearly one loss"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("G2", -np.inf, np.inf, log=False),
        Parameter("trace", -np.inf, np.inf, log=False),
    )
    derived: ClassVar[dict[str, Any]] = {"B_simple": lambda c: ratio(c["trace"], c["G2"])}

    def value(self, c: Values, x: Values) -> Any:
        """The formula."""
        return c["G2"] + c["trace"] / x["b"]

    def starts(self, x: Mapping[str, Floats], y: Floats) -> dict[str, Floats]:
        """Anywhere: the law is linear in its coefficients."""
        return {"G2": np.array([y.mean()]), "trace": np.array([0.0])}
