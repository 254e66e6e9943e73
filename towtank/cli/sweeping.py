"""The sweep command: what is asked, the plan, the run, and how it is interrupted."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import msgspec

from towtank.cli import answering
from towtank.cli.main import INTERRUPTED, OK
from towtank.cli.output import console, print_json, say
from towtank.record.errors import ConfigError
from towtank.study.config import Study
from towtank.study.folder import default_folder
from towtank.study.load import load_study

TERMINATED = 143
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "ti": 2.0**40}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A sweep as asked for."""

    study: Study
    out: Path
    device: str
    workers: int | None
    memory: float | None


class Terminated(BaseException):
    """SIGTERM: the machine wants its processor back."""


def prepare(
    source: str, out: Path | None, device: str, workers: int | None, memory: str | None, seeds: int | None
) -> Request:
    """Check everything that can be wrong with a sweep before it begins.

    Raises:
        ConfigError: for the study, its seeds, the device or the memory.
        FolderError: if the default folder will not do.
    """
    study = load_study(source)
    if seeds is not None:
        fixed = {key: value for key, value in study.fixed.items() if key != "seed"}
        study = msgspec.structs.replace(study, grid=study.grid | {"seed": list(range(seeds))}, fixed=fixed)
    budget = parse_memory(memory) if memory is not None else None
    _check_device(device)
    return Request(study=study, out=out or default_folder(study), device=device, workers=workers, memory=budget)


def plan(request: Request, json: bool) -> int:
    """Show what the sweep would do; returns the exit code."""
    from towtank.cli.planning import show_plan
    from towtank.study.dry_run import dry_run

    planned = dry_run(request.study, request.out, workers=request.workers, device=request.device, memory=request.memory)
    if json:
        print_json("sweep", dry_run=True, runs=planned.runs, done=planned.done, plan=planned)
    else:
        show_plan(planned, console())
    return OK


def run(request: Request, json: bool) -> int:
    """Run the sweep, then answer it; returns the exit code."""
    from towtank.report.answer import bracketed, predict
    from towtank.study.progress import Progress
    from towtank.study.run import sweep

    try:
        with _signals():
            swept = sweep(
                request.study, request.out, predict=predict, bracketed=bracketed, workers=request.workers, device=request.device,
                memory=request.memory, progress=Progress(),
            )  # fmt: skip
    except (KeyboardInterrupt, Terminated) as stop:
        done = len(list((request.out / "records").glob("*.json")))
        say(f"interrupted; {done} runs are saved. To go on: {shlex.join(['towtank', *sys.argv[1:]])}")
        return INTERRUPTED if isinstance(stop, KeyboardInterrupt) else TERMINATED
    return answering.report(request.out, json, damaged=swept.damaged, ran=swept.ran, notes=swept.notes)


def parse_memory(text: str) -> float:
    """Bytes of "4GB", "512 MiB" or "1e9".

    Raises:
        ConfigError: if it is none of these.

    Example:
        >>> parse_memory("4GB")
        4000000000.0
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    try:
        size = float(match[1]) * _UNITS[match[2]] if match else 0.0
    except (ValueError, KeyError):
        size = 0.0
    if not 0 < size < float("inf"):
        raise ConfigError("--memory", "a size such as 4GB or 512MiB", value=text)
    return size


def _check_device(device: str) -> None:
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", device):
        raise ConfigError("--device", "cpu, cuda, cuda:1, mps or xpu", value=device)
    if device == "cpu":
        return
    import torch

    try:
        torch.zeros(1, device=device)
    except Exception as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError("--device", f"a device that torch can use ({why})", value=device) from None


@contextmanager
def _signals() -> Generator[None]:
    """SIGTERM and the first Ctrl-C raise, so that the sweep can clean up; the second Ctrl-C ends the process at once."""

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
        raise KeyboardInterrupt

    def on_terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGINT, on_interrupt), signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
