"""A study: one question, the grid of runs that answers it, and how the answer is verified."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from towtank.record.errors import ConfigError, nearest
from towtank.record.record import Scalar
from towtank.study.axes import MAX_RUNS, axis_length, axis_values
from towtank.study.keys import Key, Keys, check_value, task_keys

DEFAULT_TASK = "towtank.train.tasks:gpt"


class Refine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Extra seeds at the `points` learning rates nearest each optimum the grid found.

    With `equal_compute`, `seeds` are those of the largest size, and a size k times smaller gets k times as many (counting
    on from the last): small models are the noisy ones, and the cheap ones.
    """

    seeds: tuple[int, ...]
    points: int = 3
    equal_compute: bool = False


class Verify(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Train the target size at the predicted learning rate times each factor."""

    target: int | float
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    seeds: tuple[int, ...] = (0,)


class Study(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to run and why.

    Args:
        name: names the folder and the report.
        grid: for each swept key a list of values, or a range: `{"log2": [-10, -3]}`.
        fixed: one value for each key that is set but not swept.
        question: what the study answers, in a sentence.
        task: `package.module:function`; its keyword arguments are keys of the grid.
        size: the key that says how big a model is.
        refine: extra seeds around the optima.
        verify: the size to predict and to try.

    Raises:
        ConfigError: one line naming the key, its value and what is allowed.

    Example:
        >>> Study(name="mine", grid={"width": [32, 64], "lr": {"log2": [-8, -4]}}).size
        'width'
    """

    name: str
    grid: dict[str, list[Scalar] | dict[str, Any]]
    fixed: dict[str, Scalar] = {}
    question: str = ""
    task: str = DEFAULT_TASK
    size: str = "width"
    refine: Refine | None = None
    verify: Verify | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ConfigError("name", "a text", value=self.name)
        _check_grid(self)
        check_size(self.size, self.grid, self.fixed)
        _check_seeds("refine", self.refine)
        _check_seeds("verify", self.verify)
        if self.refine is not None and not _positive(self.refine.points):
            raise ConfigError("refine.points", "an integer of 1 or more", value=self.refine.points)
        if self.verify is not None:
            _check_verify(self.verify, self)

    def check_task(self) -> Keys:
        """Import the task and check every key and value against its signature.

        Raises:
            ConfigError: for an unknown task, key or type, and for arguments of the task left unset.
        """
        keys = task_keys(self.task)
        for name, axis in self.grid.items():
            _checked("grid", keys, name, lambda key, axis=axis: axis_values(key, axis)[0], self.size)
        for name, value in self.fixed.items():
            _checked("fixed", keys, name, lambda key, value=value: [key.coerce(value)], self.size)
        for name, key in keys.known.items():
            if key.required and name not in self.grid and name not in self.fixed:
                raise ConfigError(name, f"{key.expected} in [grid] or [fixed]; nothing sets it")
        if self.verify is not None:
            target = self.verify.target
            sizes = _checked("verify", keys, self.size, lambda key: [key.coerce(target)], self.size)
            axis = self.grid.get(self.size)
            if axis is not None and sizes[0] in axis_values(keys.of(self.size), axis)[0]:
                raise ConfigError(f"verify.{self.size}", f"a {self.size} the grid does not train", value=target)
        return keys


def _check_grid(study: Study) -> None:
    if not isinstance(study.grid, Mapping) or not study.grid:
        raise ConfigError("grid", "at least one axis, such as lr = {log2 = [-10, -3]}", value=study.grid)
    check_axes(study.grid)
    for name in study.grid:
        if name in study.fixed:
            raise ConfigError(f"fixed.{name}", "a key that [grid] does not sweep", value=study.fixed[name])


def check_axes(grid: Mapping[str, object]) -> None:
    """Check that every axis is a list or a range, and that they make few enough runs.

    Raises:
        ConfigError: naming the axis.
    """
    runs = 1
    for name, axis in grid.items():
        try:
            runs *= axis_length(name, axis)
        except ConfigError as error:
            raise error.under("grid") from None
    if runs > MAX_RUNS:
        raise ConfigError("grid", f"at most {MAX_RUNS} runs, not {runs:.3g}")


def check_size(size: object, grid: Mapping[str, object], fixed: Mapping[str, object]) -> None:
    """Check that the study sets its size key.

    Raises:
        ConfigError: naming the nearest key that it does set.
    """
    if size not in grid and size not in fixed:
        raise ConfigError("size", "a key of [grid] or [fixed]", value=size, nearest=nearest(size, [*grid, *fixed]))


def _check_seeds(section: str, part: Refine | Verify | None) -> None:
    if part is None:
        return
    seeds = part.seeds
    if not seeds or any(isinstance(s, bool) or not isinstance(s, int) or not 0 <= s < 2**63 for s in seeds):
        raise ConfigError(f"{section}.seeds", "a list of integers of 0 or more", value=list(seeds))


def _check_verify(verify: Verify, study: Study) -> None:
    if not _positive(verify.target):
        raise ConfigError(f"verify.{study.size}", "a positive number", value=verify.target)
    if not verify.factors or not all(_positive(f) for f in verify.factors):
        raise ConfigError("verify.factors", "a list of positive numbers", value=list(verify.factors))


def _checked(section: str, keys: Keys, name: str, values: Callable[[Key], list[Scalar]], size: str) -> list[Scalar]:
    """The values of a key, each of the right type and in its range; errors name the section."""
    try:
        found = values(keys.of(name))
        for value in found:
            check_value(name, value, size=size)
    except ConfigError as error:
        raise error.under(section) from None
    return found


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
