"""Two processes that average their gradients: parts are gathered, one of them writes, and the training is the same."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from tests.signals.loops import hooks, rows
from towtank.signals.cadence import every
from towtank.signals.monitor import Monitor
from towtank.signals.noise import gradient_noise
from towtank.signals.step import Step

WORLD, STEPS, EVERY = 2, 5, 2
Sums = dict[str, Tensor]


class Norms:
    """Keeps what was recorded, as numbers. It needs the parts of the step, so it runs in every process."""

    needs = frozenset({"micro", "raw_norms"})

    def __init__(self) -> None:
        self.found: dict[int, dict[str, Any]] = {}

    def __call__(self, step: Step) -> dict[str, float]:
        micro = step.micro
        self.found[step.number] = {
            "parts": [{n: float(x) for n, x in part.items()} for part in micro.squares],
            "sizes": micro.sizes,
            "total": {n: float(x) for n, x in micro.total.items()},
            "raw": {n: float(x) for n, x in step.raw_norms.items()},
        }
        return {"norms/seen": 1.0}


class Undeclared:
    """Reads the parts without saying so, and at every step: it runs in one process, which must not wait for the other."""

    def __call__(self, step: Step) -> dict[str, float]:
        return {"undeclared/parts": float(len(step.micro.squares))}


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g) / 2
    return model


def batch(rank: int, step: int) -> tuple[Tensor, Tensor]:
    return rows("mlp", seed=10 * step + rank, size=6 + 2 * rank)


def train(rank: int, out: Path | None, *, watch: bool) -> dict[str, Any]:
    model = network()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    probe = Norms()
    monitor = None
    if watch:
        probes = [probe, gradient_noise(), every(1, Undeclared())]
        monitor = Monitor(wrapped, optimizer, loss=F.cross_entropy, out=out, probes=probes, every=EVERY)
    for step in range(1, STEPS + 1):
        x, y = batch(rank, step)
        loss = F.cross_entropy(wrapped(x), y)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        optimizer.step()
        if monitor is not None:
            monitor.step(loss, (x, y))
    found: dict[str, Any] = {"state": {n: p.detach().tolist() for n, p in model.named_parameters()}}
    if monitor is not None:
        monitor.close()
        history = {key: points for key, points in monitor.history.items()}
        found |= {"norms": probe.found, "history": history, "notes": list(monitor.notes)}
        found["hooks"] = hooks(model, optimizer)
    return found


def process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    try:
        out = Path(folder) / f"rank{rank}"
        watched = train(rank, out, watch=True)
        watched["wrote"] = out.exists()
        torch.save({"watched": watched, "bare": train(rank, None, watch=False)}, Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.spawn(process, args=(port, str(folder)), nprocs=WORLD, join=False)
    assert context is not None
    try:
        for _ in range(120):  # a deadlock fails here, and does not hang
            if context.join(timeout=1):
                break
        else:
            pytest.fail("expected both processes to end, got a deadlock")
    finally:
        for one in context.processes:
            one.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def by_hand(step: int) -> tuple[list[Sums], dict[str, Tensor]]:
    """Gradients of both processes at the parameters before a step, and their mean, in float64 and without DDP."""
    model = network().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    names = [n for n, _ in model.named_parameters()]
    for number in range(1, step + 1):
        data = [batch(rank, number) for rank in range(WORLD)]
        losses = [F.cross_entropy(model(x.double()), y) for x, y in data]
        parts = [dict(zip(names, torch.autograd.grad(loss, list(model.parameters())))) for loss in losses]
        mean = {n: sum(part[n] for part in parts) / WORLD for n in names}
        for n, p in model.named_parameters():
            p.grad = mean[n].clone()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        optimizer.step()
    return parts, mean


def near(expected: dict[str, float]) -> Any:
    """Float32 gradients at float32 parameters after a few steps: relative errors of some eps of 1.2e-7."""
    return pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_parts_are_those_of_all_processes(ranks: list[dict[str, Any]], step: int) -> None:
    parts, mean = by_hand(step)
    for rank in ranks:
        found = rank["watched"]["norms"][step]
        assert found["sizes"] == (6, 8)
        assert len(found["parts"]) == WORLD
        for ours, gradient in zip(found["parts"], parts):  # of gradients that sum to the mean
            assert ours == near({n: float((g / WORLD).square().sum()) for n, g in gradient.items()})
        assert found["total"] == near({n: float(g.square().sum()) for n, g in mean.items()})
        assert found["raw"] == near({n: float(g.norm()) for n, g in mean.items()})


def test_gradient_noise_comes_from_the_parts_of_both(ranks: list[dict[str, Any]]) -> None:
    """E g1.g2 = |G|^2, and E|g1 - g2|^2 = tr(Sigma) (1/6 + 1/8), for independent batches of 6 and 8 examples."""
    history = dict(ranks[0]["watched"]["history"])
    assert [step for step, _ in history["norms/seen"]] == [1, 2, 4]
    assert [step for step, _ in history["noise/scale"]] == [1, 2, 4]
    (one, two), _ = by_hand(1)
    signal = sum(float((one[n] * two[n]).sum()) for n in one)
    noise = sum(float((one[n] - two[n]).square().sum()) for n in one) / (1 / 6 + 1 / 8)
    # float32 norms: T - Q = 2 g1.g2 cancels to a third of T, so a few more eps than the norms have
    assert history["noise/scale"][0][1] == pytest.approx(noise / signal, rel=1e-5)


def test_the_norm_that_counts_is_that_of_the_mean(ranks: list[dict[str, Any]]) -> None:
    history = dict(ranks[0]["watched"]["history"])
    norms = [value for _, value in history["grad/norm"]]
    assert norms == pytest.approx([1e-2] * STEPS, rel=1e-3)  # clipped to it; clip_grad_norm_ divides by norm + 1e-6


def test_the_training_is_the_same_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    first = ranks[0]["bare"]["state"]
    assert all(rank[run]["state"] == first for rank in ranks for run in ("bare", "watched"))


def test_one_process_writes_and_no_hook_is_left(ranks: list[dict[str, Any]]) -> None:
    assert [rank["watched"]["wrote"] for rank in ranks] == [True, False]
    assert [rank["watched"]["hooks"] for rank in ranks] == [[], []]
    assert not ranks[1]["watched"]["history"]


def test_a_probe_that_does_not_say_what_it_needs_makes_nobody_wait(ranks: list[dict[str, Any]]) -> None:
    watched = ranks[0]["watched"]
    assert dict(watched["history"])["undeclared/parts"] == [
        (1, 2.0),
        (2, 2.0),
        (4, 2.0),
    ]  # when others have them gathered
    assert (5, "Undeclared", "micro could not be recorded") in watched["notes"]
