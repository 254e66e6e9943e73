"""Any fit to its answer."""

from __future__ import annotations

from collections.abc import Mapping

from towtank.laws.curve_fit import CurveFit
from towtank.laws.fit import Fit
from towtank.laws.formula_fit import FormulaFit
from towtank.laws.schedules import Schedule
from towtank.laws.size_fit import SizeFit
from towtank.report.fit_answer import Asked, FitAnswer
from towtank.report.fit_curves import answer_curves
from towtank.report.fit_formula import answer_formula
from towtank.report.fit_size import answer_size


def answer_fit(fit: Fit, asked: Asked, schedules: Mapping[str, Schedule] | None = None) -> FitAnswer:
    """Everything that can be told of a fit.

    Args:
        fit: what a law's `fit` returned.
        asked: what was asked of it.
        schedules: for a law of loss curves the runs to predict, by name.

    Raises:
        TypeError: if it is no fit that can be shown.
        ValueError: if what was asked does not go with the fit.
    """
    if isinstance(fit, FormulaFit):
        return answer_formula(fit, asked)
    if isinstance(fit, SizeFit):
        return answer_size(fit, asked)
    if isinstance(fit, CurveFit):
        return answer_curves(fit, asked, schedules or {})
    raise TypeError(f"expected a fit of a law, got {type(fit).__name__}")
