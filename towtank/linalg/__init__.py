"""Matrix-free algorithms: they know vectors and operators, not networks."""

from towtank.linalg.density import SpectralDensity, spectral_density
from towtank.linalg.diagonal import diagonal, inverse_diagonal
from towtank.linalg.eigsh import Eigenpairs, eigsh
from towtank.linalg.logdet import logdet
from towtank.linalg.norm import frobenius_norm
from towtank.linalg.operator import LinearOperator
from towtank.linalg.solve import Solution, solve
from towtank.linalg.trace import trace

__all__ = [
    "Eigenpairs",
    "LinearOperator",
    "Solution",
    "SpectralDensity",
    "diagonal",
    "eigsh",
    "frobenius_norm",
    "inverse_diagonal",
    "logdet",
    "solve",
    "spectral_density",
    "trace",
]
