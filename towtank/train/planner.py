"""How many members to train together, and whether compiling its gradient repays the compile time."""

from __future__ import annotations

import math

# Measured by bench/ensemble.py on a CPU, one thread, 8 members: per member-step seconds of the eager ensemble and the
# speed-up of the compiled one, by number of parameters. A new machine shifts the seconds, hardly the crossing point.
COMPILE_S = 40.0
ALONE_FROM, MOST_MEMBERS = 1_000_000, 64
_PARAMETERS = (41e3, 131e3, 459e3, 1.7e6)
_STEP_S = (0.008, 0.017, 0.037, 0.100)
_SPEED_UP = (1.14, 1.0, 1.0, 1.0)


def should_compile(choice: str, device: str, parameters: int, members: int, steps: int) -> bool:
    """Whether to compile: on request, or on a CPU when the time saved is expected to exceed the compile time.

    The rule is a fixed function of the ensemble, not of a timing, so that a run repeats bit by bit.

    Args:
        choice: `auto`, `always` or `never`.
        device: where the ensemble trains; `auto` compiles on a CPU only, where the table was measured.
        parameters: of one member.
        members: E.
        steps: length of the run.

    Example:
        >>> should_compile("auto", "cpu", 41_000, 8, 200), should_compile("auto", "cpu", 41_000, 16, 10_000)
        (False, True)
    """
    if choice != "auto":
        return choice == "always"
    if not device.startswith("cpu"):
        return False
    import numpy as np

    at = math.log(parameters)
    step_s = math.exp(float(np.interp(at, np.log(_PARAMETERS), np.log(_STEP_S))))
    speed_up = float(np.interp(at, np.log(_PARAMETERS), _SPEED_UP))
    return members * steps * step_s * (1 - 1 / speed_up) > COMPILE_S


def largest_ensemble(device: str, parameters: int) -> int:
    """How many members to train as one program at most, memory apart.

    On a CPU a model of a million parameters spends its time in matrix products that run faster one by one than batched
    (bench/ensemble.py: 0.82 times the speed at width 256); smaller ones, and accelerators, gain from company.

    Args:
        device: where the ensemble trains.
        parameters: of one member.

    Example:
        >>> largest_ensemble("cpu", 460_000), largest_ensemble("cpu", 1_700_000), largest_ensemble("cuda", 1_700_000)
        (64, 1, 64)
    """
    return 1 if device.startswith("cpu") and parameters >= ALONE_FROM else MOST_MEMBERS
