"""Laws of the loss: against one size, against parameters and tokens, against compute, against data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from towtank.laws.parametric import Parameter, ParametricLaw, Values, grid
from towtank.laws.table import Floats

HUGE, SMALL = 1e80, 1e-80  # bounds of coefficients whose unit is not known


def typical(x: Floats) -> float:
    """Geometric mean."""
    return float(np.exp(np.mean(np.log(x))))


def _two_terms(g: dict[str, Floats], n: Floats, d: Floats, y: Floats) -> dict[str, Floats]:
    """Coefficients of A n^-alpha + B d^-beta + E that share what the typical loss is above a floor."""
    floor = g["floor"] * y.min()
    above = np.median(y) - floor
    return {
        "A": above * g["share"] * typical(n) ** g["alpha"], "alpha": g["alpha"],
        "B": above * (1 - g["share"]) * typical(d) ** g["beta"], "beta": g["beta"], "E": floor,
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Power(ParametricLaw):
    """A power of one size, without a floor: y = A x^b.

    Example:
        >>> x = [1.0, 10.0, 100.0, 1000.0]
        >>> fit = Power().fit({"size": x, "loss": [5 * v**-0.1 for v in x]}, x="size", y="loss")
        >>> round(fit.predict(1e4).value, 6) == round(5 * 1e4**-0.1, 6)
        True
    """

    name: ClassVar[str] = "power"
    formula: ClassVar[str] = "y = A x^b"
    variables: ClassVar[Mapping[str, str]] = {"x": "any size"}
    source: ClassVar[str] = "Kaplan et al. 2020, equations 1.1 to 1.3"
    needs: ClassVar[str] = "three sizes over half a decade or more, far above any floor"
    parameters: ClassVar[tuple[Parameter, ...]] = (Parameter("A", SMALL, HUGE), Parameter("b", -10.0, 10.0, log=False))

    def value(self, c: Values, x: Values) -> Any:
        """The formula."""
        return c["A"] * x["x"] ** c["b"]

    def starts(self, x: Mapping[str, Floats], y: Floats) -> dict[str, Floats]:
        """Exponents, through the typical point."""
        g = grid(b=(-1.0, -0.1, 0.1, 1.0))
        return {"A": typical(y) / typical(x["x"]) ** g["b"], "b": g["b"]}


@dataclass(frozen=True, kw_only=True)
class PowerFloor(ParametricLaw):
    """A power of one size above a floor: y = E + A x^-b.

    Example:
        >>> x = [1.0, 10.0, 100.0, 1000.0, 1e4]
        >>> fit = PowerFloor().fit({"size": x, "loss": [2 + 3 * v**-0.3 for v in x]}, x="size", y="loss")
        >>> {name: round(v, 6) for name, v in fit.values.items()}
        {'E': 2.0, 'A': 3.0, 'b': 0.3}
    """

    name: ClassVar[str] = "power-floor"
    formula: ClassVar[str] = "y = E + A x^-b"
    variables: ClassVar[Mapping[str, str]] = {"x": "any size"}
    source: ClassVar[str] = "Henighan et al. 2020, equation 1.1"
    needs: ClassVar[str] = (
        "four sizes or more over two decades: the floor and the exponent are told apart by the bend alone"
    )
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("E", 0.0, HUGE, log=False), Parameter("A", SMALL, HUGE), Parameter("b", 1e-3, 10.0, log=False),
    )  # fmt: skip

    def value(self, c: Values, x: Values) -> Any:
        """The formula."""
        return c["E"] + c["A"] * x["x"] ** -c["b"]

    def starts(self, x: Mapping[str, Floats], y: Floats) -> dict[str, Floats]:
        """Exponents and floors, through the typical point."""
        g = grid(b=(0.05, 0.2, 0.5, 1.0, 2.0), floor=(0.0, 0.5, 0.9, 0.99))
        floor = g["floor"] * y.min()
        return {"E": floor, "A": (typical(y) - floor) * typical(x["x"]) ** g["b"], "b": g["b"]}


@dataclass(frozen=True, kw_only=True)
class Saturating(ParametricLaw):
    """A power that starts from a plateau: y = a (x + b)^c + d with c < 0.

    Example:
        >>> x = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]
        >>> fit = Saturating().fit({"size": x, "err": [2 * (v + 5) ** -0.5 + 0.1 for v in x]}, x="size", y="err")
        >>> {name: round(v, 5) for name, v in fit.values.items()}
        {'a': 2.0, 'b': 5.0, 'c': -0.5, 'd': 0.1}
    """

    name: ClassVar[str] = "saturating"
    formula: ClassVar[str] = "y = a (x + b)^c + d, c < 0"
    variables: ClassVar[Mapping[str, str]] = {"x": "any size"}
    source: ClassVar[str] = (
        "Nezhurina et al. 2025, scaling laws for robust comparison, section 3; Alabdulmohsin et al. 2022"
    )
    needs: ClassVar[str] = "six sizes or more, from where the curve is still flat to where it bends into its floor"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("a", SMALL, HUGE), Parameter("b", 0.0, HUGE, log=False),
        Parameter("c", -10.0, -1e-3, log=False), Parameter("d", 0.0, HUGE, log=False),
    )  # fmt: skip

    def value(self, c: Values, x: Values) -> Any:
        """The formula."""
        return c["a"] * (x["x"] + c["b"]) ** c["c"] + c["d"]

    def starts(self, x: Mapping[str, Floats], y: Floats) -> dict[str, Floats]:
        """Exponents, floors and plateaus, through the typical point."""
        g = grid(c=(-0.1, -0.3, -0.7, -1.5), floor=(0.0, 0.5, 0.9), plateau=(0.0, 0.3, 3.0, 30.0))
        floor, b = g["floor"] * y.min(), g["plateau"] * x["x"].min()
        return {"a": (typical(y) - floor) / (typical(x["x"]) + b) ** g["c"], "b": b, "c": g["c"], "d": floor}


@dataclass(frozen=True, kw_only=True)
class Chinchilla(ParametricLaw):
    """Loss against parameters and tokens: L = E + A / N^alpha + B / D^beta; `laws.allocation.allocate` spends a budget.

    The derived `a` = beta / (alpha + beta) is the exponent of the optimal N against compute.

    Example:
        >>> rows = [(n, d) for n in (1e7, 1e8, 1e9, 1e10) for d in (1e9, 1e10, 1e11)]
        >>> table = {"n": [r[0] for r in rows], "d": [r[1] for r in rows],
        ...          "loss": [1.8 + 480 / n**0.35 + 2100 / d**0.37 for n, d in rows]}
        >>> fit = Chinchilla(draws=50).fit(table, x={"N": "n", "D": "d"}, y="loss")
        >>> {name: round(v, 6) for name, v in fit.values.items()}
        {'A': 480.0, 'alpha': 0.35, 'B': 2100.0, 'beta': 0.37, 'E': 1.8}
    """

    name: ClassVar[str] = "chinchilla"
    formula: ClassVar[str] = "L = E + A / N^alpha + B / D^beta"
    variables: ClassVar[Mapping[str, str]] = {"N": "parameters", "D": "tokens"}
    source: ClassVar[str] = "Hoffmann et al. 2022, equation 2; Besiroglu et al. 2024"
    needs: ClassVar[str] = "final losses over a decade or more of N and of D, not along one line of D / N"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("A", SMALL, HUGE), Parameter("alpha", 1e-3, 3.0, log=False),
        Parameter("B", SMALL, HUGE), Parameter("beta", 1e-3, 3.0, log=False), Parameter("E", 0.0, HUGE, log=False),
    )  # fmt: skip
    derived: ClassVar[Mapping[str, Callable[[Values], Any]]] = {"a": lambda c: c["beta"] / (c["alpha"] + c["beta"])}
    meaning: ClassVar[Mapping[str, str]] = {
        "a": "beta / (alpha + beta): the best N for a compute C grows as C^a, and the best D as C^(1 - a)"
    }

    def value(self, c: Values, x: Values) -> Any:
        """The formula."""
        return c["E"] + c["A"] * x["N"] ** -c["alpha"] + c["B"] * x["D"] ** -c["beta"]

    def slopes(self, c: Values, x: Values) -> tuple[Any, Values]:
        """The formula with its derivatives, given because this law is refitted by the thousand."""
        log_n, log_d = np.log(x["N"]), np.log(x["D"])
        n, d = np.exp(-c["alpha"] * log_n), np.exp(-c["beta"] * log_d)
        terms = {"A": n, "alpha": -c["A"] * n * log_n, "B": d, "beta": -c["B"] * d * log_d, "E": np.ones(1)}
        return c["E"] + c["A"] * n + c["B"] * d, terms

    def starts(self, x: Mapping[str, Floats], y: Floats) -> dict[str, Floats]:
        """Exponents, and shares of the typical loss above a floor."""
        g = grid(alpha=(0.2, 0.5, 1.0), beta=(0.2, 0.5, 1.0), floor=(0.3, 0.8), share=(0.3, 0.7))
        return _two_terms(g, x["N"], x["D"], y)


@dataclass(frozen=True, kw_only=True)
class OverTraining(ParametricLaw):
    """Loss against parameters N and tokens per parameter M: L = E + a N^b + beta 6^(b/2) (M N)^b; least squares.

    Both terms share one exponent, so that at fixed M the loss is a power of compute 6 M N^2 above the floor.

    Example:
        >>> rows = [(n, m) for n in (1e7, 1e8, 1e9) for m in (5, 20, 320)]
        >>> table = {"n": [r[0] for r in rows], "m": [r[1] for r in rows], "loss": [
        ...     1.8 + 160 * n**-0.27 + 360 * 6**-0.135 * (m * n) ** -0.27 for n, m in rows]}
        >>> fit = OverTraining().fit(table, x={"N": "n", "M": "m"}, y="loss")
        >>> {name: round(v, 4) for name, v in fit.values.items()}
        {'a': 160.0, 'beta': 360.0, 'b': -0.27, 'E': 1.8}
    """

    delta: float = np.inf
    link: Literal["log", "identity"] = "identity"

    name: ClassVar[str] = "over-training"
    formula: ClassVar[str] = "L = E + a N^b + beta 6^(b/2) (M N)^b"
    variables: ClassVar[Mapping[str, str]] = {"N": "parameters", "M": "tokens per parameter"}
    source: ClassVar[str] = "Gadre et al. 2024, equation 4"
    needs: ClassVar[str] = "five small runs, one of them trained on many more tokens per parameter"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("a", SMALL, HUGE), Parameter("beta", SMALL, HUGE),
        Parameter("b", -3.0, -1e-3, log=False), Parameter("E", 0.0, HUGE, log=False),
    )  # fmt: skip

    def value(self, c: Values, x: Values) -> Any:
        """The formula."""
        return c["E"] + c["a"] * x["N"] ** c["b"] + c["beta"] * (6**0.5 * x["M"] * x["N"]) ** c["b"]

    def starts(self, x: Mapping[str, Floats], y: Floats) -> dict[str, Floats]:
        """One exponent for both terms, and shares of the typical loss above a floor."""
        g = grid(alpha=(0.1, 0.25, 0.5, 1.0), floor=(0.2, 0.5, 0.8), share=(0.2, 0.5, 0.8))
        two = _two_terms({**g, "beta": g["alpha"]}, x["N"], 6**0.5 * x["M"] * x["N"], y)
        return {"a": two["A"], "beta": two["B"], "b": -two["alpha"], "E": two["E"]}
