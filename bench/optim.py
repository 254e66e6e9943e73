"""Seconds of an optimizer's step, as multiples of torch's fused AdamW: `python bench/optim.py`.

About 10 million float32 parameters of transformer shapes in 37 tensors (an embedding 1024 x 512 and three blocks of width
512), one thread, CPU time of the process. Rounds alternate: one step of `torch.optim.AdamW(fused=True)`, one of what is
timed; the ratio is that of the two minima, and of the two medians, so that a machine that slows down slows both. Gradients
are fixed and normal. A curvature rule is handed its sample outside the time measured, as its estimate is not the step.

The peers come from the `bench` extra; those that are not installed are left out, by name. `--only` takes names or parts of
them. A goal is met if the ratio of the minima is at most it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import torch
from torch import Tensor

import towtank.optim
from towtank.optim import OPTIMIZERS, rule_of

WIDTH, VOCABULARY, BLOCKS = 512, 1024, 3
# of issue 4: ratio to fused AdamW of the default path
GOALS = {
    "Lion": 0.85, "SGDSaI": 0.85, "SCALE": 0.9, "Nero": 0.9, "SophiaG": 1.0, "SophiaH": 1.0, "AdaBelief": 1.15,
    "EXAdam": 1.15, "AdamW": 1.15, "AdaHessian": 1.3, "DiffGrad": 1.5, "AdamP": 2.0, "SGDP": 2.0,
}  # fmt: skip
OPTIONS = {"SGD": {"momentum": 0.9}, "SGDP": {"momentum": 0.9}}  # as they are used
SLOW = ("MFAC", "Muon", "GaLore", "Fira")  # matrix products or decompositions in every step: fewer rounds
FOREACH = "torch AdamW foreach"
# (name, module, class, options)
PEERS = [
    (FOREACH, "torch.optim", "AdamW", {"foreach": True}),
    ("torch AdamW for-loop", "torch.optim", "AdamW", {"foreach": False}),
    ("torch SGD momentum fused", "torch.optim", "SGD", {"momentum": 0.9, "fused": True, "lr": 1e-3}),
    ("torch SGD momentum foreach", "torch.optim", "SGD", {"momentum": 0.9, "foreach": True, "lr": 1e-3}),
    ("lion-pytorch Lion", "lion_pytorch", "Lion", {}),
    ("adabelief-pytorch AdaBelief", "adabelief_pytorch", "AdaBelief", {"print_change_log": False, "rectify": False}),
    ("adamp AdamP", "adamp", "AdamP", {}),
    ("adamp SGDP", "adamp", "SGDP", {"lr": 1e-3, "momentum": 0.9}),
    ("sgd-sai SGD_sai", "sgd_sai", "SGD_sai", {"lr": 1e-3}),
    ("sophia-opt SophiaG", "sophia_opt", "SophiaG", {}),
]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of a step, and ratios to the reference of the same rounds."""

    name: str
    engine: str
    minimum_ms: float
    median_ms: float
    ratio: float  # of the minima
    median_ratio: float
    goal: float | None = None

    @property
    def outcome(self) -> str:
        """Whether the goal was met."""
        if self.goal is None:
            return ""
        return "met" if self.ratio <= self.goal else f"missed by {self.ratio / self.goal - 1:.0%}"


def parameters() -> list[tuple[str, Tensor]]:
    """Named parameters with gradients."""
    shapes: list[tuple[str, tuple[int, ...]]] = [("embedding", (VOCABULARY, WIDTH))]
    for i in range(BLOCKS):
        shapes += [(f"{i}.norm1.weight", (WIDTH,)), (f"{i}.norm1.bias", (WIDTH,))]
        shapes += [(f"{i}.qkv.weight", (3 * WIDTH, WIDTH)), (f"{i}.qkv.bias", (3 * WIDTH,))]
        shapes += [(f"{i}.out.weight", (WIDTH, WIDTH)), (f"{i}.out.bias", (WIDTH,))]
        shapes += [(f"{i}.norm2.weight", (WIDTH,)), (f"{i}.norm2.bias", (WIDTH,))]
        shapes += [(f"{i}.up.weight", (4 * WIDTH, WIDTH)), (f"{i}.up.bias", (4 * WIDTH,))]
        shapes += [(f"{i}.down.weight", (WIDTH, 4 * WIDTH)), (f"{i}.down.bias", (WIDTH,))]
    generator = torch.Generator().manual_seed(0)
    made = []
    for name, shape in shapes:
        p = torch.randn(shape, generator=generator).mul_(0.02).requires_grad_()
        p.grad = torch.randn(shape, generator=generator).mul_(1e-3)
        made.append((name, p))
    return made


