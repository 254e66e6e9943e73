"""The noise scale that curvature weighs: the batch size at which noise and curvature limit a step equally."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from towtank.signals.noise_scale import NoiseScale, noise_scale_from_examples
from towtank.signals.step import CannotTell

if TYPE_CHECKING:
    from towtank.linalg import LinearOperator
    from towtank.signals.per_example import ExampleGradients


def curved_noise_scale(examples: ExampleGradients, hessian: LinearOperator) -> NoiseScale:
    """B_noise = tr(H Sigma) / (G^T H G), both parts without bias, with the jackknife over examples.

    The optimal loss improvement of a step on b examples is that of the full gradient divided by 1 + B_noise / b. It takes M + 1
    products with the Hessian, M the number of examples: for a few dozen examples.

    Args:
        examples: gradients of single examples.
        hessian: H, of the same parameters; better of other data, for which the parts are exactly unbiased.

    Raises:
        CannotTell: if there are fewer than three examples, or curvature along the gradient is not positive: then no step size is
            optimal to second order.

    Example:
        Under H = I it is B_simple.

        >>> from towtank.curvature import Hessian
        >>> from towtank.problem import Problem
        >>> from towtank.signals.per_example import ExampleGradients
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> half_square = lambda outputs, targets: (outputs - targets).square().mean() / 2
        >>> X = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 1.0], [1.0, -1.0]])
        >>> problem = Problem(model, half_square, (X, -2 * torch.ones(4, 1)))
        >>> found = curved_noise_scale(ExampleGradients(problem), Hessian(problem))
        >>> round(found.signal, 4), round(found.noise, 4), round(found.scale().value, 4)
        (2.6667, 5.3333, 2.0)

    Source: McCandlish et al. 2018, equations 2.7 and 2.8.
    """
    if examples.count < 3:
        raise CannotTell(f"expected at least 3 examples, got {examples.count}")
    Hg_P = hessian @ examples.mean
    squares, inners = [], []
    for g_CP in examples.chunks():
        squares.append((g_CP.T * (hessian @ g_CP.T.contiguous())).sum(0).double().cpu())
        inners.append((g_CP @ Hg_P).double().cpu())
    found = noise_scale_from_examples(torch.cat(squares).numpy(), torch.cat(inners).numpy())
    if not np.isfinite(found.signal) or found.signal + found.noise / examples.count <= 0:
        raise CannotTell(f"expected positive curvature along the gradient, got g^T H g = {found.signal:.3g}")
    return found
