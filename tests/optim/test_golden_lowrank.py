"""25 steps of Muon, GaLore and Fira against their published formulas and faithful packages."""

from __future__ import annotations

import importlib
import importlib.util
import io
import math
import sys
import types

import numpy as np
import pytest
import torch

import towtank.optim as optim
from tests.optim.golden import PROBLEMS, Recorded, far_apart, formula, tolerance, walk
from towtank.optim.engine import Surround
from towtank.optim.members import Members
from towtank.optim.rules import fira, galore, lowrank, mfac, muon
from towtank.optim.rules.orthogonal import orthogonalized

LR, WD = 3e-3, 0.1
GAP, RANK = 10, 2


def adam(g, s, t, eps, official=False):
    """Kingma and Ba 2015; officially with epsilon beside the uncorrected root: (direction, its factor)."""
    s["m"], s["v"] = 0.9 * s.get("m", 0) + 0.1 * g, 0.999 * s.get("v", 0) + 0.001 * g * g
    c1, c2 = 1 - 0.9**t, 1 - 0.999**t
    if official:
        return s["m"] / (np.sqrt(s["v"]) + eps), math.sqrt(c2) / c1
    return (s["m"] / c1) / (np.sqrt(s["v"] / c2) + eps), 1.0


def newton_schulz(m):
    x = m / np.linalg.norm(m)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
    return x


def muon_formula(p, g, s, t, nesterov=True, rms=False):
    if p.ndim < 2:
        direction, _ = adam(g, s, t, 1e-8)
        return p * (1 - LR * WD) - LR * direction
    s["b"] = 0.95 * s.get("b", 0) + 0.05 * g
    m = (0.95 * s["b"] + 0.05 * g if nesterov else s["b"]).reshape(len(g), -1)
    rows, columns = m.shape
    factor = 0.2 * math.sqrt(max(rows, columns)) if rms else math.sqrt(max(1, rows / columns))
    return p * (1 - LR * WD) - LR * factor * newton_schulz(m).reshape(p.shape)


def same_signs(G, basis, right):
    """The sign of a singular vector is free, and numpy's library chooses others than torch's: take torch's."""
    U, _, Vt = torch.linalg.svd(torch.from_numpy(G), full_matrices=False)
    theirs = (Vt[:RANK] if right else U[:, :RANK]).numpy()
    return basis * np.sign((basis * theirs).sum(1 if right else 0, keepdims=True))


def lowrank_formula(p, g, s, t, official=False, residual=False, scale=0.25):
    """Zhao et al. 2024, algorithm 2; with the residual Chen et al. 2024, algorithm 1. A basis for rows or for columns."""
    shrunk = p * (1 - LR * WD)
    if p.ndim < 2:
        direction, factor = adam(g, s, t, 1e-6, official)
        return shrunk - LR * factor * direction
    G = g.reshape(len(g), -1)
    right = G.shape[0] >= G.shape[1]
    if (t - 1) % GAP == 0:
        U, _, Vt = np.linalg.svd(G, full_matrices=False)
        s["P"] = same_signs(G, Vt[:RANK] if right else U[:, :RANK], right)
    R = G @ s["P"].T if right else s["P"].T @ G
    N, factor = adam(R, s, t, 1e-6, official)
    back = (lambda x: x @ s["P"]) if right else (lambda x: s["P"] @ x)
    full = scale * back(N)
    if residual:
        axis = 1 if right else 0
        phi = np.linalg.norm(N, axis=axis, keepdims=True) / (np.linalg.norm(R, axis=axis, keepdims=True) + 1e-8)
        S = phi * (G - (scale if official else 1) * back(R))
        if "S" in s:
            S = S / max(1, np.linalg.norm(S) / (1.01 * (s["S"] + 1e-8)))
        s["S"] = np.linalg.norm(S)
        full = full + S
    return shrunk - LR * factor * full.reshape(p.shape)


