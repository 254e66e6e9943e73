"""Neural collapse: how far the last features and the classifier are from a simplex.

N examples, K classes, d features. H_Nd: features, the input of the last linear layer; W_Kd: its weights; mu_c: mean of the
features of class c; mu_G: mean of the class means; M_Kd: rows mu_c - mu_G. Every class counts once in mu_G and S_B, every
example once in S_W. On balanced data these are the definitions of Papyan, Han and Donoho; on imbalanced data a simplex of
class means stays a simplex, which it would not with mu_G weighted by class size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from towtank.signals.step import CannotTell

F64 = torch.float64


@dataclass(frozen=True, kw_only=True)
class NeuralCollapse:
    """Distances from neural collapse; each is 0 when it is complete.

    Args:
        nc1: tr(S_W pinv(S_B)) / K, spread within classes against spread between them.
        equinorm_features: standard deviation over mean of |mu_c - mu_G| over the classes.
        equinorm_weights: the same of |w_c|.
        equiangle_features: mean over pairs of classes of |cos(mu_c - mu_G, mu_k - mu_G) + 1 / (K - 1)|.
        equiangle_weights: the same of cos(w_c, w_k).
        nc3: |W / |W| - M / |M||, Frobenius, between 0 and 2. Figure 5 of the paper shows its square.
        nc4: share of examples whose nearest class mean is not the class that the model predicts; NaN if not asked.
        classes: K.
        examples: N.
        smallest: number of examples of the rarest class: with few, class means and S_W are noisy.
    """

    nc1: float
    equinorm_features: float
    equinorm_weights: float
    equiangle_features: float
    equiangle_weights: float
    nc3: float
    nc4: float
    classes: int
    examples: int
    smallest: int


@dataclass(frozen=True, eq=False)
class CollapseStatistics:
    """Class counts, class means and the scatter within classes of features that come in batches, in float64.

    Any order of batches and any split among processes gives the same up to rounding: parts are joined by the formula of Chan,
    in which no large numbers cancel. Memory: K d + d^2 numbers.

    Args:
        counts_K: number of examples of each class.
        means_Kd: mean feature of each class; zeros for classes not seen.
        scatter_dd: sum over examples of (h - mu_c) (h - mu_c)^T.

    Example:
        >>> empty = CollapseStatistics.empty(2, 1)
        >>> part = empty.update(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]))
        >>> both = part.merge(empty.update(torch.tensor([[5.0], [7.0]]), torch.tensor([0, 1])))
        >>> both.counts_K.tolist(), both.means_Kd.tolist(), both.scatter_dd.tolist()
        ([3.0, 1.0], [[3.0], [7.0]], [[8.0]])

    Source: Chan, Golub, LeVeque 1983, equations 2.1.
    """

    counts_K: Tensor
    means_Kd: Tensor
    scatter_dd: Tensor

    @classmethod
    def empty(cls, classes: int, size: int, device: torch.device | str | None = None) -> CollapseStatistics:
        """Statistics of nothing, for K classes and d features."""
        shapes = ((classes,), (classes, size), (size, size))
        return cls(*(torch.zeros(shape, dtype=F64, device=device) for shape in shapes))

    def update(self, features: Tensor, labels: Tensor) -> CollapseStatistics:
        """With the examples of a batch added.

        Args:
            features: (N, d).
            labels: (N,) class of each, between 0 and K - 1.

        Raises:
            ValueError: if shapes or labels do not fit.
            CannotTell: if a feature is not finite.
        """
        K, d = self.means_Kd.shape
        H_Nd, y_N = _wide(features), labels.to(self.counts_K.device).long()
        if H_Nd.shape != (len(y_N), d) or y_N.ndim != 1:
            raise ValueError(
                f"expected features (N, {d}) and labels (N,), got {tuple(H_Nd.shape)} and {tuple(y_N.shape)}"
            )
        if len(y_N) and not (0 <= int(y_N.min()) and int(y_N.max()) < K):
            raise ValueError(f"expected labels from 0 to {K - 1}, got {int(y_N.min())} to {int(y_N.max())}")
        if not bool(H_Nd.isfinite().all()):
            raise CannotTell("expected finite features, got NaN or infinity; look where the activations blow up")
        counts_K = torch.bincount(y_N, minlength=K).to(F64)
        means_Kd = _class_means(H_Nd, y_N, counts_K)
        rest_Nd = H_Nd - means_Kd[y_N]
        return self.merge(CollapseStatistics(counts_K, means_Kd, rest_Nd.T @ rest_Nd))

    def merge(self, other: CollapseStatistics) -> CollapseStatistics:
        """Of the examples of both, such as those of two processes.

        Raises:
            ValueError: if classes or features differ in number.
        """
        if self.means_Kd.shape != other.means_Kd.shape:
            mine, theirs = tuple(self.means_Kd.shape), tuple(other.means_Kd.shape)
            raise ValueError(f"expected statistics of as many classes and features, got {mine} and {theirs}")
        total_K = self.counts_K + other.counts_K
        share_K1 = (other.counts_K / total_K.clamp(min=1))[:, None]
        step_Kd = other.means_Kd - self.means_Kd
        between_dd = (step_Kd * share_K1 * self.counts_K[:, None]).T @ step_Kd
        means_Kd = self.means_Kd + share_K1 * step_Kd
        return CollapseStatistics(total_K, means_Kd, self.scatter_dd + other.scatter_dd + between_dd)

    def disagreements(self, features: Tensor, predictions: Tensor) -> int:
        """Number of examples whose nearest class mean is not the predicted class: a second look at the data.

        Args:
            features: (N, d).
            predictions: (N,) classes.
        """
        center_d = self.means_Kd.mean(dim=0)
        M_Kd = self.means_Kd - center_d
        distances_NK = M_Kd.square().sum(dim=1) - 2 * (_wide(features) - center_d) @ M_Kd.T  # but for |h|^2
        return int((distances_NK.argmin(dim=1) != predictions.to(distances_NK.device)).sum())

    def measures(self, weights: Tensor, nc4: float = math.nan) -> NeuralCollapse:
        """NC1 to NC3 of what was gathered.

        Args:
            weights: (K, d) of the last layer.
            nc4: to be passed on.

        Raises:
            ValueError: if the weights are not of shape (K, d).
            CannotTell: if there are fewer than two classes, a class was not seen, or all class means are equal.
        """
        K, d = self.means_Kd.shape
        if weights.shape != (K, d):
            raise ValueError(f"expected weights ({K}, {d}), got {tuple(weights.shape)}; give those of the last layer")
        if K < 2:
            raise CannotTell(f"expected at least two classes, got {K}")
        unseen = (self.counts_K == 0).nonzero().flatten().tolist()
        if unseen:
            raise CannotTell(f"expected examples of all {K} classes, got none of {unseen[:5]}; measure more batches")
        M_Kd, W_Kd = self.means_Kd - self.means_Kd.mean(dim=0), _wide(weights).to(self.means_Kd.device)
        return NeuralCollapse(
            nc1=self._nc1(M_Kd),
            equinorm_features=_equinorm(M_Kd),
            equinorm_weights=_equinorm(W_Kd),
            equiangle_features=_equiangle(M_Kd),
            equiangle_weights=_equiangle(W_Kd),
            nc3=float((W_Kd / W_Kd.norm() - M_Kd / M_Kd.norm()).norm()),
            nc4=nc4,
            classes=K,
            examples=int(self.counts_K.sum()),
            smallest=int(self.counts_K.min()),
        )

    def _nc1(self, M_Kd: Tensor) -> float:
        """With M^T = U s V^T, S_B = U s^2 U^T / K and tr(S_W pinv(S_B)) / K = sum_j u_j^T S_W u_j / s_j^2.

        Raises:
            CannotTell: if all class means are equal.
        """
        U_dr, s_r, _ = torch.linalg.svd(M_Kd.T, full_matrices=False)
        U_dr, s_r = U_dr[:, : len(M_Kd) - 1], s_r[: len(M_Kd) - 1]  # centered: at most K - 1 directions
        rounding = torch.finfo(F64).eps * max(M_Kd.shape) * self.means_Kd.norm()
        U_dr, s_r = U_dr[:, s_r > rounding], s_r[s_r > rounding]
        if not len(s_r):
            raise CannotTell("expected class means that differ, got equal ones: there is no spread between classes")
        return float(((self.scatter_dd @ U_dr * U_dr).sum(dim=0) / s_r.square()).sum() / self.counts_K.sum())


def neural_collapse(features: Tensor, labels: Tensor, weights: Tensor, predictions: Tensor) -> NeuralCollapse:
    """NC1 to NC4 of features that are all in memory.

    NC1 = tr(S_W pinv(S_B)) / K with S_W = mean over examples of (h - mu_c)(h - mu_c)^T and S_B = mean over classes of
    (mu_c - mu_G)(mu_c - mu_G)^T.

    Args:
        features: (N, d), the input of the last layer.
        labels: (N,) true classes.
        weights: (K, d) of the last layer.
        predictions: (N,) classes that the model predicts.

    Raises:
        ValueError: if shapes do not fit.
        CannotTell: if a class has no example, or a feature is not finite.

    Example:
        Two classes at -1 and 1 with spread 1/2 and a classifier that points the same way.

        >>> h = torch.tensor([[-1.5], [-0.5], [0.5], [1.5]])
        >>> found = neural_collapse(h, torch.tensor([0, 0, 1, 1]), torch.tensor([[-3.0], [3.0]]), torch.tensor([0, 0, 1, 1]))
        >>> [round(x, 12) for x in (found.nc1, found.equinorm_features, found.equiangle_features, found.nc3, found.nc4)]
        [0.125, 0.0, 0.0, 0.0, 0.0]

    Source: Papyan, Han, Donoho 2020, "Prevalence of neural collapse", figures 2 to 7.
    """
    empty = CollapseStatistics.empty(len(weights), features.shape[-1], home(features))
    found = empty.update(features, labels)
    return found.measures(weights, found.disagreements(features, predictions) / max(len(features), 1))


def home(x: Tensor) -> torch.device:
    """Where float64 statistics of a tensor are kept: its device, or the CPU where that has no float64."""
    return torch.device("cpu") if x.device.type == "mps" else x.device


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(home(x)).to(F64)


def _class_means(x_Nd: Tensor, y_N: Tensor, counts_K: Tensor) -> Tensor:
    sums_Kd = torch.zeros(len(counts_K), x_Nd.shape[1], dtype=F64, device=x_Nd.device).index_add_(0, y_N, x_Nd)
    return sums_Kd / counts_K.clamp(min=1)[:, None]


def _equinorm(vectors_Kd: Tensor) -> float:
    norms_K = vectors_Kd.norm(dim=1)
    return float(norms_K.std(correction=0) / norms_K.mean())


def _equiangle(vectors_Kd: Tensor) -> float:
    K = len(vectors_Kd)
    unit_Kd = vectors_Kd / vectors_Kd.norm(dim=1, keepdim=True)
    off_KK = (unit_Kd @ unit_Kd.T + 1 / (K - 1)).abs().fill_diagonal_(0)
    return float(off_KK.sum() / (K * (K - 1)))
