"""What watching a training loop costs: `python bench/monitor.py [--quick] [--peer-python PATH] [--json FILE]`.

Loops of the same network, optimizer and batches (`monitor_cases.py`), one watched by nobody, the others by a `Monitor` of some
settings, take turns of ten steps in an order that rotates, on one thread: what slows the machine down slows all of them. A
second loop that nobody watches shows what differences are noise. Times are CPU times of the process; wall times stand beside
them. A share is (sum of the watched loop) / (sum of the bare one) - 1, with the standard error of a ratio of sums over rounds.
A monitor's own clock is told of the turns of others, which it must not count as its loop's.

Memory is the peak of a fresh process over what it held before the loop. Dear probes tell their cost before anything has run;
it stands against their CPU time over that of a gradient of the same batch.

Cockpit is measured in an interpreter of its own that takes its turns in the same run. To make it, beside a CPU build of torch:
    python3 -m venv cockpit && cockpit/bin/pip install torch==2.13.0 'setuptools<82' scipy json-tricks matplotlib pandas seaborn einops
    cockpit/bin/pip install --no-deps cockpit-for-pytorch==1.0.2 backpack-for-pytorch==1.7.1 unfoldNd
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from monitor_cases import Loop, Peer, Spent, StepOf, Workload, gradient_step, mean_loss, workload
from monitor_tables import Rows, Share, remarks, share, tables
from monitor_values import value_rows
from torch import Tensor, nn

from towtank.problem import Problem
from towtank.signals import Monitor, default_probes, every
from towtank.signals.cadence import Scheduled, attribute, name_of

TURN = 10  # steps: the default cadence of cheap probes
FIRST = 100  # steps in which dear probes run for the first time, and cheap ones may be made rarer
BARE, AGAIN, CHEAP, DEFAULT, OUT, UNIT = (
    "nobody",
    "nobody, again",
    "every-step set",
    "default",
    "default, out=",
    "gradient",
)
HELD = "default without dear, every 10"  # whatever it costs
OPTIONS: dict[str, dict[str, Any] | None] = {BARE: None, AGAIN: None, CHEAP: {"probes": []}, HELD: {}, DEFAULT: {}}
BUDGETS: dict[str, dict[str, Any] | None] = {"budget 0.02": {"budget": 0.02}, "budget 0.2": {"budget": 0.2}}
FOLDER: dict[str, dict[str, Any] | None] = {OUT: {"out": True}}
LANES = {"gpt": OPTIONS | FOLDER, "cnn": OPTIONS | FOLDER, "mlp": OPTIONS | BUDGETS}
GOALS = {CHEAP: 0.03, HELD: 0.05, DEFAULT: 0.05, OUT: 0.05}
MEMORY_GOAL = 0.10
MEMORY = (BARE, CHEAP, HELD, DEFAULT)
PEER_LANES = {"bare": TURN, "economy, every 10 steps": TURN, "economy, every step": 1}  # steps of a turn


class Metered:
    """A probe that keeps the CPU seconds of the calls that gave readings.

    Args:
        probe: any, without a schedule.
    """

    def __init__(self, probe: Any) -> None:
        self.probe, self.cpu_s = probe, []
        self.name = name_of(probe)

    def __call__(self, step: Any) -> Any:
        """Call it."""
        began = time.process_time()
        found = self.probe(step)
        self.cpu_s.append(time.process_time() - began)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["probe"], name)


def metered(probes: Sequence[Any]) -> list[Any]:
    """Probes, each in a meter, schedules around them."""
    return [replace(p, probe=Metered(p.probe)) if isinstance(p, Scheduled) else Metered(p) for p in probes]


class Lane:
    """A loop, its monitor if it has one, and the time it took round by round.

    Args:
        name: in the table.
        work: what is trained.
        options: of the monitor; None for nobody.
    """

    def __init__(self, name: str, work: Workload, options: dict[str, Any] | None) -> None:
        self.name, self.monitor = name, None
        self.rounds: list[Spent] = []
        self._options = options
        self._left = time.perf_counter()
        self.loop = Loop(work, gradient_step if name == UNIT else None if options is None else self._watched)
        self.steps = 2 if name == UNIT else TURN

    def _watched(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> StepOf:
        options = dict(self._options or {})
        if options.get("out"):
            self._folder = tempfile.TemporaryDirectory(prefix="monitor-")
            options["out"] = self._folder.name
        if self.name == DEFAULT:
            options["probes"] = metered(default_probes(optimizer))
        if self.name == HELD:
            cheap = [p for p in default_probes(optimizer) if attribute(p, "cost") is None]
            options["probes"] = [p if isinstance(p, Scheduled) else every(TURN, p) for p in cheap]
        self.monitor = monitor = Monitor(model, optimizer, loss=mean_loss, **options)

        def step(inputs: Tensor, targets: Tensor) -> None:
            loss = mean_loss(model(inputs), targets)
            loss.backward()
            optimizer.step()
            monitor.step(loss, (inputs, targets))
            optimizer.zero_grad()

        return step

    def turn(self) -> None:
        """Some steps, while all other loops stand still."""
        if self.monitor is not None:
            self.monitor.clock._left += time.perf_counter() - self._left  # the time of others is not this loop's
        self.rounds.append(self.loop.go(self.steps))
        self._left = time.perf_counter()

    def seconds(self, kind: str, first: int = 0, last: int | None = None) -> list[float]:
        """Seconds a step, of rounds."""
        return [getattr(r, kind) / self.steps for r in self.rounds[first:last]]


class Run:
    """One case: its lanes, the peer, and the rows that come of them.

    Args:
        case: name of the workload.
        rounds: turns of every lane.
        shrink: divides the batch.
        peer_python: Cockpit's interpreter, or None.
        peer_rounds: turns of its loops, spread over the run.
    """

    def __init__(self, case: str, rounds: int, shrink: int, peer_python: str | None, peer_rounds: int) -> None:
        self.case, self.work = case, workload(case, shrink=shrink)
        self.told = self._told()
        Lane(DEFAULT, workload(case, batches=2, shrink=5), {}).loop.go(2)  # what is imported late is there
        lanes = {**LANES[case], UNIT: None}
        self.lanes = {name: Lane(name, self.work, options) for name, options in lanes.items()}
        self.peer = Peer(peer_python, case, shrink) if peer_python else None
        self.peer_versions: dict[str, str] = self.peer.versions if self.peer else {}
        self.peer_rounds: dict[str, Rows] = {name: [] for name in PEER_LANES}
        self._go(rounds, peer_rounds)

    def _told(self) -> dict[str, float]:
        """What dear probes say of their cost before anything has run, in gradients."""
        model = copy.deepcopy(self.work.model)
        optimizer = self.work.optimizer(model)
        problem = Problem(model, mean_loss, self.work.batches[0], checks=False)
        costs = {name_of(p): attribute(p, "cost") for p in default_probes(optimizer)}
        return {name: float(cost(problem) or math.nan) for name, cost in costs.items() if cost is not None}

    def _go(self, rounds: int, peer_rounds: int) -> None:
        order = list(self.lanes.values())
        asked = {round(i * rounds / peer_rounds) for i in range(peer_rounds)} if peer_rounds else set()
        for i in range(rounds):
            for lane in order[i % len(order) :] + order[: i % len(order)]:
                lane.turn()
            if self.peer is not None and i in asked:
                for name, steps in PEER_LANES.items():
                    said = self.peer_rounds[name]
                    if not (said and "error" in said[-1]):
                        said.append(self.peer.ask(name, steps))
            print(f"{self.case}: round {i + 1} of {rounds}", file=sys.stderr, flush=True)

    def share(self, name: str, kind: str, first: int = 0, last: int | None = None) -> Share:
        """See `share`."""
        return share(self.lanes[name].seconds(kind, first, last), self.lanes[BARE].seconds(kind, first, last))

    @property
    def settled(self) -> int:
        """Rounds before which dear probes have run for the first time."""
        return min(FIRST // TURN, len(self.lanes[BARE].rounds) // 2)

    @property
    def gradient_s(self) -> float:
        """CPU seconds of a gradient."""
        return statistics.median(self.lanes[UNIT].seconds("cpu_s"))

    def differing(self) -> list[str]:
        """Loops that did not end with the bare loop's parameters, bit for bit."""
        bare = list(self.lanes[BARE].loop.model.state_dict().values())
        found = []
        for name, lane in self.lanes.items():
            own = lane.loop.model.state_dict().values()
            if name != UNIT and not all(torch.equal(a, b) for a, b in zip(own, bare, strict=True)):
                found.append(name)
        return found

    def close(self) -> None:
        """End what runs."""
        for lane in self.lanes.values():
            if lane.monitor is not None:
                lane.monitor.close()
        if self.peer is not None:
            self.peer.close()


