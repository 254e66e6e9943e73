"""25 steps of every elementwise rule against its published formula in numpy float64, and against faithful packages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import towtank.optim as optim
from tests.optim.golden import PROBLEMS, far_apart, formula, tolerance, walk

LR, WD = 3e-3, 0.1


def _adam_moments(g, s, b1, b2):
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g * g
    return s["m"], s["v"]


def adamw(p, g, s, t, b1=0.9, b2=0.99, eps=1e-8):
    m, v = _adam_moments(g, s, b1, b2)
    return p - LR * WD * p - LR * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)


def lion(p, g, s, t, b1=0.9, b2=0.99):
    m = s.get("m", np.zeros_like(g))
    s["m"] = b2 * m + (1 - b2) * g
    return p * (1 - LR * WD) - LR * np.sign(b1 * m + (1 - b1) * g)


def sgd(p, g, s, t, mu=0.9):
    g = g + WD * p
    s["b"] = g if t == 1 else mu * s["b"] + g
    return p - LR * s["b"]


def nesterov(p, g, s, t, mu=0.9):
    g = g + WD * p
    s["b"] = g if t == 1 else mu * s["b"] + g
    return p - LR * (g + mu * s["b"])


def adabelief(p, g, s, t, b1=0.9, b2=0.99, eps=1e-10):
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["s"] = b2 * s.get("s", 0) + (1 - b2) * (g - s["m"]) ** 2 + eps
    m, v = s["m"] / (1 - b1**t), s["s"] / (1 - b2**t)
    return p * (1 - LR * WD) - LR * m / (np.sqrt(v) + eps)


def adabelief_rectified(p, g, s, t, b1=0.9, b2=0.99, eps=1e-10):
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["s"] = b2 * s.get("s", 0) + (1 - b2) * (g - s["m"]) ** 2 + eps
    longest = 2 / (1 - b2) - 1
    n = longest - 2 * t * b2**t / (1 - b2**t)
    p = p * (1 - LR * WD)
    if n < 5:
        return p - LR * s["m"] / (1 - b1**t)
    r = math.sqrt((n - 4) * (n - 2) * longest / ((longest - 4) * (longest - 2) * n)) * math.sqrt(1 - b2**t)
    return p - LR * r / (1 - b1**t) * s["m"] / (np.sqrt(s["s"]) + eps)


def diffgrad(p, g, s, t, b1=0.9, b2=0.99, eps=1e-8):
    g = g + WD * p
    m, v = _adam_moments(g, s, b1, b2)
    xi = 1 / (1 + np.exp(-np.abs(s.get("g", 0) - g)))
    s["g"] = g
    return p - LR * math.sqrt(1 - b2**t) / (1 - b1**t) * xi * m / (np.sqrt(v) + eps)


def diffgrad_aliased(p, g, s, t, b1=0.9, b2=0.99, eps=1e-8):
    """The published code: after the first step the previous gradient is the gradient, and xi is 1/2."""
    g = g + WD * p
    m, v = _adam_moments(g, s, b1, b2)
    xi = 1 / (1 + np.exp(-np.abs(g))) if t == 1 else 0.5
    return p - LR * math.sqrt(1 - b2**t) / (1 - b1**t) * xi * m / (np.sqrt(v) + eps)


def exadam(p, g, s, t, b1=0.9, b2=0.99, eps=1e-8):
    m, v = _adam_moments(g, s, b1, b2)
    d1, d2 = 1 + v / (v + eps) * b2**t, 1 + m * m / (m * m + eps) * b1**t
    step = m / (1 - b1**t) * d1 + g / (1 - b1**t) * d1
    return p * (1 - LR * WD) - LR * step / (np.sqrt(v / (1 - b2**t) * d2) + eps)


def sgd_sai(p, g, s, t, mu=0.9, eps=1e-8):
    if t == 1:
        s["k"] = np.linalg.norm(g.ravel()) / (g.std(ddof=1) + eps)
        s["b"] = g
    else:
        s["b"] = mu * s["b"] + (1 - mu) * g
    return p * (1 - LR * WD) - LR * s["k"] * s["b"]


def sophia(p, g, s, t, b1=0.965, b2=0.99, rho=0.04, bs=50):
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    if t % 10 == 1:
        s["h"] = b2 * s.get("h", 0) + (1 - b2) * CURVATURE["sophia"](g)
    h = np.maximum(s["h"], 0)
    return p * (1 - LR * WD) - LR * np.sign(s["m"]) * np.minimum(np.abs(s["m"]) / (rho * bs * h + 1e-15), 1)


def adahessian(p, g, s, t, b1=0.9, b2=0.99, eps=1e-4, k=1.0):
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * CURVATURE["adahessian"](g) ** 2
    root = (s["v"] / (1 - b2**t)) ** (k / 2)
    return p - LR * (s["m"] / (1 - b1**t) / (root + eps) + WD * p)


# the curvature fed to both sides: any fixed function of the recorded gradient, positive and negative
CURVATURE = {"sophia": lambda g: g * (abs(g) + 0.3), "adahessian": lambda g: g * (abs(g) - 0.2)}


def observing(kind: str, every: int):
    def before(optimizer, params, grads, t):
        if t % every == 1 % every:
            optimizer.observe_curvature([CURVATURE[kind](g) for g in grads])

    return before


BETAS = {"betas": (0.9, 0.99)}
GOLDEN = {
    "AdamW": (adamw, "AdamW", BETAS, {}),
    "Lion": (lion, "Lion", BETAS, {}),
    "SGD": (sgd, "SGD", {"momentum": 0.9}, {}),
    "SGD, Nesterov": (nesterov, "SGD", {"momentum": 0.9, "nesterov": True}, {}),
    "AdaBelief, paper": (adabelief, "AdaBelief", {**BETAS, "eps": 1e-10}, {}),
    "AdaBelief, official": (adabelief_rectified, "AdaBelief", {**BETAS, "eps": 1e-10, "variant": "official"}, {}),
    "diffGrad, paper": (diffgrad, "DiffGrad", BETAS, {}),
    "diffGrad, official": (diffgrad_aliased, "DiffGrad", {**BETAS, "variant": "official"}, {}),
    "EXAdam": (exadam, "EXAdam", BETAS, {}),
    "SGD-SaI": (sgd_sai, "SGDSaI", {}, {}),
    "Sophia-G": (sophia, "SophiaG", {"bs": 50}, {"before": observing("sophia", 10)}),
    "Sophia-H": (sophia, "SophiaH", {"bs": 50}, {"before": observing("sophia", 10)}),
    "AdaHessian": (adahessian, "AdaHessian", BETAS, {"before": observing("adahessian", 1)}),
}


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("case", GOLDEN)
def test_25_steps_equal_the_published_formula(case: str, problem: str, engine: str) -> None:
    step, name, options, how = GOLDEN[case]
    ours = walk(
        lambda params: getattr(optim, name)(params, lr=LR, weight_decay=WD, engine=engine, **options),
        PROBLEMS[problem](),
        **how,
    )
    theirs = formula(step, PROBLEMS[problem]())
    assert far_apart(ours, theirs) < tolerance(problem)
    assert far_apart(ours, PROBLEMS[problem]()[0]) > 1e-2  # it moved


def _lion_pytorch(params):
    return pytest.importorskip("lion_pytorch").Lion(params, lr=LR, betas=(0.9, 0.99), weight_decay=WD)


def _adabelief_pytorch(params):
    theirs = pytest.importorskip("adabelief_pytorch").AdaBelief
    return theirs(params, lr=LR, betas=(0.9, 0.99), eps=1e-10, weight_decay=WD, print_change_log=False)


def _adabelief_plain(params):
    theirs = pytest.importorskip("adabelief_pytorch").AdaBelief
    return theirs(params, lr=LR, betas=(0.9, 0.99), eps=1e-10, weight_decay=WD, rectify=False, print_change_log=False)


def _sgd_sai(params):
    return pytest.importorskip("sgd_sai").SGD_sai(params, lr=LR, weight_decay=WD)


PACKAGES = {
    "lion-pytorch": ("Lion", BETAS, _lion_pytorch),
    "adabelief-pytorch, rectified": ("AdaBelief", {**BETAS, "eps": 1e-10, "variant": "official"}, _adabelief_pytorch),
    "adabelief-pytorch, plain": ("AdaBelief", {**BETAS, "eps": 1e-10}, _adabelief_plain),
    "sgd_sai": ("SGDSaI", {}, _sgd_sai),
    "torch AdamW": ("AdamW", BETAS, lambda p: torch.optim.AdamW(p, lr=LR, betas=(0.9, 0.99), weight_decay=WD)),
    "torch SGD": (
        "SGD",
        {"momentum": 0.9, "nesterov": True},
        lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True, weight_decay=WD),
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("package", PACKAGES)
def test_25_steps_equal_a_faithful_package(package: str, problem: str) -> None:
    name, options, make = PACKAGES[package]
    theirs = walk(make, PROBLEMS[problem]())
    ours = walk(lambda params: getattr(optim, name)(params, lr=LR, weight_decay=WD, **options), PROBLEMS[problem]())
    assert far_apart(ours, [t.double().numpy() for t in theirs]) < tolerance(problem)


def test_the_named_deviations_are_real() -> None:
    """Each `variant` and each deviation in a docstring is a different walk, not a different word."""
    problem = PROBLEMS["rosenbrock"]()

    def one(name, **options):
        return walk(lambda params: getattr(optim, name)(params, lr=LR, **options), problem)

    for name in ("AdaBelief", "DiffGrad"):
        paper, official = one(name, variant="paper"), one(name, variant="official")
        assert far_apart(paper, [p.numpy() for p in official]) > 1e-4  # a hundred million times the tolerance
    # EXAdam's numerator m + g makes its first step about twice Adam's
    first = (problem[0], problem[1][:1])
    adam = walk(lambda p: optim.AdamW(p, lr=LR, weight_decay=0), first)
    exadam = walk(lambda p: optim.EXAdam(p, lr=LR), first)
    ratio = (exadam[0] - problem[0][0]).abs() / (adam[0] - problem[0][0]).abs()
    # (m + g) d1 / sqrt(v d2) with m = 0.1 g at step 1: 1.1 / 0.1 d1 / sqrt(d2) = 11 * 1.999 / sqrt(1.9) over Adam's 1
    assert ratio.median().item() == pytest.approx(11 * 1.999 / math.sqrt(1.9), rel=0.01)
