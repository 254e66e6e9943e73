"""Two gloo processes: rules on DTensors equal the unsharded run, and curvature is averaged as one batch would give it."""

from __future__ import annotations

import math
import socket
import sys
import traceback
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import towtank.optim as optim
from tests.optim.test_rules import NAMES, make
from towtank.optim.diagonals import gauss_newton_bartlett_diagonal, hutchinson_diagonal
from towtank.optim.transforms import orthograd

SHAPES = ((6, 5), (5,), (3, 2, 2, 2))  # 5 and 3 rows on two processes: shards of unequal size
DOUBLE = torch.float64


def _start(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=DOUBLE) for s in SHAPES]


def _step(optimizer, params, grads) -> None:
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    if optimizer.rule.observe is not None:
        optimizer.observe_curvature([g * g for g in grads])
    optimizer.step()


def _shared(tensors, mesh, dim: int):
    from torch.distributed.tensor import Shard, distribute_tensor

    return [distribute_tensor(t.clone(), mesh, [Shard(dim if t.ndim > dim else 0)]) for t in tensors]


def _rules_equal_the_unsharded_run(mesh, name: str) -> None:
    for dim in (0,) if optim.rule_of(name).reach == "element" else (0, 1):
        plain = [nn.Parameter(t.clone()) for t in _start()]
        parts = [nn.Parameter(t) for t in _shared(_start(), mesh, dim)]
        options = {"weight_decay": 0.01, "clip": 2.0, "clip_each": 1.5}
        one, other = make(name, plain, **options), make(name, parts, **options)
        for t in range(2):
            grads = _start(10 + t)
            _step(one, plain, grads)
            _step(other, parts, _shared(grads, mesh, dim))
        for p, q in zip(plain, parts, strict=True):
            # norms in another order; Muon's iteration is in bfloat16 on the same gathered numbers
            torch.testing.assert_close(q.full_tensor(), p, rtol=0, atol=1e-4 if name == "Muon" else 1e-12)
            for field, state in other.state[q].items():
                if state.shape == q.shape:
                    assert state.placements == q.placements, field
        a, b = one.statistics(), other.statistics()
        for told, expected in zip(b.values(), a.values(), strict=True):
            assert told == pytest.approx(expected, rel=1e-6, abs=1e-9)


def _a_state_goes_on_and_bad_numbers_are_found_by_all(mesh) -> None:
    parts = [nn.Parameter(t) for t in _shared(_start(), mesh, 0)]
    optimizer = optim.AdamW(list(zip("abc", parts, strict=True)))
    _step(optimizer, parts, _shared(_start(1), mesh, 0))
    twins = [nn.Parameter(p.detach().clone()) for p in parts]
    other = optim.AdamW(list(zip("abc", twins, strict=True)))
    other.load_state_dict(optimizer.state_dict())
    for these, which in ((parts, optimizer), (twins, other)):
        _step(which, these, _shared(_start(2), mesh, 0))
    for p, q in zip(parts, twins, strict=True):
        assert torch.equal(p.full_tensor(), q.full_tensor())
    bad = _start(3)
    bad[0][5, 1] = math.nan  # in the second process's part only
    try:
        _step(optimizer, parts, _shared(bad, mesh, 0))
    except FloatingPointError as e:
        assert "a (1 numbers)" in str(e)
    else:
        raise AssertionError("expected every process to see the gradient that is not finite")
    other.nonfinite = "skip"
    _step(other, twins, _shared(bad, mesh, 0))
    assert other.skipped == 1


def _fsdp_trains_as_one_process_does(mesh) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    def model() -> nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double()

    whole, split = model(), fully_shard(model(), mesh=mesh)
    x, y = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1)).double(), torch.ones(2, 8, 3).double()
    make_one: Callable = lambda m: optim.Lion(m.named_parameters(), lr=0.01, transforms=[orthograd])  # noqa: E731
    one, other = make_one(whole), make_one(split)
    for t in range(4):
        for m, o, a, b in (
            (whole, one, x.flatten(0, 1), y.flatten(0, 1)),
            (split, other, x[dist.get_rank()], y[dist.get_rank()]),
        ):
            o.zero_grad()
            nn.functional.mse_loss(m(a), b).backward()
            o.step()
        if t == 1:  # through a distributed checkpoint into a fresh optimizer
            saved = get_optimizer_state_dict(split, other)
            other = make_one(split)
            set_optimizer_state_dict(split, other, saved)
    for p, q in zip(whole.parameters(), split.parameters(), strict=True):
        torch.testing.assert_close(q.full_tensor(), p, rtol=0, atol=1e-12)


def _curvature_is_that_of_the_merged_batch() -> None:
    rank = dist.get_rank()
    x = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    w = torch.randn(3, 2, generator=torch.Generator().manual_seed(2), dtype=DOUBLE, requires_grad=True)
    signs = torch.Generator().manual_seed(3)  # equal on both ranks: the sample of the merged batch
    (got,) = hutchinson_diagonal(torch.tanh(x[rank] @ w).square().mean(), [w], generator=signs)

    def merged(v: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.flatten(0, 1) @ v).square().mean()

    H = torch.autograd.functional.hessian(merged, w.detach()).reshape(6, 6)
    z = 2.0 * torch.randint(0, 2, (3, 2), generator=torch.Generator().manual_seed(3)).double().flatten() - 1
    torch.testing.assert_close(got.flatten(), z * (H @ z), rtol=0, atol=1e-12)

    draws = torch.Generator().manual_seed(7 + rank)
    (got,) = gauss_newton_bartlett_diagonal(x[rank] @ w, [w], generator=draws)
    parts = []
    for r in range(2):  # by hand: the mean of all eight sampled gradients, then squared
        probabilities = (x[r] @ w).detach().softmax(-1)
        labels = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(7 + r))[:, 0]
        parts.append(x[r].T @ (probabilities - nn.functional.one_hot(labels, 2)))
    torch.testing.assert_close(got, (sum(parts) / 8).square(), rtol=0, atol=1e-12)


def _worker(rank: int, port: int, told) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    checks: dict[str, Callable[[], None]] = {n: lambda n=n: _rules_equal_the_unsharded_run(mesh, n) for n in NAMES}
    checks |= {
        "state": lambda: _a_state_goes_on_and_bad_numbers_are_found_by_all(mesh),
        "fsdp": lambda: _fsdp_trains_as_one_process_does(mesh),
        "curvature": _curvature_is_that_of_the_merged_batch,
    }
    found = {}
    for name, check in checks.items():
        try:
            check()
        except Exception:
            found[name] = traceback.format_exc()[-3000:]
            print(f"rank {rank}, {name}: {found[name]}", file=sys.stderr, flush=True)
            break  # the other process may be elsewhere by now
    told.put((rank, found, list(checks)))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcome() -> tuple[dict[str, str], list[str]]:
    """What went wrong in one run of two processes, by check, and all checks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    told = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(_worker, args=(port, told), nprocs=2, join=False)
    while not context.join(timeout=120):
        pass
    results = [told.get() for _ in range(2)]
    return {n: text for _, found, _ in results for n, text in found.items()}, results[0][2]


@pytest.mark.parametrize("check", [*NAMES, "state", "fsdp", "curvature"])
def test_on_two_processes(check: str, outcome: tuple[dict[str, str], list[str]]) -> None:
    wrong, checks = outcome
    assert check in checks
    first = min((checks.index(n) for n in wrong), default=len(checks))
    if checks.index(check) > first:
        pytest.skip("a check before it failed")
    assert check not in wrong, wrong[check]
