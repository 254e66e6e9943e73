"""Worlds whose curvature is known in closed form: the oracles of tests that know nothing of our code.

Networks come as `World`: a model, a loss, one batch, and the dense matrices, in the order of `model.parameters()`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

F64 = torch.float64


@dataclass(frozen=True)
class World:
    """A model at some parameters with its exact Hessian.

    `hessian` is (P, P) of the mean loss; `gauss_newton` is what it would be for a linear model at the same outputs;
    `fisher_trace` is that of the exact Fisher matrix, where the loss is a likelihood; `eigenvalues` are ascending.
    """

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    data: tuple[Tensor, Tensor]
    hessian: Tensor
    gauss_newton: Tensor
    eigenvalues: Tensor
    fisher_trace: float | None = None


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def orthogonal(size: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


def matrix(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    U = orthogonal(len(eigenvalues), seed)
    A = (U * eigenvalues.double()) @ U.T
    return (A + A.T) / 2


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over examples of |outputs - targets|^2 / 2."""
    return 0.5 * (outputs - targets).square().sum(dim=-1).mean()


def linear_regression(n: int = 40, size: int = 12, seed: int = 0) -> World:
    """Outputs X theta and half the mean squared error: Hessian X^T X / n anywhere."""
    X, y = normal(n, size, seed=seed), normal(n, 1, seed=seed + 1)
    H = X.T @ X / n
    return World(_linear(normal(1, size, seed=seed + 2)), half_squared_error, (X, y), H, H, torch.linalg.eigvalsh(H))


def logistic_regression(n: int = 40, size: int = 8, seed: int = 0) -> World:
    """Logits X theta and binary cross-entropy: Hessian = Fisher = mean p (1 - p) x x^T, trace mean p (1 - p) |x|^2."""
    X, theta = normal(n, size, seed=seed), 0.5 * normal(1, size, seed=seed + 2)
    y = (torch.rand(n, 1, generator=generator(seed + 1), dtype=F64) < 0.5).double()
    p = torch.sigmoid(X @ theta.T)
    H = (X * p * (1 - p)).T @ X / n
    trace = float((p * (1 - p) * X.square().sum(dim=1, keepdim=True)).mean())
    bce = nn.functional.binary_cross_entropy_with_logits
    return World(_linear(theta), bce, (X, y), H, H, torch.linalg.eigvalsh(H), trace)


def quadratic_bowl(eigenvalues: Tensor, seed: int = 0) -> World:
    """Outputs |Lambda|^(1/2) U^T theta and loss sum_i sign(lambda_i) o_i^2 / 2: Hessian U Lambda U^T, also if indefinite.

    The Gauss-Newton matrix is the same: the outputs are linear in theta.
    """
    U, signs = orthogonal(len(eigenvalues), seed), eigenvalues.double().sign()
    X = eigenvalues.double().abs().sqrt()[:, None] * U.T

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (signs.to(outputs) * (outputs - targets)[:, 0].square()).sum()

    H = (U * eigenvalues.double()) @ U.T
    theta = normal(1, len(eigenvalues), seed=seed + 1)
    zeros = torch.zeros(len(eigenvalues), 1, dtype=F64)
    return World(_linear(theta), loss, (X, zeros), H, H, eigenvalues.double().sort().values)


def two_layer_linear(d: int = 4, h: int = 5, o: int = 3, seed: int = 0) -> World:
    """Outputs W2 W1 x at a minimum, with white inputs: eigenvalues a_i + b_j and zeros.

    With (1/n) X^T X = I, half the squared error is |W2 W1 - M|^2 / 2. At M = W2 W1 its Hessian is J^T J, and J J^T takes
    E to E W1^T W1 + W2 W2^T E: its eigenvalues are those of W2 W2^T plus those of W1^T W1.
    """
    return deep_linear([normal(h, d, seed=seed) / h**0.5, normal(o, h, seed=seed + 1) / h**0.5], seed + 2)


