"""Studies as TOML files: read with the place of every mistake, and written back."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from towtank.record.errors import ConfigError, nearest, plain
from towtank.study.config import Refine, Study, check_axes, check_size
from towtank.study.keys import settings_keys

_MAX_BYTES = 100_000
_LONG_KEY = re.compile(r"""(\.[ \t]{0,8}[\w"'-]{1,64}[ \t]{0,8}){40}""")
_WORDS = {"int": "an integer", "float": "a number", "str": "a text", "bool": "true or false", "array": "a list",
          "object": "a table"}  # fmt: skip


def load_study(source: str | Path, *, check_task: bool = True) -> Study:
    """Read a study from a TOML file, or a built-in one by its name.

    Args:
        source: path of a file, or a name of `builtin_studies`.
        check_task: import the task function, which may be beside the file, and check the keys against it.

    Raises:
        ConfigError: one line: file and line, key, value, what is allowed, the nearest known key.

    Example:
        >>> load_study("lr-transfer").verify.target
        256
    """
    where, text = _read(source)
    try:
        study = _parse(text)
        if check_task:
            _make_importable(source)
            study.check_task()
    except ConfigError as error:
        line = _line_of(text, error.key)
        raise error.at(f"{where}:{line}" if line else where) from None
    return study


def builtin_studies() -> dict[str, str]:
    """Names of the studies that come with towtank, and the question of each."""
    files = sorted((f for f in _builtin_folder().iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {f.name.removesuffix(".toml"): _parse(f.read_text(encoding="utf-8")).question for f in files}


def study_toml(study: Study) -> str:
    """A study as the TOML text that `load_study` reads back."""
    content = msgspec.to_builtins(study)
    tables = {name: content.pop(name) for name in ("grid", "fixed", "refine", "verify")}
    if tables["verify"]:
        tables["verify"] = {study.size: tables["verify"].pop("target")} | tables["verify"]
    lines = [f"{name} = {_toml(value)}" for name, value in content.items()]
    for name, table in tables.items():
        if table:
            lines += ["", f"[{name}]", *(f"{_toml_key(key)} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _read(source: str | Path) -> tuple[str, str]:
    """How to call a study in messages, and its text.

    Raises:
        ConfigError: if there is none of that name, or it is no text.
    """
    shown = plain(str(source))
    try:
        content = _content(source)
        text = None if content is None else content.decode()
    except UnicodeDecodeError:
        raise ConfigError(shown, "a text file in UTF-8") from None
    except (OSError, ValueError) as error:
        raise ConfigError(shown, f"a study file that can be read ({error})") from None
    if text is None:
        names = builtin_studies()
        raise ConfigError(shown, f"a TOML file or one of: {', '.join(names)}", nearest=nearest(source, names))
    if len(text) > _MAX_BYTES:
        raise ConfigError(shown, f"a study of at most {_MAX_BYTES} bytes")
    return shown, text


def _make_importable(source: str | Path) -> None:
    """Let a task beside its study file be imported, here and in the workers, which are given this `sys.path`."""
    folder = str(Path(source).absolute().parent)
    if Path(source).is_file() and folder not in sys.path:
        sys.path.append(folder)


def _content(source: str | Path) -> bytes | None:
    """The bytes of a file or a built-in study, no more than tell that they are too many; None if there is no such study."""
    path, builtin = Path(source), _builtin_folder() / f"{source}.toml"
    if path.is_file():
        with path.open("rb") as file:
            return file.read(_MAX_BYTES + 1)
    if re.fullmatch(r"[\w-]+", str(source)) and builtin.is_file():
        return builtin.read_bytes()
    return None


def _parse(text: str) -> Study:
    if _LONG_KEY.search(text):  # the time to read it grows with the square of its length
        raise ConfigError("TOML", "keys of few parts")
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError("TOML", f"valid syntax ({error})") from None
    except (RecursionError, ValueError) as error:
        raise ConfigError("TOML", f"a plain study ({type(error).__name__})") from None
    _check_names("", raw, Study.__struct_fields__)
    size = raw.get("size", "width")
    if isinstance(raw.get("grid"), dict):
        check_axes(raw["grid"])
        check_size(size, raw["grid"], raw["fixed"] if isinstance(raw.get("fixed"), dict) else {})
    for section, names in (("refine", Refine.__struct_fields__), ("verify", (size, "factors", "seeds"))):
        if isinstance(raw.get(section), dict):
            _check_names(section, raw[section], names)
    if isinstance(verify := raw.get("verify"), dict):
        if size not in verify:
            raise ConfigError(f"verify.{size}", "the size to predict and to try")
        raw["verify"] = {"target": verify.pop(size)} | verify
    for name, value in raw.get("fixed", {}).items() if isinstance(raw.get("fixed"), dict) else ():
        if not isinstance(value, str | int | float | bool):
            raise ConfigError(f"fixed.{name}", "one value; lists and ranges belong to [grid]", value=value)
    try:
        return msgspec.convert(raw, Study)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise _convert_error(error, raw, size) from None


def _convert_error(error: msgspec.ValidationError, raw: Mapping[str, Any], size: str) -> ConfigError:
    """What msgspec calls "Expected `int`, got `str` - at `$.refine.points`" in our words."""
    what, _, at = str(error).partition(" - at `$")
    found: Any = raw
    path = re.findall(r"\.([^.\[\]`]+)|\[(\d+)\]", at)
    for name, index in path:
        found = found[int(index)] if index else found.get(name) if isinstance(found, Mapping) else found
    key = ".".join(name for name, _ in path if name and name != "...").replace("verify.target", f"verify.{size}")
    expected = re.sub(r"^Expected |, got .*$", "", what).replace("`", "")
    if match := re.search(r"missing required field `(\w+)`", what):
        return ConfigError(match[1], "to be set")
    expected = " or ".join(_WORDS.get(word, word) for word in expected.split(" | "))
    return ConfigError(key or "study", expected, value=found)


def _check_names(section: str, table: Mapping[str, Any], known: Iterable[str]) -> None:
    for name in table:
        if name not in known:
            words = ", ".join(known)
            near = nearest(name, known)
            if not section and near is None and name in settings_keys():
                near = f"fixed.{name}"
            raise ConfigError(f"{section}.{name}".lstrip("."), f"one of {words}", value=table[name], nearest=near)


def _line_of(text: str, key: str) -> int | None:
    """Line of a dotted key in TOML text, found by its section and name."""
    section, _, name = key.rpartition(".")
    here = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            here = header[1]
            if not section and here == name:
                return number
        elif match := re.match(r"\s*[\"']?([^\"'=\s]+)[\"']?\s*=", line):
            path = f"{here}.{match[1]}".lstrip(".")
            if path == key or section and path == section:
                return number
    return None


def _builtin_folder() -> Any:
    return resources.files("towtank") / "studies"


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
        return f'"{escaped}"'
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return repr(value)
