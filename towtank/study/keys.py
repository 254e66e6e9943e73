"""The keys a study may set: numbers of a member, training settings, keyword arguments of its task function."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from towtank.record.errors import MISSING, ConfigError, nearest
from towtank.record.record import Scalar
from towtank.train.settings import MEMBER_KEYS, TRAINING_KEYS, Member, Training

_KINDS: dict[Any, type] = {"int": int, "float": float, "bool": bool, "str": str, int: int, float: float, bool: bool,
                           str: str}  # fmt: skip
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a cell.

    Args:
        name: the key.
        kinds: types its value may have; empty means any scalar.
        choices: texts it may be; empty means any.
        default: value of a cell that does not set it, `MISSING` if it must.
    """

    name: str
    kinds: tuple[type, ...] = ()
    choices: tuple[str, ...] = ()
    default: object = MISSING

    @property
    def required(self) -> bool:
        """Whether a cell must set it."""
        return self.default is MISSING

    @property
    def expected(self) -> str:
        """What is allowed, in words."""
        if self.choices:
            return " | ".join(self.choices)
        return " or ".join(_WORDS[k] for k in self.kinds) if self.kinds else "a number, a text, true or false"

    def coerce(self, value: object) -> Scalar:
        """The value in the key's type, so that 1 and 1.0 are one run.

        Raises:
            ConfigError: if it is of another type.
        """
        fits = not self.kinds or any(_is(value, kind) for kind in self.kinds)
        if (
            not fits
            or not isinstance(value, str | int | float | bool | None)
            or self.choices
            and value not in self.choices
        ):
            raise ConfigError(self.name, self.expected, value=value, nearest=nearest(value, self.choices))
        if _is(value, int) and abs(value) >= 2**63:  # type: ignore[arg-type]
            raise ConfigError(self.name, "an integer below 2**63", value=value)
        if float in self.kinds and int not in self.kinds and _is(value, int):
            return float(value)  # type: ignore[arg-type]
        return value


@dataclass(frozen=True)
class Keys:
    """All keys of a study's cells; `open` if its task function takes any keyword."""

    known: Mapping[str, Key]
    open: bool = False

    def of(self, name: str) -> Key:
        """The key of that name.

        Raises:
            ConfigError: if there is none; it names the nearest one.
        """
        if name in self.known:
            return self.known[name]
        if self.open:
            return Key(name=name)
        raise ConfigError(name, "a keyword of the task or a training setting", nearest=nearest(name, self.known))


def settings_keys() -> dict[str, Key]:
    """Keys of `Member` and `Training` with their types, choices and defaults."""
    found: dict[str, Key] = {}
    for kind in (Training, Member):
        hints = get_type_hints(kind)
        for field in fields(kind):
            hint = hints[field.name]
            choices = field.metadata.get("choices") or (get_args(hint) if get_origin(hint) is Literal else ())
            kinds = (str,) if choices else (hint,)
            default = MISSING if field.default is NO_DEFAULT else field.default
            found[field.name] = Key(name=field.name, kinds=kinds, choices=choices, default=default)
    return found


def task_keys(task: str) -> Keys:
    """Keys of a task's cells: its keyword arguments, then those of the training and the member.

    Raises:
        ConfigError: if the task cannot be imported or is no function of keywords.

    Example:
        >>> task_keys("towtank.train.tasks:gpt").of("width").kinds
        (<class 'int'>,)
    """
    parameters = inspect.signature(task_function(task)).parameters.values()
    own: dict[str, Key] = {}
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise ConfigError("task", f"a function of keyword arguments, {parameter.name} is positional", value=task)
        if parameter.kind is not parameter.VAR_KEYWORD:
            own[parameter.name] = _key_of(parameter)
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return Keys({k: v for k, v in own.items() if k not in MEMBER_KEYS} | settings_keys(), open=anything)


def task_function(task: str) -> Callable[..., object]:
    """The function a study names as `package.module:function`.

    Raises:
        ConfigError: naming what is missing: the colon, the module, the function.
    """
    module_name, colon, name = task.partition(":")
    if not (colon and module_name and name.isidentifier()):
        raise ConfigError("task", '"package.module:function"', value=task)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may fail in any way
        why = " ".join(str(error).split())[:120]
        raise ConfigError("task", f"a module that imports ({type(error).__name__}: {why})", value=task) from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if inspect.isfunction(v)]
        raise ConfigError("task", f"a function in {module_name}", value=task, nearest=nearest(name, names))
    return function


def check_value(name: str, value: Scalar, *, size: str) -> None:
    """Check a value of the right type: the rules of `Member` and `Training`, and a size above 0.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    try:
        if name in MEMBER_KEYS:
            Member(**({"lr": 1.0} | {name: value}))  # type: ignore[arg-type]
        elif name in TRAINING_KEYS:
            Training(**{name: value})  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(name, str(error).rpartition("expected ")[2], value=value) from None
    if name == size and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf")):
        raise ConfigError(name, "a positive number", value=value)


def _key_of(parameter: inspect.Parameter) -> Key:
    hint = parameter.annotation
    parts = [p.strip() for p in hint.split("|")] if isinstance(hint, str) else [*get_args(hint)] or [hint]
    kinds = tuple(_KINDS[p] for p in parts if p in _KINDS)
    optional = any(p in ("None", None, type(None)) for p in parts)
    if len(kinds) + optional < len(parts):
        kinds = ()  # an annotation we do not read: any scalar
    elif optional:
        kinds = ()
    default = parameter.default
    scalar = isinstance(default, str | int | float | bool | None)
    return Key(
        name=parameter.name, kinds=kinds, default=default if scalar and default is not parameter.empty else MISSING
    )


def _is(value: object, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
