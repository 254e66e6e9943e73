"""Laws: from a table of runs to an interval and a verdict. numpy and scipy only."""

from towtank.laws.fit import Backtest, Fit, fit_points
from towtank.laws.law import Law, LearningRateLaw, LossLaw, PowerLaw
from towtank.laws.loglog import Measured
from towtank.laws.optimum import Optimum, find_optimum
from towtank.laws.sensitivity import lr_sensitivity

__all__ = [
    "Backtest",
    "Fit",
    "Law",
    "LearningRateLaw",
    "LossLaw",
    "Measured",
    "Optimum",
    "PowerLaw",
    "find_optimum",
    "fit_points",
    "lr_sensitivity",
]
