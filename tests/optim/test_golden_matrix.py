"""25 steps of the rules that look at rows or whole tensors, against their published formulas and faithful packages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import towtank.optim as optim
from tests.optim.golden import PROBLEMS, far_apart, formula, tolerance, walk

LR, WD = 3e-3, 0.1


def rows(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0], -1)


def projected(p, g, q, delta, ratio, eps):
    """Heo et al. 2021, algorithm 1: rows first, then the whole tensor."""
    if p.ndim < 2:
        return q, 1.0
    for view in (rows, lambda x: x.reshape(1, -1)):
        P, G, Q = view(p), view(g), view(q)
        norms = np.linalg.norm(P, axis=1)
        cosine = np.abs((P * G).sum(1)) / np.maximum(norms * np.linalg.norm(G, axis=1), eps)
        if cosine.max() < delta / math.sqrt(P.shape[1]):
            unit = P / (norms[:, None] + eps)
            return (Q - unit * (unit * Q).sum(1, keepdims=True)).reshape(p.shape), ratio
    return q, 1.0


def adamp(p, g, s, t, b1=0.9, b2=0.99, eps=1e-8, delta=0.1, nesterov=False):
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g * g
    ahead = b1 * s["m"] + (1 - b1) * g if nesterov else s["m"]
    q, r = projected(p, g, ahead / (np.sqrt(s["v"] / (1 - b2**t)) + eps), delta, 0.1, eps)
    return p * (1 - LR * WD * r) - LR / (1 - b1**t) * q


def sgdp(p, g, s, t, mu=0.9, delta=0.1, eps=1e-8, aliased=False, nesterov=False):
    s["b"] = mu * s.get("b", 0) + g
    q, r = projected(p, g, g + mu * s["b"] if nesterov else s["b"], delta, 0.1, eps)
    if aliased:
        s["b"] = q
    return p * (1 - LR * WD * r / (1 - mu)) - LR * q


def nero(p, g, s, t, b=0.999):
    """Liu et al. 2021; the start is constrained at t = 1, as the optimizer does when it is made."""

    def constrained(x):
        if x.ndim < 2:
            return x
        X = rows(x) - rows(x).mean(1, keepdims=True)
        return (X / np.linalg.norm(X, axis=1, keepdims=True)).reshape(x.shape)

    def norms(x):
        return np.abs(x) if x.ndim < 2 else np.linalg.norm(rows(x), axis=1).reshape(-1, *(1,) * (x.ndim - 1))

    if t == 1:
        p = constrained(p)
        s["scale"], s["v"] = norms(p).mean() or 0.01, 0 * norms(p)
    s["v"] = b * s["v"] + (1 - b) * norms(g) ** 2
    step = np.nan_to_num(g / np.sqrt(s["v"] / (1 - b**t)))
    return constrained(p - LR * s["scale"] * step)


def scale(p, g, s, t, eps=1e-8, mean=True):
    """Glentis et al. 2025: rows of matrices by their root mean square (their norm in the paper), vectors by AdamW."""
    p = p * (1 - LR * WD)
    if p.ndim < 2:
        s["m"], s["v"] = 0.9 * s.get("m", 0) + 0.1 * g, 0.999 * s.get("v", 0) + 0.001 * g * g
        return p - LR * (s["m"] / (1 - 0.9**t)) / (np.sqrt(s["v"] / (1 - 0.999**t)) + eps)
    size = np.linalg.norm(rows(g), axis=1) / (math.sqrt(rows(g).shape[1]) if mean else 1)
    return p - LR * g / (size.reshape(-1, *(1,) * (g.ndim - 1)) + eps)


# a delta this large projects everything but tensors whose gradient is nearly radial, so that the projection is tested
ALWAYS = 50.0
GOLDEN = {
    "AdamP": (adamp, {}, "AdamP", {"betas": (0.9, 0.99)}),
    "AdamP, projected": (adamp, {"delta": ALWAYS}, "AdamP", {"betas": (0.9, 0.99), "delta": ALWAYS}),
    "AdamP, Nesterov": (adamp, {"nesterov": True}, "AdamP", {"betas": (0.9, 0.99), "nesterov": True}),
    "SGDP": (sgdp, {}, "SGDP", {"momentum": 0.9}),
    "SGDP, projected": (sgdp, {"delta": ALWAYS}, "SGDP", {"momentum": 0.9, "delta": ALWAYS}),
    "SGDP, official": (
        sgdp,
        {"delta": ALWAYS, "aliased": True},
        "SGDP",
        {"momentum": 0.9, "delta": ALWAYS, "variant": "official"},
    ),
    "SGDP, Nesterov": (
        sgdp,
        {"delta": ALWAYS, "nesterov": True},
        "SGDP",
        {"momentum": 0.9, "delta": ALWAYS, "nesterov": True},
    ),
    "Nero": (nero, {}, "Nero", {"weight_decay": 0.0}),
    "SCALE": (scale, {}, "SCALE", {}),
    "SCALE, paper": (scale, {"mean": False}, "SCALE", {"variant": "paper"}),
}


@pytest.mark.parametrize("engine", ["auto", "eager"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("case", GOLDEN)
def test_25_steps_equal_the_published_formula(case: str, problem: str, engine: str) -> None:
    step, numbers, name, options = GOLDEN[case]
    options = {"weight_decay": WD, "engine": engine} | options
    ours = walk(lambda params: getattr(optim, name)(params, lr=LR, **options), PROBLEMS[problem]())
    theirs = formula(lambda p, g, s, t: step(p, g, s, t, **numbers), PROBLEMS[problem]())
    assert far_apart(ours, theirs) < tolerance(problem)
    assert far_apart(ours, PROBLEMS[problem]()[0]) > 1e-2


def _official(name: str, **options):
    return lambda params: getattr(pytest.importorskip("adamp"), name)(params, lr=LR, weight_decay=WD, **options)


PACKAGES = {
    "AdamP": ("AdamP", {"betas": (0.9, 0.99)}, {}),
    "AdamP, projected": ("AdamP", {"betas": (0.9, 0.99), "delta": ALWAYS}, {}),
    "SGDP, projected": ("SGDP", {"momentum": 0.9, "delta": ALWAYS}, {"variant": "official"}),
    "SGDP, Nesterov": ("SGDP", {"momentum": 0.9, "delta": ALWAYS, "nesterov": True}, {}),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("package", PACKAGES)
def test_25_steps_equal_the_authors_package(package: str, problem: str) -> None:
    name, both, ours_only = PACKAGES[package]
    theirs = walk(_official(name, **both), PROBLEMS[problem]())
    ours = walk(
        lambda params: getattr(optim, name)(params, lr=LR, weight_decay=WD, **both, **ours_only), PROBLEMS[problem]()
    )
    assert far_apart(ours, [t.double().numpy() for t in theirs]) < tolerance(problem)


def test_adamps_projected_step_leaves_the_norm_to_second_order() -> None:
    """A step orthogonal to each row changes its squared norm by exactly its own squared length."""
    start, grads = PROBLEMS["rosenbrock"]()
    moved = walk(lambda p: optim.AdamP(p, lr=LR, delta=ALWAYS), (start, grads[:1]))
    for p, q in zip(start[:2], moved[:2], strict=True):
        grown = (q**2).sum(1) - (p**2).sum(1)
        torch.testing.assert_close(grown, ((q - p) ** 2).sum(1), rtol=1e-5, atol=1e-9)


def test_neros_rows_are_centred_and_of_unit_norm_from_the_start_and_rows_of_zeros_stay() -> None:
    p = torch.nn.Parameter(torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        p[2] = 0
    optimizer = optim.Nero([p], lr=0.1)
    for _ in range(3):
        norms = p.detach().flatten(1).norm(dim=1)
        torch.testing.assert_close(norms, torch.tensor([1.0, 1.0, 0.0, 1.0]), rtol=1e-6, atol=1e-6)
        assert p.detach().flatten(1).mean(1).abs().max() < 1e-7
        p.grad = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1))
        p.grad[2] = 0
        optimizer.step()


def test_scale_treats_embedding_and_head_by_role() -> None:
    """An embedding is normalized along its vocabulary, a head has momentum: by hand."""
    generator = torch.Generator().manual_seed(0)
    start = {role: torch.randn(5, 4, generator=generator, dtype=torch.float64) for role in ("embedding", "head")}
    grads = [{r: torch.randn(5, 4, generator=generator, dtype=torch.float64) for r in start} for _ in range(3)]
    params = {r: torch.nn.Parameter(p.clone()) for r, p in start.items()}
    optimizer = optim.SCALE([{"params": [p], "role": r} for r, p in params.items()], lr=0.1)
    m = torch.zeros(5, 4, dtype=torch.float64)
    for g in grads:
        for r, p in params.items():
            p.grad = g[r].clone()
        optimizer.step()
        m = 0.9 * m + 0.1 * g["head"]
        start["embedding"] -= 0.1 * g["embedding"] / (g["embedding"].pow(2).mean(0, keepdim=True).sqrt() + 1e-8)
        start["head"] -= 0.1 * m / (m.pow(2).mean(1, keepdim=True).sqrt() + 1e-8)
    for r, p in params.items():
        torch.testing.assert_close(p.detach(), start[r], rtol=1e-12, atol=1e-12)
