"""How much wider an interval must be when few groups of rows speak: cluster-robust correction and degrees of freedom.

Capitals in names of arrays: G groups, R rows, P parameters, C contrasts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from towtank.laws.table import Floats, Ints

FULL = 0.99  # leverage above which a group alone decides a direction: its residual there says nothing


@dataclass(frozen=True, eq=False)
class Groups:
    """The linearized fit, group by group.

        residual_g -> A_g residual_g,  A_g = (1 - H_gg)^(-1/2),  H = J (J'J)^-1 J'

    Bell and McCaffrey 2002, "Bias reduction in standard errors for linear regression with multi-stage samples":
    the correction A_g, and the degrees of freedom of a t interval of each contrast.

    Args:
        root: (J'J)^(-1/2), shape (P, P).
        right: right singular vectors of the rows of J root of each group, shape (G, P, P).
        sigma: their singular values; the squares are leverages, shape (G, P).
        lift: (1 - sigma^2)^(-1/2) of each group, shape (G, P).
        score: pulls of the rows along the left singular vectors, shape (G, P).
        misfit: mean square of the corrected residuals of each group, shape (G,).
    """

    root: Floats
    right: Floats
    sigma: Floats
    lift: Floats
    score: Floats
    misfit: Floats

    def factor(self, contrast: Floats, level: float) -> Floats:
        """Ratio of the corrected half-width to that of the plain grouped bootstrap, per contrast; shape (C,).

        Args:
            contrast: derivative of each number asked for by the parameters, shape (C, P).
            level: coverage of the interval.
        """
        y = np.einsum("gpq,qc->gpc", self.right, self.root @ contrast.T) * self.sigma[:, :, None]
        plain = np.einsum("gpc,gp->gc", y, self.score)
        lifted = y * self.lift[:, :, None]
        mended = np.einsum("gpc,gp->gc", lifted, self.score)
        own = (lifted**2).sum(1)
        shared = np.einsum("gpq,gpc->gqc", self.right, lifted * self.sigma[:, :, None])
        gram = -np.einsum("gqc,hqc->cgh", shared, shared)
        index = np.arange(len(own))
        gram[:, index, index] += own.T
        trace = np.trace(gram, axis1=1, axis2=2)
        with np.errstate(divide="ignore", invalid="ignore"):
            dof = np.maximum(np.nan_to_num(trace**2 / (gram**2).sum((1, 2)), nan=1.0), 1.0)
            ratio = np.sqrt((mended**2).sum(0) / (plain**2).sum(0))
        wide = stdtrit(dof, 0.5 + level / 2) / ndtri(0.5 + level / 2)
        return np.maximum(np.nan_to_num(ratio, nan=1.0), 1.0) * wide

    def scatter(self, level: float) -> float:
        """Half-width that a new measurement adds: root mean square of the corrected residuals times a t quantile.

        Its degrees of freedom come from how differently the groups scatter (Satterthwaite 1946): groups that differ by an
        offset each count once, independent rows count one by one.
        """
        mean = self.misfit.mean()
        if len(self.misfit) < 2 or not mean:
            return float(np.sqrt(mean) * ndtri(0.5 + level / 2))
        spread = self.misfit.var(ddof=1) / len(self.misfit)
        dof = min(2 * mean**2 / spread, 1e6) if spread else 1e6
        return float(np.sqrt(mean) * stdtrit(max(dof, 1.0), 0.5 + level / 2))


def split(jacobian: Floats, residual: Floats, pull: Floats, group: Ints) -> Groups:
    """The linearized fit by groups of rows.

    Args:
        jacobian: derivatives of the residuals by the parameters, shape (R, P); parameters at a bound left at zero.
        residual: residuals, shape (R,).
        pull: derivatives of the objective by the residuals, shape (R,).
        group: group of each row, 0 .. G - 1, shape (R,).
    """
    _, s, vt = np.linalg.svd(jacobian, full_matrices=False)
    known = s > s[0] * 1e-10 if s.size else s > 0
    root = (vt[known].T / s[known]) @ vt[known]
    parts = [
        _one(jacobian[group == g] @ root, residual[group == g], pull[group == g]) for g in range(int(group.max()) + 1)
    ]
    right, sigma, lift, score, misfit = (np.array(column) for column in zip(*parts, strict=True))
    return Groups(root=root, right=right, sigma=sigma, lift=lift, score=score, misfit=misfit)


def _one(rows: Floats, residual: Floats, pull: Floats) -> tuple[Floats, Floats, Floats, Floats, float]:
    left, sigma, right = np.linalg.svd(rows, full_matrices=False)
    short = rows.shape[1] - sigma.size  # fewer rows than parameters
    left = np.pad(left, ((0, 0), (0, short)))
    right = np.pad(right, ((0, short), (0, 0)))
    sigma = np.pad(sigma, (0, short))
    lift = 1 / np.sqrt(1 - np.minimum(sigma**2, FULL))
    mended = residual + left @ ((lift - 1) * (left.T @ residual))
    return right, sigma, lift, left.T @ pull, float(np.mean(mended**2))
