"""One run, one file: the record is there, or the run is not done."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from towtank.record.errors import FolderError, NewerRecordError, plain

SCHEMA = 1
Scalar = str | int | float | bool | None
RunStatus = Literal["done", "diverged", "failed", "oom"]
Stage = Literal["grid", "refine", "verify"]
Curve = list[tuple[int, float | None]]


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out loss of a run in nats: before the first step, after the last (None if diverged), and in between."""

    initial: float | None = None
    final: float | None = None
    curve: Curve = []


class Record(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=False):
    """One run: what was asked, what came out, where and with what it was measured."""

    id: str
    config: dict[str, Scalar]
    status: RunStatus
    steps: int
    loss: Loss
    signals: dict[str, Curve] = {}
    corpus: str = ""
    environment: dict[str, Scalar] = {}
    time_s: float = 0.0
    stage: Stage = "grid"
    study: str = ""
    parameters: int | None = None
    reason: str = ""
    schema: int = SCHEMA
    checksum: str = ""


def canonical(value: object) -> str:
    """The JSON text that identifies a value: sorted keys, no spaces, infinities by name.

    Example:
        >>> canonical({"b": 1.0, "a": float("inf")})
        '{"a":"inf","b":1.0}'
    """
    return json.dumps(_named(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def checksum(content: Mapping[str, Any]) -> str:
    """Sha256 of the canonical JSON of a record's fields, its own `checksum` left out."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(canonical(rest).encode()).hexdigest()


def encode(record: Record) -> bytes:
    """A record as one line of strict JSON: NaN and infinity are null (in the configuration, infinity is "inf")."""
    content = msgspec.to_builtins(record)
    config = _named(content["config"])
    content = _finite(content) | {"config": config}
    content["checksum"] = checksum(content)
    return (json.dumps(content, allow_nan=False) + "\n").encode()


def decode(text: bytes, *, name: str = "record") -> Record:
    """Read a record back.

    Args:
        text: the file's content.
        name: how to call the file in messages.

    Raises:
        ValueError: if the text is not a whole, undamaged record.
        NewerRecordError: if a later towtank wrote it.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    _check_schema(content, name)
    if content.get("checksum") and content["checksum"] != checksum(content):
        raise ValueError("its checksum does not match its content")
    config = content.get("config")
    if isinstance(config, dict):
        content["config"] = {key: _number(value) for key, value in config.items()}
    return msgspec.convert(content, Record)


def write_record(folder: Path, record: Record) -> bytes:
    """Write `<folder>/<id>.json`: complete under its name, or not there at all; returns what was written.

    Args:
        folder: an existing folder.
        record: the run.

    Raises:
        OSError: if the file system refuses; nothing is left behind.
    """
    text = encode(record)
    write_atomic(folder / f"{record.id}.json", text)
    return text


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file by way of a temporary one beside it, synced to the disk."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def load_records(folder: Path | str, *, quarantine: bool = False) -> tuple[list[Record], list[str]]:
    """Every readable record of a study folder, and one line for each damaged one.

    Args:
        folder: the study's folder (with `records/` in it).
        quarantine: rename damaged records to `<name>.damaged`, so that their runs are run again.

    Raises:
        FolderError: if there are no records to read.
        NewerRecordError: if a record needs a later towtank.

    Example:
        >>> records, problems = load_records("runs/lr-transfer")  # doctest: +SKIP
    """
    records: list[Record] = []
    problems: list[str] = []
    for path in _record_files(Path(folder)):
        try:
            records.append(_read(path))
        except (ValueError, OSError) as error:
            problems.append(plain(f"record is damaged: {path}: {error}"))
            if quarantine:
                path.replace(path.with_name(path.name + ".damaged"))
    return records, problems


def remove_leftovers(folder: Path) -> int:
    """Remove the temporary files that a killed writer left; returns how many."""
    leftovers = list(folder.glob(".*.tmp"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return len(leftovers)


def _read(path: Path) -> Record:
    record = decode(path.read_bytes(), name=str(path))
    if record.id != path.stem:
        raise ValueError(f"it says it is {record.id}")
    return record


def _record_files(folder: Path) -> list[Path]:
    records = folder / "records"
    try:
        return sorted(p for p in records.iterdir() if p.suffix == ".json" and not p.name.startswith("."))
    except OSError:
        if (folder / "stream.jsonl").exists():
            raise FolderError(
                f"{folder}: expected records/ in it, got the stream of a run that was never closed: `towtank watch` shows it, and "
                "towtank.record.stream.save_record(folder) makes its record"
            ) from None
        raise FolderError(f"{folder}: expected a study folder with records/ in it; `towtank sweep` makes one") from None


def _check_schema(content: dict[str, Any], name: str) -> None:
    schema = content.get("schema", SCHEMA)
    if type(schema) is not int or schema < 1:
        raise ValueError(f"schema {schema!r} is not a whole number above 0")
    if schema > SCHEMA:
        environment = content.get("environment")
        writer = environment.get("towtank") if isinstance(environment, dict) else None
        need = f"towtank {writer} or later" if writer else "a later towtank"
        raise NewerRecordError(plain(f"{name} has format {schema}, this towtank reads up to {SCHEMA}: install {need}"))


def _finite(value: Any) -> Any:
    """The value with every NaN and infinity as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _named(value: Any) -> Any:
    """The value with infinities and NaN as the strings Python reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_named(item) for item in value]
    return value


def _number(value: Any) -> Any:
    return float(value) if value in ("inf", "-inf", "nan") else value


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a folder be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
