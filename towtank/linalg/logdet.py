"""Log-determinant by stochastic Lanczos quadrature."""

from __future__ import annotations

import torch
from torch import Tensor

from towtank.estimate import Estimate
from towtank.linalg.density import SpectralDensity, spectral_density
from towtank.linalg.draws import as_generator
from towtank.linalg.operator import LinearOperator
from towtank.linalg.products import Products
from towtank.linalg.sampling import check_tolerance, sample_until


def logdet(
    op: LinearOperator,
    *,
    damping: float = 0.0,
    rtol: float = 0.05,
    atol: float = 0.0,
    steps: int = 30,
    generator: torch.Generator | int | None = None,
    max_products: int = 3000,
    progress: bool | None = None,
) -> Estimate:
    """Log-determinant, log det(A + damping I), of a positive definite matrix.

    P times the mean over probes of sum_i w_i log(theta_i + damping). The standard error is that of the probes; the rule
    of m steps adds an error that falls like exp(-4 m / sqrt(kappa)) with the condition number kappa of A + damping I.

    Args:
        op: the operator (P, P).
        damping: added to every eigenvalue, in their unit.
        rtol: standard error asked for, as a share of the value.
        atol: standard error asked for, in nats.
        steps: Lanczos steps a probe.
        generator: of the probes, or a seed.
        max_products: where to stop at the latest; not converged is then said.
        progress: show a bar; by default on a terminal when it takes long.

    Raises:
        ValueError: if an eigenvalue plus damping is not positive, or an argument does not fit.
        TypeError: if the operator is not symmetric.

    Example:
        >>> A = LinearOperator.from_matrix(torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)))
        >>> abs(logdet(A).value - torch.log(torch.tensor(8.0)).item()) < 1e-6
        True

    Source: Ubaru, Chen and Saad 2017, theorem 4.1.
    """
    check_tolerance(rtol, atol)
    if not 1 <= steps <= max_products:
        raise ValueError(f"expected steps from 1 to max_products={max_products}, got {steps}")
    with Products(op, max_products, "logdet", show=progress) as A:
        steps, seed = min(steps, op.shape[0]), as_generator(generator, op.device)

        def draw(count: int) -> Tensor:
            rules = []
            for _ in range(count):
                rule = spectral_density(op, steps=steps, generator=seed, progress=False)
                A.charge(rule.products)
                rules.append(op.shape[0] * _log_mean(rule, damping, op.semidefinite))
            return torch.stack(rules)

        running, met = sample_until(draw, rtol=rtol, atol=atol, room=lambda: A.left // steps)
    return Estimate(float(running.mean), float(running.stderr), A.spent, met, op.convention)


def _log_mean(rule: SpectralDensity, damping: float, semidefinite: bool) -> Tensor:
    nodes = rule.nodes.clamp(min=0.0) if semidefinite else rule.nodes
    shifted = nodes[0] + damping
    used = rule.weights[0] > 0
    if bool((shifted[used] <= 0).any()):
        raise ValueError(
            f"expected a positive definite matrix, got an eigenvalue near {float(nodes[0][used].min()):.3g} with "
            f"damping {damping:.3g}; add damping"
        )
    return (rule.weights[0][used] * shifted[used].log()).sum()