GOLDEN = {
    "Muon": (muon_formula, {}, "Muon", {}),
    "Muon, no Nesterov": (muon_formula, {"nesterov": False}, "Muon", {"nesterov": False}),
    "Muon, RMS of AdamW": (muon_formula, {"rms": True}, "Muon", {"variant": "match_rms_adamw"}),
    "GaLore": (lowrank_formula, {}, "GaLore", {"rank": RANK, "update_proj_gap": GAP}),
    "GaLore, official": (
        lowrank_formula,
        {"official": True},
        "GaLore",
        {"rank": RANK, "update_proj_gap": GAP, "variant": "official"},
    ),
    "Fira": (
        lowrank_formula,
        {"residual": True, "scale": 0.5},
        "Fira",
        {"rank": RANK, "update_proj_gap": GAP, "alpha": 0.5},
    ),
    "Fira, official": (
        lowrank_formula,
        {"residual": True, "scale": 0.5, "official": True},
        "Fira",
        {"rank": RANK, "update_proj_gap": GAP, "alpha": 0.5, "variant": "official"},
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("case", GOLDEN)
def test_25_steps_equal_the_published_formula(case: str, problem: str) -> None:
    step, numbers, name, options = GOLDEN[case]
    ours = walk(lambda params: getattr(optim, name)(params, lr=LR, weight_decay=WD, **options), PROBLEMS[problem]())
    theirs = formula(lambda p, g, s, t: step(p, g, s, t, **numbers), PROBLEMS[problem]())
    assert far_apart(ours, theirs) < tolerance(problem)
    assert far_apart(ours, PROBLEMS[problem]()[0]) > 1e-2


def only(problem: Recorded, keep) -> Recorded:
    """The tensors of a problem that satisfy a condition."""
    start, grads = problem
    chosen = [i for i, p in enumerate(start) if keep(p)]
    return [start[i] for i in chosen], [[step[i] for i in chosen] for step in grads]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("variant", ["official", "official_match_rms_adamw"])
def test_muon_equals_torchs_bit_by_bit(variant: str, problem: str) -> None:
    """But for where the decay is subtracted: one rounding a step."""
    matrices = only(PROBLEMS[problem](), lambda p: p.ndim == 2)
    adjust = variant.removeprefix("official").removeprefix("_") or "original"
    ours = walk(lambda p: optim.Muon(p, lr=LR, weight_decay=0.0, variant=variant), matrices)
    theirs = walk(lambda p: torch.optim.Muon(p, lr=LR, weight_decay=0.0, adjust_lr_fn=adjust), matrices)
    assert far_apart(ours, [t.numpy() for t in theirs]) < (1e-15 if problem == "rosenbrock" else 1e-7)
    ours = walk(lambda p: optim.Muon(p, lr=LR, weight_decay=WD, variant=variant), matrices)
    theirs = walk(lambda p: torch.optim.Muon(p, lr=LR, weight_decay=WD, adjust_lr_fn=adjust), matrices)
    assert far_apart(ours, [t.numpy() for t in theirs]) < tolerance(problem)


def test_muon_in_bfloat16_is_not_muon_in_float32() -> None:
    """The named deviation: rounding by 2^-9, and five iterations that multiply what is near zero by up to 3.4445^5 = 485."""
    matrices = only(PROBLEMS["network"](), lambda p: p.ndim == 2)
    one = (matrices[0], matrices[1][:1])
    exact, half = (
        walk(lambda p, v=v: optim.Muon(p, lr=1.0, weight_decay=0.0, variant=v), one) for v in ("", "official")
    )
    for p, a, b in zip(one[0], exact, half, strict=True):
        assert 2**-9 < float((a - b).norm() / (a - p).norm()) < 485 * 2**-9


def test_newton_schulz_turns_and_hardly_stretches() -> None:
    """U f(S) V^T: the singular vectors stay, the values come to 0.68 ... 1.14 (from 0.1 of the norm upwards)."""
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(9, 6, generator=generator, dtype=torch.float64))
    values = torch.linspace(0.3, 1, 6, dtype=torch.float64)
    inner = u.mT @ orthogonalized(u @ torch.diag(values) @ v.mT) @ v
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), rtol=0, atol=1e-12)
    assert inner.diagonal().min() > 0.68 and inner.diagonal().max() < 1.14


