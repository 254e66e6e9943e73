"""Gradient noise against closed forms, brute force and planted truth."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from tests.state import fingerprint
from tests.worlds import half_squared_error
from towtank.curvature import Hessian
from towtank.laws.noise_scale import NoiseScaleLaw
from towtank.problem import Problem
from towtank.signals.batch_tests import batch_growth_tests
from towtank.signals.coherence import gradient_coherence
from towtank.signals.curved_noise import curved_noise_scale
from towtank.signals.noise import batch_tests, coherence, example_noise_scale, gradient_noise
from towtank.signals.noise_scale import (
    NoiseScale,
    NoiseStream,
    fieller,
    noise_scale_from_examples,
    noise_scale_from_parts,
)
from towtank.signals.per_example import ExampleGradients
from towtank.signals.step import CannotTell, MicroGradients, NotRecorded, Step

P = 6
G = np.array([1.0, -0.5, 0.5, 0.0, 0.2, -1.0])
ROOTS = np.array([2.0, 1.0, 0.5, 1.5, 1.0, 0.3])  # Sigma = diag(ROOTS^2)
TRACE, SIGNAL = float((ROOTS**2).sum()), float((G**2).sum())
TRUE = TRACE / SIGNAL


def drawn(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Gradients of examples (*shape, P) of mean G and covariance Sigma."""
    return G + ROOTS * rng.standard_normal((*shape, P))


