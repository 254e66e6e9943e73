"""A cell is a flat dict of scalars that decides a run; here cells become trained members."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Scalar = str | int | float | bool | None
Cell = Mapping[str, Scalar]
Curve = list[tuple[int, float | None]]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of one member: losses in nats, curves as (step, value), time in seconds of its share of the ensemble."""

    status: str  # done | diverged
    steps: int
    reason: str = ""
    initial: float | None = None
    final: float | None = None
    curve: Curve = field(default_factory=list)
    signals: dict[str, Curve] = field(default_factory=dict)
    time_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a cell would cost and what it is measured on, found without training."""

    corpus: str  # digest of the data
    parameters: int
    member_bytes: int  # parameters, gradients, moments and activations of one member
    flops_per_step: float


def describe(cell: Cell) -> Description:
    """Describe the run a cell asks for; trains nothing."""
    raise NotImplementedError


def train_cells(
    cells: Sequence[Cell], *, device: str = "cpu", on_step: Callable[[int, int], None] | None = None
) -> list[Result]:
    """Train cells that differ only in their numbers as one ensemble; `on_step(step, alive)` after each step."""
    raise NotImplementedError
