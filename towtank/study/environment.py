"""Where and with what a run was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata

from towtank.record.record import Scalar
from towtank.study.executors import usable_cpus

_VERSIONS = ("towtank", "torch", "numpy")


def environment(device: str, executor: str) -> dict[str, Scalar]:
    """Versions, machine, device and git state, as flat scalars for a record.

    Args:
        device: where the runs are trained.
        executor: by what.
    """
    versions = {name: _version(name) for name in _VERSIONS}
    machine = {"platform": platform.platform(), "processor": _processor(), "cpus": usable_cpus()}
    python = {"python": platform.python_version()}
    return {
        **python,
        **versions,
        **machine,
        "device": device,
        "device_name": _device_name(device),
        "executor": executor,
        **_git(),
    }


def differences(before: dict[str, Scalar], now: dict[str, Scalar]) -> list[str]:
    """What decides numbers and is not as it was: `torch 2.6 -> 2.13`."""
    names = ("python", *_VERSIONS, "device_name")
    return [f"{n} {before[n]} -> {now.get(n)}" for n in names if n in before and before[n] != now.get(n)]


def available_memory(device: str) -> float:
    """Bytes a sweep may take when nobody says: half of what is free here, four fifths of what is free on an accelerator."""
    if device.startswith("cuda"):
        import torch

        return 0.8 * torch.cuda.mem_get_info(device)[0]
    return 0.5 * min(_free_memory(), _control_group_memory())


def _free_memory() -> float:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kilobytes = [int(line.split()[1]) for line in file if line.startswith("MemAvailable")]
        return 1024.0 * kilobytes[0]
    except (OSError, IndexError, ValueError):
        return 4e9


def _control_group_memory() -> float:
    """Memory left to the control group of this process (a container), if it has a limit."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit, \
                open("/sys/fs/cgroup/memory.current", encoding="ascii") as used:  # fmt: skip
            return max(0.0, float(limit.read()) - float(used.read()))
    except (OSError, ValueError):  # none, or "max"
        return float("inf")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return getattr(sys.modules.get(name), "__version__", None)


@cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor()


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return _processor() if device == "cpu" else device
    import torch

    return torch.cuda.get_device_name(device)


def _git() -> dict[str, Scalar]:
    """Commit of the working folder, and whether tracked files differ from it; empty outside a repository."""
    commit = _git_line("rev-parse", "HEAD")
    if not commit:
        return {}
    status = _git_line("status", "--porcelain", "--untracked-files=no")
    return {"git_commit": commit, "git_dirty": bool(status)}


def _git_line(*arguments: str) -> str:
    try:
        command = ["git", "--no-optional-locks", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=os.getcwd(), check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
