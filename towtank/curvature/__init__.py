"""Curvature of a problem as operators, and the measurements made of them."""

from towtank.curvature.fisher import Fisher
from towtank.curvature.gauss_newton import GaussNewton
from towtank.curvature.hessian import Hessian
from towtank.curvature.kfac import EKFAC, KFAC
from towtank.curvature.landscape import Landscape, landscape
from towtank.curvature.measure import Measurement, measure
from towtank.curvature.ntk import NTK
from towtank.curvature.preconditioned import Preconditioned, adam_preconditioner

__all__ = [
    "EKFAC",
    "KFAC",
    "NTK",
    "Fisher",
    "GaussNewton",
    "Hessian",
    "Landscape",
    "Measurement",
    "Preconditioned",
    "adam_preconditioner",
    "landscape",
    "measure",
]
