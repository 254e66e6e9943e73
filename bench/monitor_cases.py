"""The loops that `bench/monitor.py` times: workloads, one training loop that goes a few steps at a time, and Cockpit around it.

The workloads are those of `curvature_cases.py`, untrained and in training mode: the GPT of 0.9M parameters at 16 x 128 tokens
by AdamW, ResNet-20 at 64 images of 32 x 32 and the MLP 784-512-512-10 at batch 256 by SGD with momentum. Nothing here imports
towtank: Cockpit's interpreter runs this file as `python bench/monitor_cases.py CASE`, see `Peer`.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from curvature_cases import _MAKERS
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
StepOf = Callable[[Tensor, Tensor], Any]
BATCHES = 40  # that a loop goes through again and again


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A network that no loop has touched, and the batches that every loop sees in the same order."""

    name: str
    model: nn.Module
    batches: tuple[Batch, ...]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """As a user makes it."""
        if self.name == "gpt":
            return torch.optim.AdamW(model.parameters(), lr=1e-3)
        return torch.optim.SGD(model.parameters(), lr={"cnn": 0.05, "mlp": 0.01}[self.name], momentum=0.9)


def workload(name: str, *, batches: int = BATCHES, shrink: int = 1) -> Workload:
    """The same in every process; `shrink` divides the number of examples of a batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batch = _MAKERS[name]()
        made = tuple(batch() for _ in range(batches))
    if shrink > 1:
        made = tuple((x[: len(x) // shrink].clone(), y[: len(y) // shrink].clone()) for x, y in made)
    return Workload(name=name, model=model.train(), batches=made)


def mean_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of outputs (..., C) and targets (...)."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@dataclass(frozen=True)
class Spent:
    """Seconds of some steps, of this process and of the clock on the wall."""

    cpu_s: float
    wall_s: float


class Loop:
    """A training loop of its own network and optimizer, that waits between calls of `go`.

    Args:
        work: what it trains, copied.
        watch: makes the step from (model, optimizer); default `bare_step`.
    """

    def __init__(
        self, work: Workload, watch: Callable[[nn.Module, torch.optim.Optimizer], StepOf] | None = None
    ) -> None:
        self.model, self.number, self._batches = copy.deepcopy(work.model), 0, work.batches
        self.optimizer = work.optimizer(self.model)
        self._step = (watch or bare_step)(self.model, self.optimizer)

    def go(self, steps: int) -> Spent:
        """Train for some steps."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self._step(*self._batches[self.number % len(self._batches)])
            self.number += 1
        return Spent(time.process_time() - cpu, time.perf_counter() - wall)


def bare_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> StepOf:
    """The step that nobody watches."""

    def step(inputs: Tensor, targets: Tensor) -> None:
        loss = mean_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def gradient_step(model: nn.Module, _: torch.optim.Optimizer) -> StepOf:
    """No step, but its gradient: the unit of dear probes."""
    parameters = list(model.parameters())
    return lambda inputs, targets: torch.autograd.grad(mean_loss(model(inputs), targets), parameters)


# Cockpit


@dataclass(frozen=True)
class Cockpit:
    """Cockpit around a step, as its manual has it: the network extended by BackPACK, individual losses, a context for backward.

    Args:
        label: of its configuration: "economy" or "full".
        interval: steps between two that it tracks.
    """

    label: str
    interval: int

    def __call__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> StepOf:
        """The step."""
        from backpack import extend  # pyright: ignore[reportMissingImports]
        from cockpit import Cockpit as Tracker  # pyright: ignore[reportMissingImports]
        from cockpit.utils.configuration import configuration  # pyright: ignore[reportMissingImports]
        from cockpit.utils.schedules import linear  # pyright: ignore[reportMissingImports]

        extend(model)
        mean, each = extend(nn.CrossEntropyLoss()), nn.CrossEntropyLoss(reduction="none")
        tracker = Tracker(model.parameters(), quantities=configuration(self.label, linear(self.interval)))
        number = iter(range(10**9))

        def step(inputs: Tensor, targets: Tensor) -> dict[str, Any]:
            at = next(number)
            outputs, classes = model(inputs).flatten(0, -2), targets.flatten()
            loss, losses = mean(outputs, classes), each(outputs, classes)
            info = {"batch_size": len(classes), "individual_losses": losses, "loss": loss, "optimizer": optimizer}
            with tracker(at, info=info):
                loss.backward(create_graph=tracker.create_graph(at))
            optimizer.step()
            optimizer.zero_grad()
            return tracker.get_output()[at] if self.label == "full" else {}

        return step


class Peer:
    """Cockpit's process: it waits while others are timed, and answers with its own times.

    Args:
        python: the interpreter of the environment that Cockpit is installed in.
        case: of the workload.
        shrink: see `workload`.
    """

    def __init__(self, python: str, case: str, shrink: int) -> None:
        command = [python, os.path.abspath(__file__), case, "--shrink", str(shrink)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        self.versions = self._answer()

    def ask(self, what: str, steps: int) -> dict[str, Any]:
        """Have it run `what` for some steps: {"cpu_s", "wall_s", "values"} or {"error"}."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{json.dumps([what, steps])}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return (
            json.loads(line) if line else {"error": f"the process ended ({self._process.wait()}): no memory, perhaps"}
        )


WATCHES = {
    "bare": None,
    "economy, every step": Cockpit("economy", 1),
    "economy, every 10 steps": Cockpit("economy", 10),
}


def serve(case: str, shrink: int) -> None:
    """The child's part of `Peer`: what is asked for comes on stdin, answers leave on stdout, one JSON a line."""
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print
    work, loops = workload(case, shrink=shrink), {}
    print(json.dumps(_versions()), file=answers, flush=True)
    for line in sys.stdin:
        what, steps = json.loads(line)
        try:
            answer = _values(work, steps) if what == "values" else _timed(work, loops, what, steps)
        except Exception as error:  # noqa: BLE001 (whatever it says is what the table says)
            answer = {"error": _said(error)}
        print(json.dumps(answer), file=answers, flush=True)


def _timed(work: Workload, loops: dict[str, Loop], what: str, steps: int) -> dict[str, Any]:
    if what not in loops:
        loops[what] = Loop(work, WATCHES[what])
    return vars(loops[what].go(steps))


def _values(work: Workload, _: int) -> dict[str, Any]:
    """What the full configuration says of the first batch, with what it cost."""
    model = copy.deepcopy(work.model)
    step = Cockpit("full", 1)(model, work.optimizer(model))
    began = time.process_time()
    found = step(*work.batches[0])
    cpu = time.process_time() - began
    return {"cpu_s": cpu, "values": {k: v for k, v in found.items() if isinstance(v, float | int | list)}}


def _said(error: BaseException) -> str:
    """An error and the one that it hides."""
    found: list[str] = []
    at: BaseException | None = error
    while at is not None:
        found.append(f"{type(at).__name__}: {' '.join(str(at).split())[:160]}")
        at = at.__context__
    return " after ".join(dict.fromkeys(found))


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, str] = {"torch": str(torch.__version__)}
    for name in ("cockpit-for-pytorch", "backpack-for-pytorch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Cockpit's process of bench/monitor.py.")
    parser.add_argument("case", choices=list(_MAKERS))
    parser.add_argument("--shrink", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    serve(arguments.case, arguments.shrink)


if __name__ == "__main__":
    main()
