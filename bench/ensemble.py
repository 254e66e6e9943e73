"""Ensembles against the same runs one after another, and against one process per run: `python bench/ensemble.py`.

Every figure comes from this one run, on one thread. The peer is what a user would write: `nn.Module`, fused
`torch.optim.AdamW` (independent decay as lambda / lr), `clip_grad_norm_`, a cosine schedule. Rounds of peer and ensemble
alternate, and the median ratio of the rounds is reported, so that a machine that slows down slows both.

The last column of the table is the error of the peer's final training loss against the ensemble's: speed means nothing if
the numbers differ.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date

from towtank.train.planner import largest_ensemble

RATES = [2.0**k for k in range(-10, -2)]
SETTINGS = {"z_loss": 1e-4, "weight_decay": 1e-4, "depth": 2, "qk_norm": True, "context": 64, "batch": 8}
STUDY_STEPS = 200


def cell(width: int, lr: float, steps: int, compile: str = "never") -> dict:
    return {"width": width, "lr": lr, "seed": 0, "steps": steps, "compile": compile, "signal_every": 10**6, **SETTINGS}


class Loop:
    """One run as a user would write it; `advance` makes some steps."""

    def __init__(self, width: int, lr: float, steps: int, device: str) -> None:
        import torch

        from towtank.train.cells import build_task

        self.torch, self.steps, self.lr, self.device, self.done = torch, steps, lr, device, 0
        self.task = build_task(cell(width, lr, steps))
        self.model = self.task.model.to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4 / lr, fused=True
        )
        self.loss = torch.tensor(math.nan)

    def advance(self, count: int) -> None:
        """Make `count` steps."""
        torch = self.torch
        warm = round(0.1 * self.steps)
        for step in range(self.done, self.done + count):
            share = (
                (step + 1) / warm
                if step < warm
                else 0.5 * (1 + math.cos(math.pi * (step - warm) / (self.steps - warm)))
            )
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * share
            inputs, targets = (x.to(self.device) for x in self.task.data.batch(0, step))
            logits = self.model(inputs)
            self.loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            total = self.loss + 1e-4 * logits.logsumexp(-1).square().mean()
            self.optimizer.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
        self.done += count


class Together:
    """The same runs in ensembles of at most `most` members."""

    def __init__(self, width: int, steps: int, device: str, compile: str, most: int = len(RATES)) -> None:
        from towtank.train.cells import build_ensemble

        self.steps, self.done = steps, 0
        cells = [cell(width, lr, steps, compile) for lr in RATES]
        parts = [cells[i : i + most] for i in range(0, len(cells), most)]
        self.ensembles = [build_ensemble(part, device)[0] for part in parts]

    def advance(self, count: int) -> None:
        """Make `count` steps."""
        from towtank.optim.schedules import shape
        from towtank.train.loop import _batch

        self.loss = []
        for ensemble in self.ensembles:
            for step in range(self.done, self.done + count):
                out = ensemble.step(_batch(ensemble, step), shape(step, self.steps))
            self.loss += out.loss.tolist()
        self.done += count


def seconds(work, device: str) -> float:
    """CPU seconds of a call (wall seconds on an accelerator, where the host mostly waits)."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    work()
    return time.process_time() - began


def compare(width: int, device: str, rounds: int, steps: int) -> dict:
    """Median over rounds of CPU milliseconds per member-step of the loop and the ensemble, and of their ratio."""
    total = (rounds + 1) * steps
    loops = [Loop(width, lr, total, device) for lr in RATES]
    together = Together(width, total, device, "never")
    parameters = sum(p.numel() for p in loops[0].model.parameters())
    planned = Together(width, total, device, "never", largest_ensemble(device, parameters))
    loop_s, eager_s, planned_s = [], [], []
    for index in range(rounds + 1):  # the first round warms up
        loop = seconds(lambda: [run.advance(steps) for run in loops], device)
        eager = seconds(lambda: together.advance(steps), device)
        if index:
            loop_s.append(loop)
            eager_s.append(eager)
            planned_s.append(seconds(lambda: planned.advance(steps), device))
    share = 1e3 / (steps * len(RATES))
    error = max(abs(run.loss.item() - loss) for run, loss in zip(loops, together.loss, strict=True))
    return {
        "width": width,
        "parameters": parameters,
        "loop_ms": statistics.median(loop_s) * share,
        "eager_ms": statistics.median(eager_s) * share,
        "eager_ratio": statistics.median(a / b for a, b in zip(loop_s, eager_s, strict=True)),
        "planned_ratio": statistics.median(a / b for a, b in zip(loop_s, planned_s, strict=True)),
        "loss_difference": error,
    }


