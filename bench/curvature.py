"""Curvature against its peers: `python bench/curvature.py [--only SUBSTRING ...] [--json FILE]`.

Every cost is in units of one gradient (forward and backward) of the same batch, timed in turns with it in the same process:
CPU time of the process on one thread, or wall time on an accelerator. A product is timed in its steady state on one fixed
batch, the others from nothing: building the operator counts. Beside every cost stands the error against a float64 reference
that shares no code with any system (`curvature_cases.py`), and the error that the system itself states. Traces of peers are projected
to the requested error from 40 samples (`curvature_systems.py`). Peak memory is what a
fresh process needed above what it held before the call.

The peers are the `bench` extra. Beside a CPU build of torch, whose torchvision would not load:
    pip install --no-deps curvlinops-for-pytorch==3.0.1 pyhessian==0.1 hessian-eigenthings==1.0.0a5
    pip install --no-deps backpack-for-pytorch unfoldNd einconv einops linear_operator jaxtyping wadler-lindig opt-einsum tqdm
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from datetime import date
from functools import cache
from importlib.metadata import version
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from curvature_cases import Reference, build
from curvature_systems import Curvlinops, Eigenthings, PyHessian, System, Towtank

RTOL = 0.02
STEPS = 80
LIMIT_S = 60  # of CPU time, for one row
PRODUCTS, ALGORITHMS = ("mlp", "gpt", "cnn"), ("mlp", "gpt")


@dataclass(frozen=True)
class Entry:
    """A row of the table before it is measured: what, by whom, with which settings; or why it cannot be."""

    quantity: str
    who: str
    system: type[System] | None
    settings: dict[str, Any]
    cases: tuple[str, ...] = PRODUCTS


@dataclass(frozen=True)
class Row:
    """A row of the table; costs in gradients, errors relative."""

    case: str
    quantity: str
    who: str
    cost: float = math.nan
    cost_least: float = math.nan
    error: float = math.nan
    stated: float = math.nan
    products: float = math.nan
    note: str = ""


def entries() -> list[Entry]:
    """Every row, in the order of the table."""
    own, curv, pyh, eig = Towtank, Curvlinops, PyHessian, Eigenthings
    fresh = {"retain": False}
    return [
        Entry("Hessian product", "towtank", own, {}),
        Entry("Hessian product", "towtank, fresh graphs", own, fresh),
        Entry("Hessian product", "curvlinops", curv, {}),
        Entry("Hessian product", "PyHessian", pyh, {}),
        Entry("Hessian product", "hessian-eigenthings", eig, {}),
        Entry("Gauss-Newton product", "towtank", own, {}),
        Entry("Gauss-Newton product", "curvlinops", curv, {}),
        Entry("Gauss-Newton product", "PyHessian", None, {}),
        Entry("Gauss-Newton product", "hessian-eigenthings", eig, {}),
        Entry("largest eigenvalue", "towtank", own, {}),
        Entry("largest eigenvalue", "curvlinops + eigsh", curv, {}),
        Entry("largest eigenvalue", "curvlinops + eigsh, ncv=6", curv, {"basis": 6}),
        Entry("largest eigenvalue", "PyHessian", pyh, {}),
        Entry("largest eigenvalue", "hessian-eigenthings, its 2 steps", eig, {}),
        Entry("largest eigenvalue", "hessian-eigenthings, 20 steps", eig, {"steps": 20}),
        *(Entry("trace of G", s.__name__, s, {"which": "G"}, ALGORITHMS) for s in (own, curv)),
        Entry("trace of G", "PyHessian", None, {}, ALGORITHMS),
        Entry("trace of G", "Eigenthings", eig, {"which": "G"}, ALGORITHMS),
        *(Entry("trace of H", s.__name__, s, {"which": "H"}, ALGORITHMS) for s in (own, curv, pyh, eig)),
        *(Entry("density", s.__name__, s, {}, ALGORITHMS) for s in (own, curv, pyh, eig)),
        Entry("memory", "gradient", System, {}),
        Entry("memory", "towtank, retained", own, {"retain": True}),
        Entry("memory", "towtank, fresh graphs", own, fresh),
        *(Entry("memory", s.__name__, s, {}) for s in (curv, pyh, eig)),
    ]


class Bench:
    """One case, its unit of cost and its references, computed when first asked for."""

    def __init__(self, name: str, device: str, rounds: int) -> None:
        self.case, self.device, self.rounds = build(name).to(device), device, rounds
        self.v = torch.randn(self.case.size, generator=torch.Generator().manual_seed(3)).to(device)
        self.reference = Reference(self.case)
        for _ in range(3):
            self.case.gradient()
        self.largest = cache(self.reference.largest)
        self.traces = cache(lambda: self.reference.traces(100, 20))

    def measure(self, entry: Entry) -> Row:
        """Measure one entry; whatever a system raises becomes the note of its row."""
        if entry.system is None:
            return Row(self.case.name, entry.quantity, entry.who, note="does not have it")
        method = {
            "Hessian product": self._product,
            "Gauss-Newton product": self._product,
            "largest eigenvalue": self._largest,
            "trace of G": self._trace,
            "trace of H": self._trace,
            "density": self._density,
            "memory": self._memory,
        }[entry.quantity]
        try:
            with limited(LIMIT_S):
                found = method(entry)
        except Exception as error:  # noqa: BLE001 (any failure of a peer is a row)
            found = {"note": f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"}
        finally:
            self.case.model.zero_grad()
            self.case.model.eval()
        return Row(self.case.name, entry.quantity, entry.who, **found)

    def _product(self, entry: Entry) -> dict[str, Any]:
        name = {"Hessian product": "hessian", "Gauss-Newton product": "gauss_newton"}[entry.quantity]
        product = getattr(entry.system(self.case), name)(**entry.settings)
        got, wanted = product(self.v).double(), getattr(self.reference, name)(self.v)
        product(self.v)
        ratios = []
        for _ in range(self.rounds):
            unit = self._seconds(self.case.gradient)
            ratios.append(self._seconds(lambda: product(self.v)) / unit)
        error = float((got.detach() - wanted).norm() / wanted.norm())
        return {"cost": statistics.median(ratios), "cost_least": min(ratios), "error": error, "products": 1}

    def _largest(self, entry: Entry) -> dict[str, Any]:
        (value, stated, products), cost = self._whole(lambda: entry.system(self.case).largest(**entry.settings))
        wanted = self.largest()
        return {"error": abs(value / wanted - 1), "stated": stated / abs(value), "products": products, **cost}

    def _trace(self, entry: Entry) -> dict[str, Any]:
        work = lambda: entry.system(self.case).trace(rtol=RTOL, **entry.settings)  # noqa: E731
        found, cost = self._whole(work)
        wanted, known = self.traces()[entry.settings["which"] == "H"]
        return {
            "error": abs(found.value / wanted - 1),
            "stated": found.stderr / abs(found.value),
            "products": found.products,
            "note": f"the reference is known to {abs(known / wanted):.1%}",
            **{k: c * found.share for k, c in cost.items()},
        }

    def _density(self, entry: Entry) -> dict[str, Any]:
        (nodes, weights), cost = self._whole(lambda: entry.system(self.case).density(STEPS))
        wanted = self.largest()
        ghosts = int((abs(nodes.double() / wanted - 1) < 1e-3).sum()) - 1
        note = f"{ghosts} false copies of the largest, weights sum to {float(weights.sum()):.4f}"
        return {"error": abs(float(nodes.max()) / wanted - 1), "products": STEPS, "note": note, **cost}

    def _memory(self, entry: Entry) -> dict[str, Any]:
        if self.device != "cpu":
            return {"note": "measured on the CPU only"}
        own = fresh_process_peak(self.case.name, entry)
        unit = fresh_process_peak(self.case.name, Entry("memory", "gradient", System, {}))
        return {"cost": own / unit, "cost_least": own / unit, "note": f"{own / 2**20:.0f} MiB"}

    def _whole(self, work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        """A result, and its cost against gradients timed before and after it."""
        units = [self._seconds(self.case.gradient) for _ in range(3)]
        result: list[Any] = []
        spent = self._seconds(lambda: result.append(work()))
        units += [self._seconds(self.case.gradient) for _ in range(3)]
        return result[0], {"cost": spent / statistics.median(units), "cost_least": spent / max(units)}

    def _seconds(self, work: Callable[[], Any]) -> float:
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        self._wait()
        began = clock()
        work()
        self._wait()
        return clock() - began

    def _wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()


@contextlib.contextmanager
def limited(seconds: int) -> Generator[None, None, None]:
    """Stop Python code that spends more CPU time than this.

    Raises:
        TimeoutError: then.
    """

    def stop(*_: Any) -> None:
        raise TimeoutError(f"did not end within {seconds} s of CPU time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@cache
def _peak(case: str, who: str) -> int:
    freeing = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors leave the process
    command = [sys.executable, os.path.abspath(__file__), "--peak", case, who]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **freeing})
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return int(done.stdout.split()[-1])


def fresh_process_peak(case: str, entry: Entry) -> int:
    """Bytes above what was resident that one product (building its operator included) needed at its peak."""
    return _peak(case, entry.who)


def print_peak(name: str, who: str) -> None:
    """The child's part of `fresh_process_peak`."""
    case = build(name)
    v = torch.randn(case.size)
    entry = next(e for e in entries() if e.quantity == "memory" and e.who == who)
    case.gradient()  # thread pools and kernels are there
    product = None if who == "gradient" else entry.system(case).hessian
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts anew
    if product is None:
        case.gradient()
    else:
        product(**entry.settings)(v)
    print(_status("VmHWM") - before)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def table(rows: list[Row]) -> str:
    """Markdown, one table a quantity."""
    lines = []
    for quantity in dict.fromkeys(r.quantity for r in rows):
        lines += [f"\n### {quantity}\n", "| case | system | gradients (least) | error | stated error | products | |"]
        lines.append("|---|---|---:|---:|---:|---:|---|")
        for r in rows:
            if r.quantity == quantity:
                cost = f"{r.cost:.2f} ({r.cost_least:.2f})" if math.isfinite(r.cost) else "-"
                errors = [f"{x:.1e}" if math.isfinite(x) else "-" for x in (r.error, r.stated)]
                products = f"{r.products:.4g}" if math.isfinite(r.products) else "-"
                lines.append("| " + " | ".join([r.case, r.who, cost, *errors, products, r.note]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=[], help="rows that contain all of these: 'gpt' 'product' 'towtank'"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="of a gradient and a product in turns")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        return print_peak(*arguments.peak)
    began, rows = time.perf_counter(), []
    for name in PRODUCTS:
        asked = [
            e
            for e in entries()
            if name in e.cases and all(o.lower() in f"{name} {e.quantity} {e.who}".lower() for o in arguments.only)
        ]
        bench = Bench(name, arguments.device, arguments.rounds) if asked else None
        for entry in asked:
            rows.append(bench.measure(entry))
            print(json.dumps(asdict(rows[-1])), file=sys.stderr, flush=True)
    where = platform.machine() + ", 1 thread" if arguments.device == "cpu" else torch.cuda.get_device_name()
    peers = ", ".join(f"{n} {_version(n)}" for n in ("curvlinops-for-pytorch", "pyhessian", "hessian-eigenthings"))
    print(f"{date.today()}, {where}, torch {torch.__version__}, {peers}; {time.perf_counter() - began:.0f} s")
    print(table(rows))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump([asdict(r) for r in rows], file, indent=1)


def _version(name: str) -> str:
    try:
        return version(name)
    except Exception:  # noqa: BLE001 (its rows will say so)
        return "not installed"


if __name__ == "__main__":
    main()