def groups(named: list[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Groups with roles, as rules that tell embeddings from matrices need them."""
    first, *rest = named
    return [{"params": [first], "role": "embedding"}, {"params": rest}]


def ours(name: str, engine: str) -> Callable[[], object]:
    """One step of an optimizer of towtank, its curvature seen."""
    named = parameters()
    optimizer = getattr(towtank.optim, name)(groups(named), engine=engine, **OPTIONS.get(name, {}))
    if rule_of(name).curvature:
        optimizer.observe_curvature([p.grad.square() for _, p in named])  # type: ignore[union-attr]
    return optimizer.step


def reference() -> Callable[[], object]:
    """One step of torch's fused AdamW on parameters of its own."""
    return torch.optim.AdamW([p for _, p in parameters()], fused=True).step


def timed(name: str, engine: str, step: Callable[[], object], rounds: int, goal: float | None = None) -> Timing:
    """Alternate steps with the reference's."""
    fused = reference()
    for _ in range(2):  # state is made, kernels are built and loaded
        fused()
        step()
    theirs, own = [], []
    for _ in range(rounds):
        theirs.append(_seconds(fused))
        own.append(_seconds(step))
    middle = statistics.median
    return Timing(
        name=name, engine=engine, minimum_ms=1e3 * min(own), median_ms=1e3 * middle(own), ratio=min(own) / min(theirs),
        median_ratio=middle(own) / middle(theirs), goal=goal,
    )  # fmt: skip


def _seconds(step: Callable[[], object]) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def peers(wanted: Callable[[str], bool], rounds: int) -> Iterator[Timing]:
    """The peers that are installed."""
    for name, module, attribute, options in PEERS:
        if not wanted(name):
            continue
        try:
            make = getattr(importlib.import_module(module), attribute)
        except ImportError:
            print(f"{name}: {module} is not installed", file=sys.stderr)
            continue
        with contextlib.redirect_stdout(io.StringIO()):  # some print advertisements, some their progress
            row = timed(name, "peer", make([p for _, p in parameters()], **options).step, rounds)
        yield row


def timings(wanted: Callable[[str], bool], engines: list[str], rounds: int) -> Iterator[Timing]:
    """Our optimizers by every engine, then the peers."""
    for name in OPTIMIZERS:
        if wanted(name):
            for engine in engines:
                few = 3 if name in SLOW else rounds
                yield timed(name, engine, ours(name, engine), few, GOALS.get(name) if engine == "auto" else None)
    yield from peers(wanted, rounds)


def show(rows: list[Timing]) -> None:
    """The table in Markdown, then what became of the goals."""
    count = sum(p.numel() for _, p in parameters())
    where = f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}"
    print(f"\n{date.today()}, {where}; {count:,} parameters in {len(parameters())} tensors\n")
    print("| optimizer | engine | min ms | median ms | / fused AdamW (min) | (median) | goal | |")
    print("|---|---|---:|---:|---:|---:|---:|---|")
    for r in rows:
        numbers = f"{r.minimum_ms:.1f} | {r.median_ms:.1f} | {r.ratio:.2f} | {r.median_ratio:.2f}"
        print(f"| {r.name} | {r.engine} | {numbers} | {'' if r.goal is None else r.goal} | {r.outcome} |")
    judged = [r for r in rows if r.goal is not None]
    if judged:
        print(f"\n{sum(r.outcome == 'met' for r in judged)} of {len(judged)} goals of the default path are met.")
    foreach = next((r for r in rows if r.name == FOREACH), None)
    elementwise = [r for r in rows if r.engine == "eager" and rule_of(r.name).reach == "element"]
    if foreach and elementwise:
        slower = [f"{r.name} ({r.ratio / foreach.ratio:.2f})" for r in elementwise if r.ratio > foreach.ratio]
        print(
            f"Pure PyTorch, elementwise rules slower than torch's foreach AdamW ({foreach.ratio:.2f} fused): "
            f"{', '.join(slower) or 'none, so the goal is met'}."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], help="names, or parts of names, of optimizers and peers")
    parser.add_argument(
        "--engines", nargs="+", default=["auto", "eager"], choices=["auto", "native", "eager", "compile"]
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def wanted(name: str) -> bool:
        return not arguments.only or any(part.casefold() in name.casefold() for part in arguments.only)

    rows = []
    for row in timings(wanted, arguments.engines, arguments.rounds):
        rows.append(row)
        print(f"{row.name} {row.engine}: {row.ratio:.2f} {row.outcome}", file=sys.stderr, flush=True)
    show(rows)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([asdict(r) | {"outcome": r.outcome} for r in rows], file, indent=1)


if __name__ == "__main__":
    main()