def products(g_MP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (g_MP**2).sum(1), g_MP @ g_MP.mean(0)


def of_parts(g_KP: np.ndarray, sizes: list[int], **options: Any) -> NoiseScale:
    two = {"a": slice(0, 2), "b": slice(2, P)}
    squares = [{n: (g[s] ** 2).sum() for n, s in two.items()} for g in g_KP]
    total = {n: (g_KP.sum(0)[s] ** 2).sum() for n, s in two.items()}
    return noise_scale_from_parts(squares, sizes, total, **options)


def within(hits: int, draws: int, level: float = 0.95) -> bool:
    """Whether a count is one that 3.5 standard errors of the binomial allow."""
    return abs(hits - level * draws) <= 3.5 * math.sqrt(draws * level * (1 - level))


# From parts


@pytest.mark.parametrize("sizes", [[4, 4, 4], [1, 2, 5], [1, 30]])
@pytest.mark.parametrize("kind", ["means", "sums"])
def test_parts_are_unbiased_whatever_their_sizes(sizes: list[int], kind: str) -> None:
    rng, draws = np.random.default_rng(1), 1_000
    found = []
    for _ in range(draws):
        parts = [getattr(drawn(rng, b), "mean" if kind == "means" else "sum")(0) for b in sizes]
        one = of_parts(np.array(parts), sizes, parts=kind)
        found.append([one.signal, one.noise, *one.tensors["a"]])
    values = np.array(found)
    truth = [SIGNAL, TRACE, (G[:2] ** 2).sum(), (ROOTS[:2] ** 2).sum()]
    assert (np.abs(values.mean(0) - truth) < 4 * values.std(0) / draws**0.5).all()


def test_parts_scale_cancels_and_sums_over_tensors_are_the_whole() -> None:
    parts = drawn(np.random.default_rng(0), 4, 8).mean(1)
    one, scaled = of_parts(parts, [8] * 4), of_parts(parts * 65536 / 4, [8] * 4)
    assert scaled.scale().value == pytest.approx(one.scale().value, rel=1e-12)
    assert sum(s for s, _ in one.tensors.values()) == pytest.approx(one.signal, rel=1e-12)
    assert one.snr["a"] == pytest.approx(one.tensors["a"][0] / one.tensors["a"][1], rel=1e-12)


def test_parts_averaged_over_steps_are_the_fitted_law() -> None:
    rng, stream = np.random.default_rng(0), NoiseStream()
    rows: dict[str, list[float]] = {"step": [], "batch": [], "square": []}
    for step in range(20):
        parts = drawn(rng, 4, 8).mean(1)
        stream = stream.add(of_parts(parts, [8] * 4))
        for b, g in [*((8, g) for g in parts), (32, parts.mean(0))]:
            for key, value in zip(rows, (step, b, (g**2).sum())):
                rows[key].append(value)
    law = NoiseScaleLaw().fit(rows, x="batch", y="square", groups="step")
    assert stream.estimate().scale().value == pytest.approx(law.coefficients["B_simple"].value, rel=1e-6)


@pytest.mark.parametrize("steps", [math.inf, 40])
def test_stream_covers_the_truth_as_often_as_it_claims(steps: float) -> None:
    rng, repetitions, hits, K, b = np.random.default_rng(3), 300, 0, 4, 4
    for _ in range(repetitions):
        stream = NoiseStream(steps=steps)
        g_TKP = drawn(rng, 80, K, b).mean(2)
        T, Q = (g_TKP.sum(1) ** 2).sum(-1), (g_TKP**2).sum((1, 2))
        for signal, noise in zip((T - Q) / (K * (K - 1)), b * (K * Q - T) / (K * (K - 1))):
            stream = stream.add(NoiseScale(signal=signal, noise=noise))
        hits += TRUE in stream.estimate().scale()
    assert within(hits, repetitions)


def test_stream_forgets_at_the_stated_rate() -> None:
    stream = NoiseStream(steps=5)
    weights = [(4 / 6) ** k for k in range(9)][::-1]
    values = np.random.default_rng(0).standard_normal((9, 2)) + 10
    for signal, noise in values:
        stream = stream.add(NoiseScale(signal=signal, noise=noise))
    mean = np.average(values, axis=0, weights=weights)
    np.testing.assert_allclose([stream.estimate().signal, stream.estimate().noise], mean, rtol=1e-13)
    covariance = np.cov(values.T, aweights=weights)  # with the same weighted correction
    effective = sum(weights) ** 2 / sum(w * w for w in weights)
    np.testing.assert_allclose(np.array(stream.estimate().covariance), covariance / effective, rtol=1e-12)
    for _ in range(100):
        stream = stream.add(NoiseScale(signal=1.0, noise=1.0))
    assert stream.estimate().freedom + 1 == pytest.approx(5, rel=1e-9)


def test_pure_noise_has_no_upper_end() -> None:
    rng, stream = np.random.default_rng(0), NoiseStream()
    for _ in range(50):
        stream = stream.add(of_parts(rng.standard_normal((4, P)), [1] * 4))
    scale = stream.estimate().scale()
    assert scale.high == math.inf and 0 < scale.low < math.inf
    one = of_parts(rng.standard_normal((4, P)), [1] * 4).scale()
    assert (one.low, one.high) == (0, math.inf)  # a single step says nothing of its error


def test_parts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 parts"):
        noise_scale_from_parts([{"w": 1.0}], [1], {"w": 1.0})
    with pytest.raises(ValueError, match="sizes"):
        noise_scale_from_parts([{"w": 1.0}] * 2, [1, 0], {"w": 1.0})
    with pytest.raises(CannotTell, match="neither"):
        noise_scale_from_parts([{"w": 0.0}] * 2, [1, 1], {"w": 0.0}).scale()


# From examples


def test_examples_agree_with_brute_force_over_pairs_and_left_out_examples() -> None:
    g = drawn(np.random.default_rng(0), 7)
    M = len(g)
    found = noise_scale_from_examples(*products(g))
    gram = g @ g.T
    assert found.signal == pytest.approx((gram.sum() - np.trace(gram)) / (M * (M - 1)), rel=1e-12)
    assert found.noise == pytest.approx(g.var(0, ddof=1).sum(), rel=1e-12)
    left = []
    for i in range(M):
        one = noise_scale_from_examples(*products(np.delete(g, i, 0)))
        left.append([one.signal, one.noise])
    gaps = np.array(left) - np.mean(left, 0)
    np.testing.assert_allclose(np.array(found.covariance), gaps.T @ gaps * (M - 1) / M, rtol=1e-9)


def test_examples_of_linear_regression_cover_the_closed_form() -> None:
    """g = x (x.delta - s eps) with white x: |G|^2 = |delta|^2, tr Sigma = (P + 1) |delta|^2 + s^2 P."""
    rng, delta, s, M, repetitions = np.random.default_rng(0), np.full(P, 0.5), 1.0, 500, 400
    truth = (P + 1) + s**2 * P / float(delta @ delta)
    hits = 0
    for _ in range(repetitions):
        x = rng.standard_normal((M, P))
        g = x * (x @ delta - s * rng.standard_normal(M))[:, None]
        hits += truth in noise_scale_from_examples(*products(g)).scale()
    assert within(hits, repetitions)


def regression(M: int = 64, seed: int = 0) -> tuple[Problem, np.ndarray]:
    """A linear model in float64, and the gradients of its examples by hand."""
    rng = np.random.default_rng(seed)
    x, y, w = rng.standard_normal((M, P)), rng.standard_normal((M, 1)), rng.standard_normal((1, P))
    model = nn.Linear(P, 1, bias=False, dtype=torch.float64)
    model.weight.data.copy_(torch.from_numpy(w))
    return Problem(model, half_squared_error, (torch.from_numpy(x), torch.from_numpy(y))), x * (x @ w.T - y)


def test_parts_and_examples_of_one_model_agree() -> None:
    problem, g = regression(256)
    whole = example_noise_scale(ExampleGradients(problem))
    by_hand = noise_scale_from_examples(*products(g))
    assert whole.scale().value == pytest.approx(by_hand.scale().value, rel=1e-10)
    assert whole.snr["weight"] == pytest.approx(whole.signal / whole.noise, rel=1e-10)
    each = of_parts(g, [1] * 256)  # parts of one example are the examples
    assert (each.signal, each.noise) == pytest.approx((whole.signal, whole.noise), rel=1e-10)
    eights = of_parts(g.reshape(32, 8, P).mean(1), [8] * 32)
    assert eights.scale().value in whole.scale()


def test_curved_noise_scale_is_that_of_the_gradients_seen_through_the_root_of_the_hessian() -> None:
    problem, g = regression(20)
    x = problem.data[0].numpy()
    root = np.linalg.cholesky(x.T @ x / len(x))  # H = root root^T
    found = curved_noise_scale(ExampleGradients(problem, chunk=7), Hessian(problem))
    wanted = noise_scale_from_examples(*products(g @ root))
    assert (found.signal, found.noise) == pytest.approx((wanted.signal, wanted.noise), rel=1e-9)
    assert found.scale().high == pytest.approx(wanted.scale().high, rel=1e-8)


# Fieller's interval


def p_value(x: np.ndarray) -> float:
    from scipy.stats import ttest_1samp

    return float(cast(Any, ttest_1samp(x, 0)).pvalue)


def test_fieller_is_the_set_of_ratios_that_a_t_test_does_not_reject() -> None:
    rng = np.random.default_rng(0)
    n, d = rng.normal(3, 1, 12), rng.normal(2, 1, 12)
    low, high = fieller(n.mean(), d.mean(), np.cov(n, d) / 12, 11, 0.95)
    for end in (low, high):
        assert p_value(n - end * d) == pytest.approx(0.05, rel=1e-6)
    d -= d.mean() - 0.01  # cannot be told from 0
    low, high = fieller(n.mean(), d.mean(), np.cov(n, d) / 12, 11, 0.95)
    assert high == math.inf and p_value(n - low * d) == pytest.approx(0.05, rel=1e-6)
    assert p_value(n - 1.1 * low * d) > 0.05 > p_value(n - 0.9 * low * d)


# Coherence


@pytest.mark.parametrize("M", [3, 4, 16])
def test_coherence_runs_from_1_over_m_to_1(M: int) -> None:
    orthogonal = gradient_coherence(*products(4.0 * np.eye(M)))
    assert orthogonal.biased == 1 / M and orthogonal.helped == 1
    assert orthogonal.unbiased.value == 0
    equal = gradient_coherence(*products(np.tile([[1.0, 2.0]], (M, 1))))
    assert (equal.biased, equal.unbiased.value, equal.helped) == (1, 1, M)
    opposed = gradient_coherence(*products(np.eye(M) - 1 / M))  # their sum is 0
    assert opposed.unbiased.value == pytest.approx(-1 / (M - 1), rel=1e-12)


def test_coherence_is_the_noise_scale_in_another_unit() -> None:
    g = drawn(np.random.default_rng(0), 50)
    found, noise = gradient_coherence(*products(g)), noise_scale_from_examples(*products(g))
    assert found.unbiased.value == pytest.approx(1 / (1 + noise.scale().value), rel=1e-12)
    assert found.unbiased.low == pytest.approx(1 / (1 + noise.scale().high), rel=1e-9)
    assert found.unbiased.high == pytest.approx(1 / (1 + noise.scale().low), rel=1e-9)
    assert found.biased == pytest.approx(found.unbiased.value + (1 - found.unbiased.value) / 50, rel=1e-12)


def test_coherence_of_nothing_cannot_be_told() -> None:
    with pytest.raises(CannotTell, match="not 0"):
        gradient_coherence([0.0] * 4, [0.0] * 4)
    with pytest.raises(CannotTell, match="at least 3"):
        gradient_coherence([1.0] * 2, [1.0] * 2)


# Tests for batch growth


def test_batch_tests_agree_with_variances_written_out() -> None:
    g_MP = drawn(np.random.default_rng(0), 40)
    g, M = g_MP.mean(0), len(g_MP)
    g2 = g @ g
    found = batch_growth_tests(*products(g_MP), eta=0.3, theta=0.2, nu=0.3)
    along = g_MP @ g
    across = g_MP - np.outer(along, g) / g2
    norm = g_MP.var(0, ddof=1).sum() / (0.3**2 * g2)
    inner = along.var(ddof=1) / (0.2**2 * g2**2)
    orthogonal = (across**2).sum() / (M - 1) / (0.3**2 * g2)
    assert (found.norm, found.inner_product) == (math.ceil(norm), math.ceil(inner))
    assert found.augmented == max(math.ceil(inner), math.ceil(orthogonal))
    assert math.ceil(orthogonal) > math.ceil(inner)  # both parts were at work


@pytest.mark.parametrize("eta", [0.1, 0.37, 0.5, 2.0])
def test_norm_test_is_the_noise_scale_over_eta_squared(eta: float) -> None:
    for seed in range(5):
        squares_inners = products(drawn(np.random.default_rng(seed), 60))
        found = batch_growth_tests(*squares_inners, eta=eta, unbiased=True)
        scale = noise_scale_from_examples(*squares_inners).scale().value
        assert found.norm == max(1, math.ceil(scale / eta**2))
        assert batch_growth_tests(*squares_inners, eta=eta).norm <= max(1, math.ceil(60 / eta**2))


def test_batch_tests_of_one_direction_need_no_larger_batch_and_of_noise_no_batch_is_enough() -> None:
    equal = batch_growth_tests(*products(np.tile([[1.0, 2.0]], (5, 1))))
    assert (equal.norm, equal.inner_product, equal.augmented) == (1, 1, 1)
    hidden = batch_growth_tests(*products(np.array([[1.0, 0], [-1, 0], [0, 1], [0.1, -1]])), unbiased=True)
    assert hidden.norm == math.inf
    with pytest.raises(CannotTell, match="mean gradient"):
        batch_growth_tests([1.0] * 4, [0.0] * 4)
    with pytest.raises(ValueError, match="positive"):
        batch_growth_tests([1.0] * 4, [1.0] * 4, eta=0)


# Probes


def step_of(problem: Problem, kept: dict[str, Any] | None = None, micro: MicroGradients | None = None) -> Step:
    return Step(
        number=1,
        loss=torch.tensor(0.0),
        model=problem.model,
        batch=problem.data,
        recorded={} if micro is None else {"micro": micro},
        problem_of=lambda batch: problem,
        kept={} if kept is None else kept,
    )


def micro_of(g_KP: np.ndarray, sizes: tuple[int, ...] | None) -> MicroGradients:
    squares = tuple({"weight": torch.tensor((g**2).sum())} for g in g_KP)
    return MicroGradients(squares, sizes, {"weight": torch.tensor((g_KP.sum(0) ** 2).sum())})


def test_probes_share_one_pass_and_leave_no_trace() -> None:
    problem, g = regression(32)
    step = step_of(problem)
    before = fingerprint(problem.model)
    probes = [gradient_noise("examples"), coherence(), batch_tests(eta=0.3)]
    readings = [dict(probe(step)) for probe in probes]
    assert fingerprint(problem.model) == before
    assert cast(Any, readings[0]["noise/scale"]) == pytest.approx(
        noise_scale_from_examples(*products(g)).scale().value, rel=1e-10
    )
    assert set(readings[0]) >= {"noise/scale", "noise/scale_low", "noise/scale_high", "noise/snr/weight"}
    assert ("noise/critical_batch" in readings[0]) == math.isfinite(cast(float, readings[0]["noise/scale_high"]))
    assert cast(Any, readings[1]["noise/coherence"]) == pytest.approx(
        gradient_coherence(*products(g)).biased, rel=1e-10
    )
    assert readings[2]["noise/norm_test_batch"] == batch_growth_tests(*products(g), eta=0.3).norm
    assert set(readings[2]) == {f"noise/{n}_test_batch" for n in ("norm", "inner_product", "augmented")}
    assert all(cast(Any, probe).cost(problem) > 1 for probe in probes)


def test_parts_probe_streams_over_steps_and_forgives_an_overflow() -> None:
    problem, _ = regression(8)
    rng, kept, probe = np.random.default_rng(0), {}, gradient_noise("parts")
    assert not hasattr(probe, "cost") and cast(Any, probe).needs == {"micro"}
    widths = []
    for k in range(60):
        parts = drawn(rng, 4, 16).mean(1)
        if k == 30:
            parts[0] = np.inf
        readings = cast(dict[str, float], probe(step_of(problem, kept, micro_of(parts, (16,) * 4))))
        widths.append(readings["noise/scale_high"] - readings["noise/scale_low"])
    assert widths[30] == widths[29]
    assert widths[-1] < widths[14] / 1.4  # four times the steps: half the width, but for its own noise
    assert readings["noise/scale_low"] <= TRUE <= readings["noise/scale_high"]
    assert readings["noise/critical_batch"] == readings["noise/scale"]


def test_probe_takes_examples_where_there_are_no_parts_and_says_what_is_missing() -> None:
    problem, g = regression(16)
    one = micro_of(g.mean(0, keepdims=True), (16,))
    readings = gradient_noise()(step_of(problem, micro=one))
    assert cast(Any, readings["noise/scale"]) == pytest.approx(
        noise_scale_from_examples(*products(g)).scale().value, rel=1e-10
    )
    with pytest.raises(CannotTell, match="at least 2"):
        gradient_noise("parts")(step_of(problem, micro=one))
    with pytest.raises(NotRecorded):
        gradient_noise()(step_of(problem))
    two = micro_of(g[:2], None)
    with pytest.raises(CannotTell, match="part_size"):
        gradient_noise("parts")(step_of(problem, micro=two))
    assert "noise/scale" in gradient_noise("parts", part_size=1)(step_of(problem, micro=two))
    with pytest.raises(CannotTell, match="at least 3"):
        gradient_noise("examples")(step_of(regression(2)[0]))
    with pytest.raises(ValueError, match="source"):
        gradient_noise(cast(Any, "ranks"))
    with pytest.raises(CannotTell, match="finite"):
        gradient_noise("parts")(step_of(problem, micro=micro_of(np.full((2, P), np.nan), (1, 1))))
