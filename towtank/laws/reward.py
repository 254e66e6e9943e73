"""Laws of reward against compute, of loss against a pruned dataset, and of loss along a schedule at several sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from towtank.laws.loss import HUGE, SMALL, typical
from towtank.laws.parametric import Parameter, ParametricLaw, Values, grid
from towtank.laws.table import Floats


@dataclass(frozen=True, kw_only=True)
class ComputeSigmoid(ParametricLaw):
    """Reward against compute: R = R0 + (A - R0) / (1 + (Cmid / C)^B), a sigmoid in log C.

    A is the ceiling, Cmid the compute half way to it, B the steepness. Residuals are in units of the range of R; give
    `fixed={"R0": ...}` where the reward at the start is known. Leave out the first part of the run, which does not follow
    the curve (about 1.5k GPU-hours in the paper); `FormulaFit.selection` says what that choice moves.

    Example:
        >>> c = [2.0**k for k in range(10)]
        >>> fit = ComputeSigmoid().fit({"c": c, "r": [0.1 + 0.5 / (1 + (20 / v) ** 1.5) for v in c]}, x="c", y="r")
        >>> {name: round(v, 5) for name, v in fit.values.items()}
        {'R0': 0.1, 'A': 0.6, 'Cmid': 20.0, 'B': 1.5}
    """

    link: Literal["log", "identity"] = "identity"

    name: ClassVar[str] = "sigmoid"
    formula: ClassVar[str] = "R = R0 + (A - R0) / (1 + (Cmid/C)^B)"
    variables: ClassVar[Mapping[str, str]] = {"C": "compute, any unit"}
    source: ClassVar[str] = "Khatri et al. 2025, The art of scaling reinforcement learning compute, equation 1"
    needs: ClassVar[str] = "rewards from before to beyond the middle of the rise, without the first part of the run"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("R0", -HUGE, HUGE, log=False), Parameter("A", -HUGE, HUGE, log=False),
        Parameter("Cmid", SMALL, HUGE), Parameter("B", 0.05, 50.0),
    )  # fmt: skip

    def value(self, c: Values, x: Values) -> Any:
        """The formula."""
        return c["R0"] + (c["A"] - c["R0"]) / (1 + (c["Cmid"] / x["C"]) ** c["B"])

    def starts(self, x: Mapping[str, Floats], y: Floats) -> dict[str, Floats]:
        """Middles over the range of compute, and steepness; the ends from the range of the rewards."""
        g = grid(B=(0.5, 1.0, 2.0, 5.0), place=(0.1, 0.3, 0.5, 0.7, 0.9), beyond=(0.0, 0.5))
        low, high = np.log(x["C"]).min(), np.log(x["C"]).max()
        return {
            "R0": np.full(g["B"].size, y.min()), "A": y.max() + g["beyond"] * np.ptp(y),
            "Cmid": np.exp(low + g["place"] * (high - low)), "B": g["B"],
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PrunedData(ParametricLaw):
    """Loss against the size of a dataset D of which a fraction f was kept: L = E + A D^-beta f^-gamma.

    The derived `worth` = gamma / beta says what pruning is worth: the kept part counts as D f^worth examples. 1 is no better
    than leaving out examples at random; 0 loses nothing; below 0 the pruned set is better than the whole.

    Sorscher et al. 2022 (arXiv 2206.14486) ask how the error falls with D at each f and give no such formula. With a good
    order of the examples, and f falling as D grows, they find it to fall faster than any power of D: do not extrapolate
    this law along such a path.

    Example:
        >>> rows = [(d, f) for d in (1e4, 1e5, 1e6) for f in (0.2, 0.5, 1.0)]
        >>> table = {"d": [r[0] for r in rows], "f": [r[1] for r in rows],
        ...          "loss": [0.5 + 20 * d**-0.3 * f**-0.15 for d, f in rows]}
        >>> fit = PrunedData().fit(table, x={"D": "d", "f": "f"}, y="loss")
        >>> round(fit.coefficients["worth"].value, 5)
        0.5
    """

    name: ClassVar[str] = "pruned-data"
    formula: ClassVar[str] = "L = E + A D^-beta f^-gamma"
    variables: ClassVar[Mapping[str, str]] = {"D": "examples before pruning", "f": "fraction kept, 0 to 1"}
    source: ClassVar[str] = (
        "a form of this package (a power of D at each f); the question: Sorscher et al. 2022, Beyond neural scaling laws"
    )
    needs: ClassVar[str] = "losses over a decade of D, at two or more fractions kept"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("E", 0.0, HUGE, log=False), Parameter("A", SMALL, HUGE),
        Parameter("beta", 1e-3, 5.0, log=False), Parameter("gamma", -10.0, 10.0, log=False),
    )  # fmt: skip
    derived: ClassVar[Mapping[str, Callable[[Values], Any]]] = {"worth": lambda c: c["gamma"] / c["beta"]}
    meaning: ClassVar[Mapping[str, str]] = {"worth": "gamma / beta: what is kept is worth D f^worth examples"}

    def value(self, c: Values, x: Values) -> Any:
        """The formula."""
        return c["E"] + c["A"] * x["D"] ** -c["beta"] * x["f"] ** -c["gamma"]

    def starts(self, x: Mapping[str, Floats], y: Floats) -> dict[str, Floats]:
        """Exponents and floors, through the typical point."""
        g = grid(beta=(0.1, 0.3, 0.7, 1.5), worth=(0.0, 1.0), floor=(0.0, 0.5, 0.9))
        floor, gamma = g["floor"] * y.min(), g["beta"] * g["worth"]
        size = typical(x["D"]) ** g["beta"] * typical(x["f"]) ** gamma
        return {"E": floor, "A": (typical(y) - floor) * size, "beta": g["beta"], "gamma": gamma}


@dataclass(frozen=True, kw_only=True)
class AnnealedSize(ParametricLaw):
    """Loss along a schedule at several model sizes: L = E + A S1^-alpha + B N^-beta - C S2.

    S1 is the area under the learning rate so far, S2 the area by which it was annealed (0 while it is constant): see the
    annealing law, of which this is a form with model size. Tissue et al. 2024 (arXiv 2408.11029) say that theirs extends
    to model sizes; the sum written here is that of Wang et al. 2025 (arXiv 2512.13705), whose annealing term is another.

    Example:
        >>> rows = [(s, n, m) for s in (1.0, 4.0, 16.0) for n in (1e7, 1e8, 1e9) for m in (0.0, 0.5)]
        >>> table = {"s1": [r[0] for r in rows], "n": [r[1] for r in rows], "s2": [r[2] for r in rows],
        ...          "loss": [2 + 0.5 * s**-0.5 + 80 * n**-0.3 - 0.4 * m for s, n, m in rows]}
        >>> fit = AnnealedSize().fit(table, x={"S1": "s1", "N": "n", "S2": "s2"}, y="loss")
        >>> {name: round(v, 5) for name, v in fit.values.items()}
        {'E': 2.0, 'A': 0.5, 'alpha': 0.5, 'B': 80.0, 'beta': 0.3, 'C': 0.4}
    """

    name: ClassVar[str] = "annealed-size"
    formula: ClassVar[str] = "L = E + A S1^-alpha + B N^-beta - C S2"
    variables: ClassVar[Mapping[str, str]] = {"S1": "area of the rate", "N": "parameters", "S2": "annealed area"}
    source: ClassVar[str] = (
        "Tissue et al. 2024, Scaling law with learning rate annealing; the term in N as in Wang et al. 2025, "
        "Scaling and transferability of annealing strategies"
    )
    needs: ClassVar[str] = "points along the curves of three sizes or more, under a constant and a decaying rate"
    zero_allowed: ClassVar[frozenset[str]] = frozenset({"S2"})
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("E", 0.0, HUGE, log=False), Parameter("A", SMALL, HUGE), Parameter("alpha", 1e-3, 5.0, log=False),
        Parameter("B", SMALL, HUGE), Parameter("beta", 1e-3, 5.0, log=False), Parameter("C", 0.0, HUGE, log=False),
    )  # fmt: skip

    def value(self, c: Values, x: Values) -> Any:
        """The formula."""
        return c["E"] + c["A"] * x["S1"] ** -c["alpha"] + c["B"] * x["N"] ** -c["beta"] - c["C"] * x["S2"]

    def starts(self, x: Mapping[str, Floats], y: Floats) -> dict[str, Floats]:
        """Exponents and shares of the loss above a floor; no annealing."""
        g = grid(alpha=(0.2, 0.5, 1.0), beta=(0.1, 0.3, 0.7), floor=(0.3, 0.8), share=(0.3, 0.7))
        floor = g["floor"] * y.min()
        above = np.median(y) - floor
        return {
            "E": floor, "A": above * g["share"] * typical(x["S1"]) ** g["alpha"], "alpha": g["alpha"],
            "B": above * (1 - g["share"]) * typical(x["N"]) ** g["beta"], "beta": g["beta"], "C": np.zeros(floor.size),
        }  # fmt: skip
