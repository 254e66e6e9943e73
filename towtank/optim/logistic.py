"""Logistic regression by gradient descent, plain and normalized, and the perceptrons they become at large steps.

With labels y_i = 1 or -1, the mean loss log(1 + exp(-y_i x_i . theta)) has the gradient -1/n sum_i w_i y_i x_i, where
w_i = 1 / (1 + exp(y_i x_i . theta)) is the probability that the model gives to the wrong label. A step of length lr is

    plain:       theta + lr/n sum_i w_i y_i x_i
    normalized:  theta + lr sum_i w_i y_i x_i / sum_i w_i

Let theta = lr phi. Then phi moves by the same sums with lr = 1, and w_i = 1 / (1 + exp(lr y_i x_i . phi)) tends to 1 where
phi is wrong, 0 where it is right and 1/2 on the boundary as lr -> infinity: phi takes the steps of a perceptron on all
examples at once. If |x_i| <= R and some unit vector u separates all examples by a margin mu, then each normalized step has
u . step >= mu, |step| <= R and phi . step <= 0, so phi separates after at most (R / mu)^2 steps (Novikoff's argument); plain
steps are shorter by the share of examples that are wrong, which costs up to a factor n. A separated phi is where the limits
part: the perceptron stops, while normalized steps at any finite lr go on towards the example of least margin.

A rule of `towtank.optim.rules` sees one tensor's gradient, not the weights w_i; therefore these are functions.

n: examples; P: dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, kw_only=True)
class Separation:
    """A vector that separates two classes, or how far it came.

    Args:
        theta: the last vector, (P,).
        steps: taken.
        errors: examples not on their side, before each step and at the end.
        separated: whether none is left.
    """

    theta: Tensor
    steps: int
    errors: tuple[int, ...]
    separated: bool


def logistic_step(theta: Tensor, inputs: Tensor, labels: Tensor, lr: float, *, normalized: bool = True) -> Tensor:
    """One step of gradient descent on the mean logistic loss, divided by the mean probability of the wrong labels.

    Args:
        theta: (P,).
        inputs: x, (n, P).
        labels: y, (n,), each 1 or -1.
        lr: length of the step in units of theta per unit of x.
        normalized: False: plain gradient descent.

    Raises:
        ValueError: for labels other than 1 and -1, shapes that do not fit, or a negative or infinite lr.

    Example:
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, -1.0])
        >>> logistic_step(torch.zeros(2), x, y, 1.0)  # both weights are 1/2
        tensor([ 0.5000, -1.0000])
        >>> logistic_step(torch.zeros(2), x, y, 1.0, normalized=False)
        tensor([ 0.2500, -0.5000])

    Source: Tyurin 2024, "From logistic regression to the perceptron algorithm: exploring gradient descent with large step
    sizes"; the normalized form is derived above from its description, division by the sum of the weights.
    """
    _check(theta, inputs, labels)
    if not 0 <= lr < float("inf"):
        raise ValueError(f"lr = {lr}: expected a finite number >= 0; for the limit of large steps use perceptron_step")
    log_weights = logsigmoid(-labels * (inputs @ theta))
    weights = torch.softmax(log_weights, 0) if normalized else log_weights.exp() / len(labels)
    return theta + lr * ((weights * labels) @ inputs)


def perceptron_step(theta: Tensor, inputs: Tensor, labels: Tensor, *, normalized: bool = True) -> Tensor:
    """What `logistic_step(lr theta) / lr` tends to as lr grows: theta plus the mean of y x over the errors.

    Examples on the boundary count half. Without errors theta stays.

    Args:
        theta: (P,), in units of lr.
        inputs: x, (n, P).
        labels: y, (n,), each 1 or -1.
        normalized: False: the sum over the errors divided by n, the batch perceptron.

    Raises:
        ValueError: for labels other than 1 and -1, or shapes that do not fit.

    Example:
        >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, -1.0])
        >>> perceptron_step(torch.tensor([1.0, 1.0]), x, y)  # the second is wrong
        tensor([ 1., -1.])

    Source: Tyurin 2024, the limit of large steps; Rosenblatt 1958.
    """
    _check(theta, inputs, labels)
    margins = labels * (inputs @ theta)
    weights = (1 - torch.sign(margins)) / 2
    total = weights.sum() if normalized else len(labels)
    return theta + (weights * labels) @ inputs / total if bool(weights.any()) else theta


def separate(
    inputs: Tensor,
    labels: Tensor,
    *,
    lr: float = float("inf"),
    normalized: bool = True,
    steps: int = 1000,
    start: Tensor | None = None,
) -> Separation:
    """Step until every example lies strictly on its side.

    Args:
        inputs: x, (n, P).
        labels: y, (n,), each 1 or -1.
        lr: of `logistic_step`; infinite: `perceptron_step`.
        normalized: as there.
        steps: most steps.
        start: theta, (P,); None: zeros.

    Raises:
        ValueError: for labels other than 1 and -1, shapes that do not fit, or a negative lr.

    Example:
        >>> x, y = torch.tensor([[2.0, 1.0], [-1.0, 1.0], [1.0, -3.0]]), torch.tensor([1.0, 1.0, -1.0])
        >>> separate(x, y).separated
        True
    """
    theta = inputs.new_zeros(inputs.shape[1:]) if start is None else start
    _check(theta, inputs, labels)
    errors: list[int] = []
    for _ in range(steps + 1):
        errors.append(int((labels * (inputs @ theta) <= 0).sum()))
        if not errors[-1] or len(errors) > steps:
            break
        if lr == float("inf"):
            theta = perceptron_step(theta, inputs, labels, normalized=normalized)
        else:
            theta = logistic_step(theta, inputs, labels, lr, normalized=normalized)
    return Separation(theta=theta, steps=len(errors) - 1, errors=tuple(errors), separated=not errors[-1])


def _check(theta: Tensor, inputs: Tensor, labels: Tensor) -> None:
    if inputs.ndim != 2 or labels.shape != inputs.shape[:1] or theta.shape != inputs.shape[1:] or not len(labels):
        shapes = ", ".join(str(tuple(t.shape)) for t in (theta, inputs, labels))
        raise ValueError(f"expected theta (P,), inputs (n, P) and labels (n,) with n >= 1, got {shapes}")
    if not bool((labels.abs() == 1).all()):
        raise ValueError("expected labels 1 and -1; map 0 and 1 to them with 2 * labels - 1")
