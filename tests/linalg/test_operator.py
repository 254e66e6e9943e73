"""The algebra of operators, and random vectors."""

from __future__ import annotations

import pytest
import torch

from tests.linalg.cases import MATRICES, SIZE, Gram, operator
from tests.worlds import generator, normal
from towtank.linalg.draws import dot, rademacher
from towtank.linalg.operator import LinearOperator
from towtank.linalg.progress import Meter
from towtank.linalg.sampling import Running

A, B = MATRICES["flat"], MATRICES["decay"]


def test_algebra_is_that_of_matrices() -> None:
    a, b = operator(A), operator(B)
    for made, truth in [(a + b, A + B), (a - 2 * b, A - 2 * B), (-a / 4, -A / 4), (a.T, A), (a * 3, 3 * A)]:
        assert torch.allclose(made.dense(block=7), truth, atol=1e-12)
        x = normal(SIZE, 3, seed=1)
        assert torch.allclose(made @ x, truth @ x) and torch.allclose(made @ x[:, 0], truth @ x[:, 0])


def test_blocks_by_coordinate_and_name() -> None:
    class Named(Gram):
        def __init__(self) -> None:
            super().__init__(normal(4, 5, seed=1))
            self.slices = {"a": slice(0, 2), "b": slice(2, 5)}

    op = Named()
    assert torch.allclose(op.restrict(["b"]).dense(), op.dense()[2:, 2:])
    assert torch.allclose((op + 2 * op).restrict(["a"]).dense(), 3 * op.dense()[:2, :2])
    assert torch.allclose(op.restrict([4, 0]).dense(), op.dense()[[4, 0]][:, [4, 0]])
    with pytest.raises(ValueError, match="a, b; got c"):
        op.restrict(["c"])


def test_what_is_known_survives_the_algebra() -> None:
    J = Gram(normal(4, 5, seed=1))
    assert (J + J).semidefinite and not (J - J).semidefinite and (2 * J).semidefinite and not (-J).semidefinite
    samples = (3 * J).trace_samples(2000, generator(0))
    assert samples is not None
    values, price = samples
    assert price == 0.5 and values.mean().item() == pytest.approx(3 * J.dense().trace().item(), rel=0.1)
    assert (J + J).cost == 1.2
    assert not LinearOperator.from_matrix(torch.triu(torch.ones(3, 3))).symmetric


@pytest.mark.parametrize("x", [torch.ones(3), torch.ones(SIZE, 1, 1)])
def test_wrong_shapes(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="shape"):
        operator(A) @ x
    with pytest.raises(TypeError, match="floating"):
        operator(A) @ torch.ones(SIZE, dtype=torch.int32)


def test_signs_are_fair_and_independent() -> None:
    """Means and correlations of n signs scatter by n^-1/2; the largest of 64 x 64 / 2 lies below five of that."""
    v = rademacher(64 * 3 + 5, 20000, generator(0), like=torch.float64, device=torch.device("cpu"))
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    assert float(v.mean(dim=1).abs().max()) < 5 / 20000**0.5
    off = v[60:124] @ v[60:124].T / 20000 - torch.eye(64)
    assert float(off.abs().max()) < 5.5 / 20000**0.5


def test_dots_are_summed_in_float64() -> None:
    """Runs of 2^16 numbers in float32, their sums in float64; a plain float32 running sum is off by hundreds of ulps."""
    x, y = normal(10**6, seed=1).float(), normal(10**6, seed=2).float()
    truth = float(x.double() @ y.double())
    assert dot(x, y) == pytest.approx(truth, abs=3e-8 * float(x.norm() * y.norm()))


def test_running_moments_in_parts_are_those_of_the_whole() -> None:
    x, running = 5 + normal(100, 3, seed=1), Running()
    for part in x.split([1, 1, 30, 68]):
        running.add(part)
    assert torch.allclose(running.mean, x.mean(dim=0)) and torch.allclose(running.variance, x.var(dim=0))


def test_a_bar_on_request_only(capsys: pytest.CaptureFixture[str]) -> None:
    for show in (None, False):
        with Meter("work", 2, show=show) as meter:
            meter.advance(2)
    assert capsys.readouterr() == ("", "")
    with Meter("work", 2, show=True) as meter:
        meter.advance(1)
    assert capsys.readouterr().err