def time_rows(run: Run) -> Rows:
    """Time of each loop against the bare one's."""
    rows, settled = [], run.settled
    for name, lane in run.lanes.items():
        if name == UNIT:
            continue
        step_ms = 1e3 * statistics.fmean(lane.seconds("cpu_s"))
        row: dict[str, Any] = {"case": run.case, "loop": name, "steps": len(lane.rounds) * TURN, "step_ms": step_ms}
        if name != BARE:
            row |= {
                "first": asdict(run.share(name, "cpu_s", 0, settled)),
                "all": asdict(run.share(name, "cpu_s")),
                "settled": asdict(run.share(name, "cpu_s", settled)),
                "wall": asdict(run.share(name, "wall_s", settled)),
            }
        if lane.monitor is not None:
            dear = [s for s in lane.monitor.slots if s.dear]
            row |= {
                "goal": GOALS.get(name),
                "clock": lane.monitor.clock.overhead,
                "wall_all": run.share(name, "wall_s").mean,
                "budget": lane.monitor.budget,
                "dear_runs": {s.name: s.runs for s in dear},
                "alarms": [str(a) for a in lane.monitor.alarms],
                "notes": [f"step {n}, {probe}: {text}" for n, probe, text in lane.monitor.notes],
            }
        rows.append(row)
    return rows


