"""The lines of a stream: what a run that is being watched says of itself, one JSON object a line."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

import msgspec

from towtank.record.errors import NewerRecordError, plain
from towtank.record.record import Scalar, canonical

SCHEMA = 1
End = Literal["done", "diverged", "failed", "stopped"]


class Line(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """What all lines have in common: a `kind`."""


class Run(Line, frozen=True, kw_only=True, tag="run"):
    """The first line, and again where a run goes on: who writes, and what the run is."""

    schema: int = SCHEMA
    id: str
    started: str = ""
    config: dict[str, Scalar] = {}
    environment: dict[str, Scalar] = {}
    parameters: int | None = None
    host: str = ""
    pid: int = 0


class Step(Line, frozen=True, kw_only=True, tag="step"):
    """Readings of a step; those that are no finite numbers are null, and named in `nonfinite`."""

    step: int
    time_s: float = 0.0
    readings: dict[str, float | None]
    nonfinite: dict[str, Literal["nan", "inf", "-inf"]] = {}

    @property
    def values(self) -> dict[str, float]:
        """{key: number}, NaN and infinity included."""
        lost = self.nonfinite
        if not lost and None not in self.readings.values():
            return self.readings  # pyright: ignore[reportReturnType]
        return {k: float(lost.get(k, "nan")) if v is None else v for k, v in self.readings.items()}


class Alarm(Line, frozen=True, kw_only=True, tag="alarm"):
    """Something that goes wrong, or will; `lead` is the step at which it is expected, and its interval."""

    step: int
    name: str
    message: str = ""
    source: str = ""
    suggestion: str = ""
    severity: str = "warning"
    key: str = ""
    subject: str = ""
    value: float | None = None
    limit: float | None = None
    lead: list[float | None] | dict[str, float | None] | None = None
    nonfinite: dict[str, Literal["nan", "inf", "-inf"]] = {}


class Note(Line, frozen=True, kw_only=True, tag="note"):
    """A probe that cannot tell, or something that cannot be seen."""

    step: int
    probe: str
    text: str


class Ended(Line, frozen=True, kw_only=True, tag="end"):
    """The last line of a run that ended by itself."""

    step: int
    status: End


class Damaged(msgspec.Struct, frozen=True, kw_only=True):
    """A line that could not be read, and where it begins in the file."""

    offset: int
    reason: str


Entry = Run | Step | Alarm | Note | Ended | Damaged
_DECODER = msgspec.json.Decoder(Run | Step | Alarm | Note | Ended)
_SCHEMA = msgspec.json.Decoder(dict[str, Any])


def encode_line(content: Mapping[str, Any]) -> bytes:
    r"""One line of strict JSON: NaN and infinity are null, what is not JSON is text.

    Example:
        >>> encode_line({"kind": "note", "text": "a\nb", "limit": float("inf")})
        b'{"kind":"note","text":"a\\nb","limit":null}\n'
    """
    try:
        return msgspec.json.encode(content, enc_hook=str) + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, in the name of a file or a module
        text = json.dumps(content, default=str, ensure_ascii=False).encode("utf-8", "replace")
        return msgspec.json.encode(json.loads(text, parse_constant=lambda _: None)) + b"\n"


def decode_line(text: bytes, offset: int = 0) -> Entry:
    """Read a line back.

    Args:
        text: the line.
        offset: where it begins in its file, for the report of a damaged one.

    Raises:
        NewerRecordError: if a later towtank wrote it.
    """
    try:
        entry = _DECODER.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        _refuse_newer(text)
        return Damaged(offset=offset, reason=plain(str(error))[:200])
    if isinstance(entry, Run) and entry.schema > SCHEMA:
        _refuse_newer(text)
    return entry


def read_stream(path: Path | str, offset: int = 0, *, limit: int | None = None) -> tuple[list[Entry], int]:
    """The lines of a stream from an offset on, and the offset to go on from; a torn last line is left for the next call.

    Args:
        path: the file.
        offset: 0, or what an earlier call returned.
        limit: read at most about this many bytes, at least one line.

    Raises:
        OSError: if the file cannot be read.
        NewerRecordError: if a later towtank wrote it.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        text = _whole_lines(file, limit)
    entries: list[Entry] = []
    for line in text.split(b"\n")[:-1]:
        entries.append(decode_line(line, offset))
        offset += len(line) + 1
    return entries, offset


def split_nonfinite(values: Mapping[str, float]) -> tuple[dict[str, float | None], dict[str, str]]:
    """The values with None for what is not finite, and the names of those.

    Example:
        >>> split_nonfinite({"a": 1.0, "b": float("-inf")})
        ({'a': 1.0, 'b': None}, {'b': '-inf'})
    """
    numbers = {key: float(value) for key, value in values.items()}
    if math.isfinite(sum(numbers.values())):
        return dict(numbers), {}
    lost = {key: str(value) for key, value in numbers.items() if not math.isfinite(value)}
    return numbers | dict.fromkeys(lost), lost


def scalars(config: Mapping[str, Any]) -> dict[str, Scalar]:
    """A configuration as flat scalars that JSON can hold: infinity by name, anything else than a scalar as its text."""
    flat = {str(k): v if isinstance(v, str | int | float | bool | None) else str(v) for k, v in config.items()}
    return json.loads(canonical(flat))


def _refuse_newer(text: bytes) -> None:
    try:
        content = _SCHEMA.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError):
        return
    schema, environment = content.get("schema"), content.get("environment")
    if content.get("kind") == "run" and isinstance(schema, int) and schema > SCHEMA:
        writer = environment.get("towtank") if isinstance(environment, dict) else None
        need = f"towtank {writer} or later" if writer else "a later towtank"
        raise NewerRecordError(
            plain(f"the stream has format {schema}, this towtank reads up to {SCHEMA}: install {need}")
        )


def _whole_lines(file: IO[bytes], limit: int | None) -> bytes:
    text = file.read() if limit is None else file.read(limit)
    while limit is not None and b"\n" not in text and (more := file.read(limit)):
        text += more
    return text[: text.rfind(b"\n") + 1]
