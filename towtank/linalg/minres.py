"""MINRES: the smallest residual over the Krylov space, for any symmetric matrix."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from towtank.linalg.conjugate_gradient import Step, positive
from towtank.linalg.draws import dot


def minres(
    multiply: Callable[[Tensor], Tensor],
    b: Tensor,
    precondition: Callable[[Tensor], Tensor],
    *,
    share: float,
    most: int,
) -> Step:
    """Minimize |b - A x| from zero, until it is a `share` of |b|, or after `most` products.

    Lanczos makes A tridiagonal (alpha, beta); Givens rotations (c, s) make that triangular as it grows; w are the columns
    of V R^-1. With a preconditioner the norm is that of r^T M r.

    Raises:
        ValueError: if the preconditioner is not positive definite.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, -2.0]))
        >>> minres(lambda v: A @ v, torch.ones(2), torch.clone, share=1e-6, most=5).x
        tensor([ 1.0000, -0.5000])

    Source: Paige and Saunders 1975, section 6.
    """
    x = torch.zeros_like(b)
    r_old, r = torch.zeros_like(b), b.clone()
    z = precondition(r)
    beta = phi = positive(dot(r, z)) ** 0.5
    goal, beta_old = share * beta, 1.0
    w_old, w = torch.zeros_like(b), torch.zeros_like(b)
    delta_bar, epsilon, c, s = 0.0, 0.0, -1.0, 0.0
    largest = 0.0
    for _ in range(most):
        v = z / beta
        Av = multiply(v)
        Av.sub_(r_old, alpha=beta / beta_old)
        alpha = dot(v, Av)
        r_old, r = r, Av.sub_(r, alpha=alpha / beta)
        z = precondition(r)
        beta_old, beta = beta, max(dot(r, z), 0.0) ** 0.5
        epsilon_old, delta = epsilon, c * delta_bar + s * alpha
        gamma_bar = s * delta_bar - c * alpha
        epsilon, delta_bar = s * beta, -c * beta
        gamma = math.hypot(gamma_bar, beta)
        largest = max(largest, gamma)
        rounding = 8 * torch.finfo(b.dtype).eps * largest
        if math.hypot(gamma_bar, delta_bar) <= rounding:  # |A r| / |r|: singular, and r has no part in the range of A
            break
        c, s = gamma_bar / gamma, beta / gamma
        w_old, w = w, (v - epsilon_old * w_old - delta * w) / gamma
        x.add_(w, alpha=c * phi)
        phi *= s
        if phi <= goal or beta <= rounding:
            break
    return Step(x)