def probe_rows(run: Run) -> Rows:
    """What each probe took in the loop of default probes, and what hooks and all else took."""
    lane, bare, rows, spent = run.lanes[DEFAULT], run.lanes[BARE], [], 0.0
    bare_s = sum(bare.seconds("cpu_s")) * TURN
    for slot in lane.monitor.slots if lane.monitor else ():
        meter = slot.probe.probe if isinstance(slot.probe, Scheduled) else slot.probe
        assert isinstance(meter, Metered)
        spent += sum(meter.cpu_s)
        rows.append(
            {
                "case": run.case, "probe": slot.name, "cadence": slot.said, "runs": len(meter.cpu_s),
                "run_ms": 1e3 * statistics.median(meter.cpu_s) if meter.cpu_s else math.nan,
                "run_gradients": statistics.fmean(meter.cpu_s) / run.gradient_s if meter.cpu_s else math.nan,
                "told": run.told.get(slot.name), "share": sum(meter.cpu_s) / bare_s,
            }
        )  # fmt: skip
    rest = sum(lane.seconds("cpu_s")) * TURN - bare_s - spent
    return [*rows, {"case": run.case, "probe": "hooks, rules and all else", "share": rest / bare_s}]


def peer_rows(run: Run) -> Rows:
    """Cockpit's loops against the bare loop of its own process."""
    bare = [said["cpu_s"] / PEER_LANES["bare"] for said in run.peer_rounds["bare"] if "cpu_s" in said]
    rows = []
    for name, steps in PEER_LANES.items():
        said = run.peer_rounds[name]
        row: dict[str, Any] = {"case": run.case, "loop": f"Cockpit, {name}"}
        if run.peer is None:
            row["note"] = "not installed"
        elif said and "error" in said[-1]:
            row["note"] = said[-1]["error"]
        else:
            own = [x["cpu_s"] / steps for x in said]
            row |= {"step_ms": 1e3 * statistics.fmean(own), "turns": len(own)}
            if name != "bare":
                row["all"] = asdict(share(own, bare[: len(own)]))
        rows.append(row)
    return rows