def deep_linear(weights: list[Tensor], seed: int = 0) -> World:
    """Outputs W_L ... W_1 x at a minimum with white inputs: J J^T = sum_l A_l (x) B_l.

    A_l = (W_L ... W_{l+1}) (W_L ... W_{l+1})^T and B_l = (W_{l-1} ... W_1)^T (W_{l-1} ... W_1). The nonzero eigenvalues of
    the Hessian J^T J are those of this (o d, o d) matrix.
    """
    d, o = weights[0].shape[1], weights[-1].shape[0]
    X = _white(2 * d, d, seed)
    before, after = [torch.eye(d, dtype=F64)], [torch.eye(o, dtype=F64)]
    for W in weights[:-1]:
        before.append(W @ before[-1])
    for W in weights[:0:-1]:
        after.append(after[-1] @ W)
    after.reverse()
    # row-major vec(dM) = sum_l (after_l (x) before_l^T) vec(dW_l)
    J = torch.cat([torch.kron(a, b.T.contiguous()) for a, b in zip(after, before)], dim=1)
    gram = sum(torch.kron(a @ a.T, b.T @ b) for a, b in zip(after, before))
    assert isinstance(gram, Tensor)
    nonzero = torch.linalg.eigvalsh(gram)[-min(J.shape) :]
    eigenvalues = torch.cat([torch.zeros(J.shape[1] - len(nonzero), dtype=F64), nonzero]).sort().values
    layers = [nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=F64) for W in weights]
    for layer, W in zip(layers, weights):
        layer.weight.data.copy_(W)
    product = weights[-1] @ before[-1]
    H = J.T @ J
    return World(nn.Sequential(*layers), half_squared_error, (X, X @ product.T), H, H, eigenvalues)


def aligned_deep_linear(singular_values: Tensor, seed: int = 0) -> tuple[World, Tensor]:
    """Square layers W_l = O_l diag(s_l) O_{l-1}^T from singular values (L, h), and the eigenvalues by hand:

    lambda_ij = sum_l prod_{k>l} s_ki^2 prod_{k<l} s_kj^2, and zeros.
    """
    L, h = singular_values.shape
    frames = [orthogonal(h, seed + i) for i in range(L + 1)]
    weights = [frames[i + 1] @ torch.diag(singular_values[i].double()) @ frames[i].T for i in range(L)]
    squares = singular_values.double().square()
    by_hand = sum(squares[i + 1 :].prod(dim=0)[:, None] * squares[:i].prod(dim=0)[None, :] for i in range(L))
    assert isinstance(by_hand, Tensor)
    zeros = torch.zeros((L - 1) * h * h, dtype=F64)
    return deep_linear(weights, seed + L + 1), torch.cat([zeros, by_hand.flatten()]).sort().values


def spiked_wigner(size: int, theta: float, sigma: float = 1.0, seed: int = 0) -> tuple[Tensor, float, float]:
    """theta u u^T + noise of variance sigma^2 / size: the matrix, where its outlier lies, and (u^T v)^2 of its eigenvector.

    Above the threshold theta > sigma the outlier lies at theta + sigma^2 / theta, with overlap 1 - (sigma / theta)^2;
    below, at the edge of the semicircle, 2 sigma (Feral and Peche 2007; Benaych-Georges and Nadakuditi 2011).
    """
    G = normal(size, size, seed=seed) * sigma / (2 * size) ** 0.5
    u = nn.functional.normalize(normal(size, seed=seed + 1), dim=0)
    A = G + G.T + theta * torch.outer(u, u)
    if theta <= sigma:
        return A, 2 * sigma, 0.0
    return A, theta + sigma**2 / theta, 1 - (sigma / theta) ** 2


def spiked_wishart(n: int, size: int, spike: float, seed: int = 0) -> tuple[Tensor, float, tuple[float, float]]:
    """X^T X / n with population covariance I + (spike - 1) u u^T: the matrix, its outlier, and the ends of the bulk.

    With g = size / n the bulk ends at (1 -+ sqrt g)^2; for spike > 1 + sqrt g the outlier lies at
    spike (1 + g / (spike - 1)) (Baik, Ben Arous and Peche 2005; Paul 2007).
    """
    g = size / n
    u = nn.functional.normalize(normal(size, seed=seed + 1), dim=0)
    X = normal(n, size, seed=seed)
    X = X + (math.sqrt(spike) - 1) * torch.outer(X @ u, u)
    outlier = spike * (1 + g / (spike - 1)) if spike > 1 + g**0.5 else (1 + g**0.5) ** 2
    return X.T @ X / n, outlier, ((1 - g**0.5) ** 2, (1 + g**0.5) ** 2)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return layer


def _white(n: int, d: int, seed: int) -> Tensor:
    """Inputs (n, d) with (1/n) X^T X = I."""
    return torch.linalg.qr(normal(n, d, seed=seed))[0] * n**0.5
