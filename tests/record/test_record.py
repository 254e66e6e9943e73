"""A record is there, whole and undamaged, or its run is not done."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from towtank.record.errors import FolderError, NewerRecordError
from towtank.record.record import (
    SCHEMA,
    Loss,
    Record,
    checksum,
    decode,
    encode,
    load_records,
    remove_leftovers,
    write_record,
)

FIXTURES = Path(__file__).parent / "fixtures"
RECORD = Record(
    id="abc",
    config={"width": 32, "lr": 0.0078125, "clip": math.inf, "parametrization": "mup", "qk_norm": True, "corpus": None},
    status="diverged",
    steps=3,
    loss=Loss(initial=5.5, final=None, curve=[(0, 5.5), (3, math.nan)]),
    signals={"grad_norm": [(0, 1.0), (3, math.inf)]},
    environment={"torch": "2.13.0", "cpus": 2},
    reason="loss is NaN at step 3",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "records").mkdir()
    return tmp_path


def test_round_trip_with_nan_and_infinity_as_null() -> None:
    text = encode(RECORD)
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert strict["loss"]["curve"] == [[0, 5.5], [3, None]]
    back = decode(text)
    assert back.loss.curve == [(0, 5.5), (3, None)] and back.signals == {"grad_norm": [(0, 1.0), (3, None)]}
    assert back.config == RECORD.config and back.checksum == checksum(strict)
    assert encode(back) == text


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_flipped_bit_goes_unnoticed(data: st.DataObject) -> None:
    text = encode(RECORD)
    whole = decode(text)
    at = data.draw(st.integers(0, len(text) - 1))
    flipped = bytearray(text)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        read = decode(bytes(flipped))
    except (ValueError, NewerRecordError):
        return
    # Only the spaces between tokens, or the name of the checksum itself, may differ: nothing that was measured.
    assert msgspec.structs.replace(read, checksum=whole.checksum) == whole


@pytest.mark.parametrize(
    "damage",
    [lambda t: t[: len(t) // 2], lambda t: b"", lambda t: b"hello", lambda t: b"[1]", lambda t: b"[" * 100_000,
     lambda t: t.replace(b"diverged", b"undone"), lambda t: t.replace(b'"steps": 3', b'"steps": 4'),
     lambda t: t.replace(b'"schema": 1', b'"schema": "x"'), lambda t: b"\xff" + t, lambda t: t.replace(b"abc", b"abd")],
)  # fmt: skip
def test_damaged_records_are_named_and_the_others_used(folder: Path, damage) -> None:
    whole = msgspec.structs.replace(RECORD, id="whole")
    write_record(folder / "records", whole)
    write_record(folder / "records", RECORD)
    path = folder / "records" / "abc.json"
    path.write_bytes(damage(path.read_bytes()))
    records, problems = load_records(folder)
    assert [record.id for record in records] == ["whole"]
    assert len(problems) == 1 and problems[0].startswith(f"record is damaged: {path}: ") and problems[0].isprintable()
    assert path.exists()
    load_records(folder, quarantine=True)
    assert not path.exists() and path.with_name("abc.json.damaged").exists()
    assert load_records(folder) == (records, [])


def test_a_newer_record_is_refused_with_the_version_it_needs(folder: Path) -> None:
    content = json.loads(encode(RECORD)) | {"schema": SCHEMA + 1, "environment": {"towtank": "7.1"}, "novelty": [1]}
    (folder / "records" / "abc.json").write_text(json.dumps(content))
    for quarantine in (False, True):
        with pytest.raises(NewerRecordError, match=rf"abc.json has format {SCHEMA + 1}.*install towtank 7.1 or later"):
            load_records(folder, quarantine=quarantine)
    assert (folder / "records" / "abc.json").exists()


@pytest.mark.parametrize("version", ["v1"])
def test_records_of_every_released_format_are_read(version: str) -> None:
    record = decode((FIXTURES / f"record-{version}.json").read_bytes())
    assert record.config["clip"] == math.inf and record.loss.curve == [(0, 5.5), (3, None)]


def test_a_record_without_checksum_is_read() -> None:
    content = json.loads(encode(RECORD))
    del content["checksum"], content["reason"]
    assert decode(json.dumps(content).encode()).config == RECORD.config


def test_no_records_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="towtank sweep"):
        load_records(tmp_path)


def test_a_failed_write_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_record(folder / "records", RECORD)
    assert list((folder / "records").iterdir()) == []


WRITER = """
import sys
from pathlib import Path
import msgspec
from tests.record.test_record import RECORD
from towtank.record.record import write_record
big = msgspec.structs.replace(RECORD, signals={"s": [(i, 0.1 * i) for i in range(20_000)]})
print("ready", flush=True)
while True:
    for i in range(10):
        write_record(Path(sys.argv[1]), msgspec.structs.replace(big, id=f"r{i}"))
"""


def test_kill_while_writing_leaves_whole_records_or_none(folder: Path) -> None:
    records = folder / "records"
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(records)], stdout=subprocess.PIPE, cwd=Path.cwd())
        assert process.stdout and process.stdout.readline() == b"ready\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert load_records(folder)[1] == []
    remove_leftovers(records)
    assert all(path.suffix == ".json" for path in records.iterdir())


def test_a_run_that_was_never_closed_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "stream.jsonl").write_text("")
    with pytest.raises(FolderError, match="never closed.*save_record"):
        load_records(tmp_path)