# Memory


def peak(case: str, name: str, steps: int, shrink: int) -> float:
    """Bytes that a loop of a fresh process needed at its peak, above what the process held before it."""
    freeing = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors leave the process
    command = [sys.executable, os.path.abspath(__file__), "--peak", case, name, str(steps), str(shrink)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **freeing})
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return float(done.stdout.split()[-1])


def print_peak(case: str, name: str, steps: int, shrink: int) -> None:
    """The child's part of `peak`."""
    work = workload(case, batches=4, shrink=shrink)
    default_probes(work.optimizer(work.model))  # modules are there
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    Lane(name, work, OPTIONS[name]).loop.go(steps)
    print(_status("VmHWM") - before)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def memory_rows(case: str, names: Sequence[str], steps: int, shrink: int) -> Rows:
    """Peaks of the loops of a case."""
    rows, bare = [], math.nan
    for name in names:
        try:
            found = peak(case, name, steps, shrink)
        except RuntimeError as error:
            rows.append({"case": case, "loop": name, "note": str(error)[:200]})
            continue
        bare = found if name == BARE else bare
        goal = None if name == BARE else MEMORY_GOAL
        rows.append({"case": case, "loop": name, "mib": found / 2**20, "over": found / bare - 1, "goal": goal})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(LANES), choices=list(LANES))
    parser.add_argument("--rounds", type=int, default=30, help="of ten steps each; five times as many of the mlp")
    parser.add_argument("--peer-python", help="interpreter of an environment with Cockpit")
    parser.add_argument("--peer-rounds", type=int, default=4)
    parser.add_argument("--skip", nargs="+", default=[], choices=["memory", "values"])
    parser.add_argument("--quick", action="store_true", help="small batches and few rounds: whether it runs at all")
    parser.add_argument("--json", help="also write all figures to this file")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("towtank").setLevel(logging.ERROR)  # alarms are listed below the tables
    if arguments.peak:
        case, name, steps, shrink = arguments.peak
        return print_peak(case, name, int(steps), int(shrink))
    began, quick = time.perf_counter(), arguments.quick
    found: dict[str, Rows] = {k: [] for k in ("times", "peer", "probes", "memory", "values", "same")}
    versions: dict[str, str] = {}
    first = FIRST
    shrink, peer_rounds = (5, 1) if quick else (1, arguments.peer_rounds)
    for case in arguments.cases:
        rounds = (2 if quick else arguments.rounds) * (5 if case == "mlp" and not quick else 1)
        run = Run(case, rounds, shrink, arguments.peer_python, peer_rounds)
        versions |= run.peer_versions
        found["times"] += time_rows(run)
        found["peer"] += peer_rows(run)
        found["probes"] += probe_rows(run)
        first = run.settled * TURN
        found["same"].append({"case": case, "differing": ", ".join(run.differing()) or "none"})
        if case == "mlp" and "values" not in arguments.skip:
            found["values"] = value_rows(run.work, run.peer)
        run.close()
        if "memory" not in arguments.skip and not (quick and case != "mlp"):
            found["memory"] += memory_rows(case, (BARE, DEFAULT) if quick else MEMORY, 12, shrink)
    peers = "".join(f", {k} {v}" for k, v in versions.items() if k != "torch") or ", Cockpit not installed"
    where = f"{platform.machine()}, {os.cpu_count()} processors, 1 thread"
    print(f"{date.today()}, {where}, torch {torch.__version__}{peers}; {time.perf_counter() - began:.0f} s\n")
    print(tables(found, first))
    print(f"\n{remarks(found)}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
