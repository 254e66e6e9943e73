"""The neural tangent kernel against J J^T with J written down row by row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.curvature import dense
from tests.curvature.cases import BY_NAME
from tests.state import fingerprint
from towtank.curvature.gauss_newton import GaussNewton
from towtank.curvature.ntk import NTK
from towtank.problem import Problem


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize("name", ["tanh", "conv2d", "tied", "softmax_attention", "batchnorm_train"])
def test_the_kernel_is_the_gram_matrix(name):
    case = BY_NAME[name]
    model, loss, batch = dense.wide(case)
    J = dense.rows(model(batch[0]), list(model.parameters()))
    narrow, _, small = case.make()
    before = fingerprint(narrow)
    for retain in (True, False):
        assert relative(NTK(Problem(model, loss, batch, **case.options), retain=retain).dense(), J @ J.T) < 1e-12
        assert relative(NTK(Problem(narrow, loss, small, **case.options), retain=retain).dense(), J @ J.T) < 1e-5
    assert fingerprint(narrow) == before


def test_batches_come_in_order():
    model, loss, (x, y) = dense.wide(BY_NAME["tanh"])
    ragged = NTK(Problem(model, loss, [(x[:1], y[:1]), (x[1:4], y[1:4]), (x[4:], y[4:])]))
    assert ragged.shape == (18, 18) and ragged.semidefinite
    assert relative(ragged.dense(), NTK(Problem(model, loss, (x, y))).dense()) < 1e-13
    assert relative(ragged.restrict([4, 17]).dense(), ragged.dense()[[4, 17]][:, [4, 17]]) < 1e-13


def test_its_spectrum_is_that_of_gauss_newton():
    """L = sum over outputs of squares / M: G = 2/M J^T J and K = J J^T share all eigenvalues that are not zero."""
    model, _, batch = dense.wide(BY_NAME["squared"])
    problem = Problem(model, F.mse_loss, batch)
    kernel, G = torch.linalg.eigvalsh(NTK(problem).dense()), torch.linalg.eigvalsh(GaussNewton(problem).dense())
    torch.testing.assert_close(G[-18:], 2 / 18 * kernel, rtol=1e-10, atol=1e-12 * float(kernel[-1]))


def test_some_parameters_only():
    model, loss, batch = dense.wide(BY_NAME["tanh"])
    J = dense.rows(model(batch[0]), [model[0].weight])
    assert relative(NTK(Problem(model, loss, batch, params="0.weight")).dense(), J @ J.T) < 1e-12


def test_trace_samples_are_unbiased():
    model, loss, (x, y) = dense.wide(BY_NAME["tanh"])
    kernel = NTK(Problem(model, loss, [(x[:2], y[:2]), (x[2:], y[2:])]))
    samples, cost = kernel.trace_samples(400, 0)
    assert cost < 1 and (samples.mean() - kernel.dense().trace()).abs() < 4 * samples.std() / 20