def test_muon_takes_a_convolution_as_a_matrix_where_the_authors_package_looks_at_the_kernel() -> None:
    update = pytest.importorskip("muon").muon_update
    g = torch.randn(32, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    theirs = update(g.clone(), torch.zeros_like(g)).reshape(g.shape).float()
    p = torch.nn.Parameter(torch.zeros_like(g))
    p.grad = g
    optim.Muon([p], lr=1.0, weight_decay=0.0).step()
    ratio = float(p.detach().norm() / theirs.norm())
    assert ratio == pytest.approx(math.sqrt(32 / 8), rel=0.02)  # bfloat16


def authors(package: str, module: str):
    """The optimizer of an installed package, without the package's other modules, which import large libraries."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(f"{package} is not installed")
    shell = types.ModuleType(package)
    shell.__path__ = spec.submodule_search_locations
    versions = types.ModuleType("transformers.utils.versions")
    versions.require_version = lambda *_: None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package, shell)
        for name in ("transformers", "transformers.utils"):
            patch.setitem(sys.modules, name, types.ModuleType(name))
        patch.setitem(sys.modules, versions.__name__, versions)
        return importlib.import_module(f"{package}.{module}").AdamW


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("package", ["galore_torch", "fira"])
def test_galore_and_fira_equal_the_authors_packages(package: str, problem: str) -> None:
    """Their SVD is in float32: of a float64 gradient the vectors are off by 1e-7 over the relative gap of the values.

    Convolutions crash there. Decay is applied to the moved weights, so it is off here.
    """
    theirs_class = authors(package, "adamw" if package == "galore_torch" else "fira_adamw")
    fed = only(PROBLEMS[problem](), lambda p: p.ndim < 3)
    name, scale = ("GaLore", {"scale": 0.25}) if package == "galore_torch" else ("Fira", {"alpha": 0.5})

    def official(params):
        shared = {"rank": RANK, "update_proj_gap": GAP, "proj_type": "std", **scale}
        groups = [{"params": [p], **(shared if p.ndim > 1 else {})} for p in params]
        return theirs_class(groups, lr=LR, no_deprecation_warning=True)

    options = {"rank": RANK, "update_proj_gap": GAP, "variant": "official", **scale}
    ours = walk(lambda p: getattr(optim, name)(p, lr=LR, **options), fed)
    theirs = walk(official, fed)
    assert far_apart(ours, [t.double().numpy() for t in theirs]) < (1e-5 if problem == "rosenbrock" else 1e-6)
    paper = walk(lambda p: getattr(optim, name)(p, lr=LR, **options | {"variant": "paper"}), fed)
    assert far_apart(paper, [t.double().numpy() for t in theirs]) > 1e-6  # the named deviation


@pytest.mark.parametrize("name", ["GaLore", "Fira"])
def test_a_projection_of_full_rank_is_adam_in_a_turned_basis(name: str) -> None:
    """With one gradient direction u v^T kept up, R = s e_1 and the step is Adam's of s along u v^T: closed form."""
    u, v = torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    p = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    scale = {"scale": 1.0} if name == "GaLore" else {}
    optimizer = getattr(optim, name)([p], lr=0.1, eps=1e-12, rank=2, **scale)
    for t in range(1, 4):
        p.grad = 5 * torch.outer(u, v)
        optimizer.step()
        signs = torch.outer(torch.sign(u), v)  # Adam in the rows of R = G Q: each entry moves by lr
        torch.testing.assert_close(p.detach(), -0.1 * t * signs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["GaLore", "Fira"])
def test_a_state_loads_with_weights_only_and_goes_on_bit_by_bit(name: str) -> None:
    start, grads = PROBLEMS["network"]()

    def run(params, optimizer, steps):
        for step in steps:
            for p, g in zip(params, step, strict=True):
                p.grad = g.clone()
            optimizer.step()

    make = lambda params: getattr(optim, name)(params, lr=LR, rank=RANK, update_proj_gap=4)  # noqa: E731
    whole, first = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    run(whole, make(whole), grads[:12])
    optimizer = make(first)
    run(first, optimizer, grads[:6])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = make(second := [torch.nn.Parameter(p.detach().clone()) for p in first])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(second, resumed, grads[6:12])
    for a, b in zip(whole, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rule", [galore.RULE, fira.RULE, mfac.RULE, muon.RULE], ids=lambda r: r.name)
def test_members_equal_solo_runs_with_their_own_rates_and_refreshes(rule) -> None:
    """Two members of an ensemble with other rates and other gaps."""
    generator = torch.Generator().manual_seed(0)
    gaps, rates = (3, 4), (0.01, 0.03)
    numbers = [rule.hyper(lr=lr) for lr in rates]
    if rule.again:
        numbers = [n._replace(rank=2, update_proj_gap=gap) for n, gap in zip(numbers, gaps, strict=True)]
    start = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    grads = torch.randn(9, 2, 5, 4, generator=generator, dtype=torch.float64)
    params = {"w": start.clone()}
    hyper = rule.hyper(*(torch.tensor(column, dtype=torch.float64) for column in zip(*numbers, strict=True)))
    members = Members(rule, params, {"w": "matrix"}, hyper)
    for g in grads:
        members.advance({"w": g}, lambda name, hyper: (hyper, Surround()), torch.ones(2, dtype=torch.bool))
    for e, one in enumerate(numbers):
        p = torch.nn.Parameter(start[e].clone())
        name = {"galore": "GaLore", "fira": "Fira", "mfac": "MFAC", "muon": "Muon"}[rule.name]
        options = {k: v for k, v in one._asdict().items() if k not in ("beta1", "beta2")}
        optimizer = getattr(optim, name)([p], weight_decay=0.0, **options)
        for g in grads:
            p.grad = g[e].clone()
            optimizer.step()
        torch.testing.assert_close(params["w"][e], p.detach(), rtol=1e-10, atol=1e-10)


def test_a_lost_member_does_not_stop_the_refresh_of_the_others() -> None:
    hyper = galore.Hyper(*(torch.tensor([x, x], dtype=torch.float64) for x in galore.Hyper(rank=1, update_proj_gap=1)))
    members = Members(galore.RULE, params := {"w": torch.ones(2, 3, 2)}, {"w": "matrix"}, hyper)
    grads = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
    for moved in ([True, True], [True, False]):
        if not moved[1]:
            grads[1], kept = torch.nan, members.state["w"].basis[1].clone()
        members.advance({"w": grads}, lambda name, hyper: (hyper, Surround()), torch.tensor(moved))
    assert params["w"].isfinite().all()
    assert torch.equal(members.state["w"].basis[1], kept)


def test_the_limit_of_firas_residual_and_its_statistic() -> None:
    """G = [[3, s], [3, -s]] has the leading vector e_1 while s < 3; without memory Adam takes signs, so phi = 1/3.

    The residual is s / 3 in the second column: let grow from s = 0.1 to 1.01 times that when s becomes 1, and not limited
    where the one before was zero.
    """
    hyper = fira.Hyper(lr=1.0, beta1=0.0, beta2=0.0, eps=0.0, rank=1)
    zero = torch.zeros(2, 2, dtype=torch.float64)

    def steps(values):
        for t, s in enumerate(values, start=1):
            g = torch.tensor([[3.0, s], [3.0, -s]], dtype=torch.float64)
            state = galore.begin(fira.init(zero, "matrix", hyper), g, hyper) if t == 1 else state  # noqa: F821
            told = fira.RULE.statistics(zero, g, state, hyper, t)
            new, state = fira.update(zero, g, state, hyper, t)
        return new, told

    new, told = steps([0.1, 1.0])
    expected = torch.tensor([[-1.0, -1.01 * 0.1 / 3], [-1.0, 1.01 * 0.1 / 3]], dtype=torch.float64)
    torch.testing.assert_close(new, expected, rtol=1e-6, atol=0)  # 1e-8 beside norms of 0.03
    assert float(told["norm_growth"]) == pytest.approx(10, rel=1e-6)
    assert float(told["captured"]) == pytest.approx(0.9)
    new, told = steps([0.0, 1.0])
    assert float(new[0, 1]) == pytest.approx(-1 / 3, rel=1e-6) and float(told["norm_growth"]) == 1


def test_the_decay_of_galores_package_acts_on_the_moved_weights() -> None:
    """The named deviation: p (1 - lr wd) - lr u here, (p - lr u) (1 - lr wd) there: lr^2 wd u apart after one step."""
    package = authors("galore_torch", "adamw")
    lr, wd = 0.5, 0.2
    fed = only(PROBLEMS["rosenbrock"](), lambda p: p.ndim == 1)
    one = (fed[0], fed[1][:1])
    ours = walk(lambda p: optim.GaLore(p, lr=lr, weight_decay=wd, variant="official"), one)[0]
    bare = walk(lambda p: optim.GaLore(p, lr=lr, variant="official"), one)[0]
    theirs = walk(lambda p: package(p, lr=lr, weight_decay=wd, no_deprecation_warning=True), one)[0]
    torch.testing.assert_close(theirs - ours, -lr * wd * (bare - one[0][0]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["GaLore", "Fira"])
def test_embeddings_heads_and_vectors_take_adam(name: str) -> None:
    start, grads = only(PROBLEMS["rosenbrock"](), lambda p: p.ndim == 2)
    for role in ("embedding", "head", "vector"):
        make = lambda p: getattr(optim, name)([{"params": p, "role": role}], lr=LR, eps=1e-8)  # noqa: B023, E731
        ours = walk(make, (start, grads))
        adamw = walk(lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.0), (start, grads))
        assert far_apart(ours, [t.numpy() for t in adamw]) < 1e-12


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("GaLore", {"rank": 0}, "rank = 0.*>= 1"),
        ("Fira", {"update_proj_gap": 0}, "update_proj_gap = 0.*>= 1"),
        ("MFAC", {"ngrads": 0}, "ngrads = 0.*>= 1"),
        ("Muon", {"variant": "offical"}, "variant = 'offical'.*match_rms_adamw"),
    ],
)
def test_bad_numbers_are_refused(name: str, options: dict, message: str) -> None:
    p = torch.nn.Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2)
    with pytest.raises(ValueError, match=message):
        getattr(optim, name)([p], **options).step()


def test_a_gradient_that_is_not_finite_stops_before_the_svd() -> None:
    p = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = optim.GaLore([p], update_proj_gap=2)
    for bad in (False, False, True):  # the third step is due for a new basis
        p.grad = torch.full((3, 2), torch.nan) if bad else torch.ones(3, 2)
        if bad:
            kept = p.detach().clone()
            with pytest.raises(FloatingPointError, match="not finite"):
                optimizer.step()
        else:
            optimizer.step()
    assert torch.equal(p.detach(), kept)


def test_the_basis_spans_the_leading_singular_vectors_of_the_shorter_side() -> None:
    """Q Q^T against the projector from an eigendecomposition of G^T G, or G G^T."""
    g = torch.randn(7, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for grad in (g, g.reshape(4, 7)):
        matrix = grad.reshape(len(grad), -1)
        square = matrix.mT @ matrix if len(matrix) > 4 else matrix @ matrix.mT
        top = torch.linalg.eigh(square)[1][:, -2:]
        basis = lowrank.leading(grad, 2)
        torch.testing.assert_close(basis @ basis.mT, top @ top.mT, rtol=0, atol=1e-12)
        assert torch.equal(lowrank.restored(lowrank.tall(grad), grad), grad)
