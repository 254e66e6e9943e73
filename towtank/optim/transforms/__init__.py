"""What may surround any rule: functions from a rule to a rule, as pure as the rule they are given."""

from towtank.optim.transforms.low_precision import compensated, rounded, stochastic
from towtank.optim.transforms.orthograd import orthograd
from towtank.optim.transforms.quantized import quantized

__all__ = ["compensated", "orthograd", "quantized", "rounded", "stochastic"]
