"""Vertices of local polynomials through a window of a loss curve: three points or five, level or skewed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from towtank.laws.table import Floats, Ints

NARROW, WIDE = (1.05, 1), (2.1, 2)  # octaves either side, and at least so many points either side
NEWTON_STEPS = 8


def window(x: Floats, center: int, octaves: float, points: int) -> Ints:
    """Indices of the ascending `x` within so many octaves, or so many points, of the one at `center`.

    Example:
        >>> window(np.array([-9.0, -8.0, -7.0, -6.0, -5.0]), 1, 1.05, 1)
        array([0, 1, 2])
    """
    index = np.arange(x.size)
    return index[(np.abs(x - x[center]) <= octaves) | (np.abs(index - center) <= points)]


@dataclass(frozen=True)
class LocalFit:
    """A polynomial in x - x[center], as a linear map from the levels.

    Args:
        matrix: coefficients (constant, x, ..., x^4) of unit levels, shape (5, K).
        misfit: maps levels to weighted residuals in the wide window, shape (M, K).
        parameters: numbers fitted in the wide window; a point outside the fit's own window counts as one.
        span: ends of the window relative to the center, octaves.
    """

    matrix: Floats
    misfit: Floats
    parameters: int
    span: tuple[float, float]

    def vertex(self, level_BK: Floats) -> tuple[Floats, Floats, Floats]:
        """Position (from the center), value and half the second derivative of the minimum; NaN if none is in the window.

        Newton's method on the derivative, from the center; one step is exact for a parabola.
        """
        p = self.matrix @ level_BK.T
        slope, bend = p[1:] * np.arange(1, 5)[:, None], p[2:] * np.array([2, 6, 12])[:, None]
        v = np.zeros(len(level_BK))
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for _ in range(NEWTON_STEPS if self.matrix[3:].any() else 1):
                v = np.clip(v - _horner(slope, v) / _horner(bend, v), *self.span)
            settled = np.abs(_horner(slope, v) / _horner(bend, v)) < 1e-6
        good = settled & (_horner(bend, v) > 0)
        return np.where(good, v, np.nan), _horner(p, v), _horner(bend, v) / 2


def _horner(coefficients: Floats, x: Floats) -> Floats:
    total = np.zeros_like(x)
    for c in coefficients[::-1]:
        total = total * x + c
    return total


def local_fits(x: Floats, weight: Floats, center: int) -> tuple[LocalFit, ...]:
    """The fits about one point: narrow parabola, and through more points parabola, cubic and quartic.

    Args:
        x: log2 of the rates, ascending, shape (K,).
        weight: number of runs at each, shape (K,).
        center: index of the lowest level; not the first and not the last.
    """
    narrow, wide = window(x, center, *NARROW), window(x, center, *WIDE)
    fits = [_fit(x, weight, center, narrow, wide, 2)]
    if wide.size > 3:
        fits += [_fit(x, weight, center, wide, wide, degree) for degree in range(2, min(wide.size, 5))]
    return tuple(fits)


def _fit(x: Floats, weight: Floats, center: int, own: Ints, wide: Ints, degree: int) -> LocalFit:
    unit = np.eye(x.size)
    powers = (x[wide] - x[center])[:, None] ** np.arange(degree + 1)
    inside = np.isin(wide, own)
    root = np.sqrt(weight[wide])[:, None]
    solve = np.linalg.pinv(powers[inside] * root[inside]) @ (root[inside] * unit[own])
    misfit = (root * (unit[wide] - powers @ solve))[inside]
    matrix = np.vstack([solve, np.zeros((4 - degree, x.size))])
    span = (float(x[own[0]] - x[center]), float(x[own[-1]] - x[center]))
    return LocalFit(matrix, misfit, degree + 1 + int((~inside).sum()), span)


def akaike_weights(fits: tuple[LocalFit, ...], level_K: Floats, variance_B: Floats) -> Floats:
    """Weight of each fit for each noise variance, shape (M, B).

    exp(-AIC / 2), AIC = chi^2 + 2 parameters (Burnham and Anderson 2002, Model selection and multimodel inference,
    section 2.9). The narrow parabola, the cubic and the quartic all answer a wide parabola that misfits, so they share
    a weight: where the noise is too small to hide the misfit, how far they differ is what is not known.

    Example:
        >>> fits = local_fits(np.arange(5.0), np.ones(5), 2)
        >>> akaike_weights(fits, (np.arange(5.0) - 2) ** 2, np.array([1e-4])).round(2)[:, 0]
        array([0.13, 0.61, 0.13, 0.13])
    """
    if len(fits) == 1:
        return np.ones((1, variance_B.size))
    aic = np.stack([np.sum((f.misfit @ level_K) ** 2) / variance_B + 2 * f.parameters for f in fits])
    weight = np.exp(-(aic - aic.min(axis=0)) / 2)
    rest = np.arange(len(fits)) != 1
    weight[rest] = weight[rest].mean(axis=0)
    return weight / weight.sum(axis=0)
