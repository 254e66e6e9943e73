"""Laws: from a table of runs to an interval and a verdict. numpy and scipy only."""

from towtank.laws.allocation import allocate
from towtank.laws.annealing import AnnealingLaw
from towtank.laws.batch import BatchRateLaw, CriticalBatchLaw
from towtank.laws.crossover import crossover
from towtank.laws.fit import Backtest, Fit
from towtank.laws.law import Law, LearningRateLaw, LossLaw, PowerLaw
from towtank.laws.loglog import Measured
from towtank.laws.loss import Chinchilla, OverTraining, Power, PowerFloor, Saturating
from towtank.laws.multipower import MultiPowerLaw
from towtank.laws.noise_scale import NoiseScaleLaw
from towtank.laws.optimum import Optimum, find_optimum
from towtank.laws.parametric import Parameter, ParametricLaw
from towtank.laws.product import AllocationLaw, BatchLaw, HorizonLaw, RateLaw
from towtank.laws.reward import AnnealedSize, ComputeSigmoid, PrunedData
from towtank.laws.sensitivity import lr_sensitivity
from towtank.laws.size_fit import SizeFit, fit_points
from towtank.laws.stability import AttentionLogitLaw, GradientRMSLaw
from towtank.laws.tuning import SweepLaw

LAWS: tuple[Law, ...] = (
    Power(), PowerFloor(), Saturating(), Chinchilla(), OverTraining(), PrunedData(), ComputeSigmoid(),
    AnnealingLaw(), AnnealedSize(), MultiPowerLaw(), RateLaw(), BatchLaw(), SweepLaw(),
    SweepLaw(name="sweep-batch", of="batch"),
    SweepLaw(name="sweep-horizon", tuned=("lr",), sizes=("D",), form=HorizonLaw()), AllocationLaw(), HorizonLaw(),
    BatchRateLaw(), CriticalBatchLaw(), NoiseScaleLaw(), AttentionLogitLaw(), GradientRMSLaw(),
)  # fmt: skip

__all__ = [
    "LAWS",
    "AllocationLaw",
    "AnnealedSize",
    "AnnealingLaw",
    "AttentionLogitLaw",
    "Backtest",
    "BatchLaw",
    "BatchRateLaw",
    "Chinchilla",
    "ComputeSigmoid",
    "CriticalBatchLaw",
    "Fit",
    "GradientRMSLaw",
    "HorizonLaw",
    "Law",
    "LearningRateLaw",
    "LossLaw",
    "Measured",
    "MultiPowerLaw",
    "NoiseScaleLaw",
    "Optimum",
    "OverTraining",
    "Parameter",
    "ParametricLaw",
    "Power",
    "PowerFloor",
    "PowerLaw",
    "PrunedData",
    "RateLaw",
    "Saturating",
    "SizeFit",
    "SweepLaw",
    "allocate",
    "crossover",
    "find_optimum",
    "fit_points",
    "lr_sensitivity",
]
