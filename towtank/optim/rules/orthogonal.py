"""A matrix with all its singular values brought near one: Muon's step."""

from __future__ import annotations

import torch
from torch import Tensor

Number = float | Tensor
A, B, C = 3.4445, -4.7750, 2.0315  # the quintic, steepest at zero (Jordan 2024)
STEPS = 5


def orthogonalized(matrix: Tensor, eps: Number = 1e-7) -> Tensor:
    """Newton-Schulz: U f(S) V^T of a matrix U S V^T, with f about 1 (0.68 to 1.14) where S is not far below its norm.

    X <- M / max(||M||, eps), then five times X <- a X + (b X X^T + c (X X^T)^2) X, in the matrix's own precision.

    Example:
        >>> orthogonalized(torch.diag(torch.tensor([3.0, 2.0]))).diagonal().round(decimals=1)
        tensor([1.1000, 0.7000])

    Source: Jordan 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / torch.clamp(torch.linalg.vector_norm(x), min=eps)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x
