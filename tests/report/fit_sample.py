"""Sample answers of fits, made by hand: the compute-optimal law as published, a law of one variable, a refusal."""

from __future__ import annotations

import math

from towtank.estimate import Interval, Verdict
from towtank.laws.diagnose import Selection
from towtank.laws.fit import Confounded
from towtank.report.fit_answer import (
    FitAnswer,
    FitPoint,
    Forecast,
    Hidden,
    LeftOut,
    ProfileCurve,
    Residuals,
    Slice,
    Tested,
)

TRUE = {"A": 482.0, "alpha": 0.348, "B": 2085.0, "beta": 0.366, "E": 1.82}


def wide(value: float, factor: float = 1.1) -> Interval:
    """An interval of a factor to both sides."""
    return Interval(value, value / factor, value * factor)


def loss(n: float, d: float) -> float:
    """The law."""
    return TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]


def point(row: int, n: float, d: float) -> FitPoint:
    """A measured row, up to 2 % off."""
    off = 0.02 * math.sin(7.0 * row)
    return FitPoint(
        name=f"row {row}", x={"N": n, "D": d}, measured=loss(n, d) * math.exp(off), fitted=loss(n, d), residual=off
    )


def chinchilla(name: str = "runs.csv", column: str = "params", y: str = "loss") -> FitAnswer:
    """A law of two variables with everything a fit can tell; names are the user's."""
    sizes, lengths = [10.0 ** (7 + i / 3) for i in range(8)], (1e9, 1e10, 1e11)
    points = tuple(point(i, n, d) for i, (n, d) in enumerate((n, d) for n in sizes for d in lengths))
    held = tuple(
        Hidden(x=p.x, predicted=wide(p.fitted, 1.02), measured=p.measured * (1.05 if i == 0 else 1.0), name=p.name)
        for i, p in enumerate(points[-3:])
    )
    line = tuple((n, wide(loss(n, 1e10), 1.02)) for n in sizes)
    return FitAnswer(
        law="chinchilla", formula="L = E + A / N^alpha + B / D^beta", source="Hoffmann et al. 2022, equation 2",
        table=name, columns={"N": column, "D": "tokens"}, y=y, rows=len(points), groups=8, relative=True,
        sentence="At N = 7e+10, D = 1.4e+12 the law says 1.97.", verdict=Verdict("weak", "hiding the largest run missed"), overall=Verdict("weak", "hiding the largest run missed"),
        coefficients={k: wide(v) for k, v in TRUE.items()}, objective=0.00101827,
        residuals=Residuals(median=0.0035, rms=0.011, worst=0.02, worst_at="row 3"),
        confounded=(Confounded("A", "alpha", 0.999, "log A - 16.8 alpha", Interval(0.34, 0.32, 0.36)),),
        at_bound=("E",), influence={k: LeftOut(rows=("3", "5"), coefficients=TRUE, factor=1.2) for k in TRUE},
        selection=(Selection(y, "highest", 0.02, TRUE),),
        backtest=Tested.of(held, 1.05, False),
        forecasts=(
            Forecast(x={"N": 7e10, "D": 1.4e12}, value=Interval(1.97, 1.95, 2.0), run=Interval(1.97, 1.9, 2.04), verdict=Verdict("weak", "it is far")),
            Forecast(x={"N": 7e15, "D": 1.4e12}, value=None, run=None, verdict=Verdict("refuse", "7e+15 is too far beyond")),
        ),
        points=points, slices=(Slice(variable="N", title="at D = 1e+10", line=line, points=tuple((p.x["N"], p.measured) for p in points)),
                               Slice(variable="D", title="at N = 1e+08", line=line, points=())),
        profiles=tuple(ProfileCurve(name=k, points=tuple((v * (1 + s), 1 + 9 * s * s) for s in (-0.2, -0.1, 0, 0.1, 0.2)), interval=wide(v)) for k, v in TRUE.items()),
        warnings=("'tokens' is typically 1e5 times 'params'",), reproduce=f"towtank fit {name} --law chinchilla",
    )  # fmt: skip


def sigmoid() -> FitAnswer:
    """A law of one variable that may be 0, with absolute residuals and a forecast in the figure."""
    points = tuple(
        FitPoint(name=f"row {i}", x={"C": float(i)}, measured=0.1 * i + 0.01, fitted=0.1 * i, residual=0.01)
        for i in range(9)
    )
    line = tuple((float(i), Interval(0.1 * i, 0.1 * i - 0.02, 0.1 * i + 0.02)) for i in range(13))
    at = Forecast(x={"C": 12.0}, value=line[-1][1], run=Interval(1.2, 1.1, 1.3), verdict=Verdict("ok"))
    return FitAnswer(
        law="sigmoid", formula="R = R0 + (A - R0) / (1 + (Cmid/C)^B)", source="a paper", table="rewards.jsonl",
        columns={"C": "hours"}, y="reward", rows=9, groups=None, relative=False, sentence="It fits.", verdict=Verdict("ok"), overall=Verdict("ok"),
        coefficients={"A": wide(0.9)}, objective=0.1, residuals=Residuals(median=0.01, rms=0.01, worst=0.01, worst_at="row 0"),
        points=points, slices=(Slice(variable="C", title="", line=line, points=tuple((p.x["C"], p.measured) for p in points)),),
        forecasts=(at,),
    )  # fmt: skip


def refused() -> FitAnswer:
    """A law that could not be fitted."""
    reason = "4 rows for 5 coefficients: nothing is left to tell the error by"
    return FitAnswer(
        law="chinchilla", formula="L = E + A / N^alpha + B / D^beta", source="Hoffmann et al. 2022", table="few.csv",
        columns={"N": "n", "D": "d"}, y="loss", rows=4, groups=None, relative=True,
        sentence="The law 'chinchilla' cannot be fitted to these rows.", verdict=Verdict("refuse", reason), overall=Verdict("refuse", reason),
        coefficients={},
    )  # fmt: skip