def compiled(width: int, device: str, rounds: int, steps: int) -> dict:
    """The compiled ensemble: seconds of its first step (compile time) and milliseconds per member-step after it."""
    together = Together(width, (rounds + 1) * steps + 1, device, "always")
    began = time.perf_counter()
    together.advance(1)
    compile_s = time.perf_counter() - began
    taken = [seconds(lambda: together.advance(steps), device) for _ in range(rounds + 1)][1:]
    return {"compiled_ms": statistics.median(taken) * 1e3 / (steps * len(RATES)), "compile_s": compile_s}


def one_process(width: int, device: str) -> float:
    """CPU seconds of one whole run (200 steps and the final held-out loss) in a fresh Python process."""
    code = (
        "import sys, torch; sys.path[:0] = ['.', 'bench']; torch.set_num_threads(1); import ensemble as b;"
        f"run = b.Loop({width}, 2**-7, {STUDY_STEPS}, {device!r}); run.advance({STUDY_STEPS});"
        "torch.set_grad_enabled(False);"
        "print(sum(run.task.loss(run.model(x), y).item() for x, y in run.task.data.heldout()))"
    )
    before = os.times()
    subprocess.run(
        [sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def whole_ensemble(width: int, device: str) -> float:
    """CPU seconds of a member's whole run inside an ensemble: 200 steps, signals, held-out loss before and after."""
    from towtank.train.cells import train_cells

    cells = [{**cell(width, lr, STUDY_STEPS, "auto"), "signal_every": 20} for lr in RATES]
    return seconds(lambda: train_cells(cells, device=device), device) / len(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    from towtank.study.executors import keep_freed_memory

    keep_freed_memory()  # both sides run under the allocator settings of the workers
    rows = []
    for width in arguments.widths:
        row = compare(width, arguments.device, arguments.rounds, max(2, 320 // width))
        if not arguments.no_compile:
            row |= compiled(width, arguments.device, arguments.rounds, max(2, 320 // width))
        if width <= 128:  # the sizes of the study; a whole run of a larger one takes long
            row |= {
                "process_s": one_process(width, arguments.device),
                "member_s": whole_ensemble(width, arguments.device),
            }
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    where = (
        torch.cuda.get_device_name()
        if arguments.device != "cpu"
        else f"{platform.processor() or platform.machine()}, 1 thread"
    )
    print(f"\n{date.today()}, {where}, torch {torch.__version__}, {len(RATES)} members\n")
    head = ["width", "parameters", "loop ms", "eager ms", "eager x", "planned x", "compiled ms", "compiled x", "compile s",
            "own process s", "in ensemble s", "process x", "loss difference"]  # fmt: skip
    print("| " + " | ".join(head) + " |\n|" + "---:|" * len(head))
    for r in rows:
        faster = r["loop_ms"] / r["compiled_ms"] if "compiled_ms" in r else math.nan
        values = [f"{r['width']}", f"{r['parameters']:,}", f"{r['loop_ms']:.1f}", f"{r['eager_ms']:.1f}", f"{r['eager_ratio']:.2f}", f"{r['planned_ratio']:.2f}",
                  f"{r.get('compiled_ms', math.nan):.1f}", f"{faster:.2f}", f"{r.get('compile_s', math.nan):.0f}",
                  f"{r.get('process_s', math.nan):.1f}", f"{r.get('member_s', math.nan):.1f}",
                  f"{r.get('process_s', math.nan) / r.get('member_s', math.nan):.2f}",
                  f"{r['loss_difference']:.1e}"]  # fmt: skip
        print("| " + " | ".join(values) + " |")
    study = [r for r in rows if r["width"] in (32, 64, 128)]
    ratio = sum(r["process_s"] for r in study) / max(1e-9, sum(r["member_s"] for r in study))
    print(
        f"\nThe grid of lr-transfer (equal numbers of runs at 32, 64, 128), one process per run: {ratio:.2f} times the ensembles."
    )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
