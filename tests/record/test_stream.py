"""A stream is readable while it grows, after its writer was killed, and when something of it is damaged."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from towtank.record.errors import FolderError, NewerRecordError
from towtank.record.lines import Alarm, Damaged, Ended, Note, Run, Step
from towtank.record.record import load_records
from towtank.record.stream import (
    FILE,
    StreamReader,
    StreamWriter,
    load_stream,
    read_stream,
    record_of,
    save_record,
)
from towtank.record.thin import thin

ALARM = {"step": 2, "name": "epsilon", "message": "too near", "source": "Wortsman 2023", "suggestion": "lower eps",
         "severity": "warning", "key": "a/b", "value": math.inf, "limit": 10.0, "lead": [5.0, 4.0, 9.0]}  # fmt: skip


def strict(line: str) -> dict:
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def write(folder: Path, steps: range, *, losses: dict[int, float] | None = None, config: dict | None = None) -> None:
    with StreamWriter(folder / FILE, config=config or {"lr": 0.1}) as writer:
        for step in steps:
            writer.step(step, 0.1 * (step - steps[0]), {"train/loss": (losses or {}).get(step, 1.0 / step)})


def test_every_line_is_strict_json_and_comes_back(tmp_path: Path) -> None:
    config = {"lr": 0.1, "clip": math.inf, "path": Path("a"), "name": 'q"\n\udc80'}
    with StreamWriter(tmp_path / FILE, config=config, environment={"towtank": "9"}, parameters=7, id="r1") as writer:
        writer.step(1, 0.25, {"train/loss": 2.0, "a/b": math.nan, "c/d": -math.inf, "e": math.inf})
        writer.alarm(ALARM)
        writer.note(1, "noise", "one \n micro-batch \udc80")
    lines = [strict(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "step", "alarm", "note", "end"]
    assert lines[0]["schema"] == 1 and lines[0]["id"] == "r1" and lines[0]["config"]["clip"] == "inf"
    assert lines[1]["readings"] == {"train/loss": 2.0, "a/b": None, "c/d": None, "e": None}
    assert lines[1]["nonfinite"] == {"a/b": "nan", "c/d": "-inf", "e": "inf"}
    (run, step, alarm, note, end), offset = read_stream(tmp_path / FILE)
    assert offset == (tmp_path / FILE).stat().st_size and isinstance(run, Run) and run.parameters == 7
    assert isinstance(step, Step) and math.isnan(step.values.pop("a/b"))
    assert {k: v for k, v in step.values.items() if k != "a/b"} == {"train/loss": 2.0, "c/d": -math.inf, "e": math.inf}
    assert isinstance(alarm, Alarm) and alarm.value is None and alarm.nonfinite == {"value": "inf"}
    assert alarm.limit == 10.0 and alarm.lead == [5.0, 4.0, 9.0] and alarm.suggestion == "lower eps"
    assert isinstance(note, Note) and note.text == "one \n micro-batch ?" and end == Ended(step=1, status="done")


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(0, 10_000), stops=st.lists(st.integers(0, 10_000), max_size=6))
def test_following_a_file_that_is_cut_anywhere_reads_what_is_whole(
    tmp_path_factory, cut: int, stops: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("stream")
    write(folder, range(1, 12))
    text = (folder / FILE).read_bytes()
    text = text[: cut % (len(text) + 1)]
    whole = text.count(b"\n")
    path, entries, offset = folder / "growing", [], 0
    for end in [*sorted(s % (len(text) + 1) for s in stops), len(text)]:
        path.write_bytes(text[:end])
        more, offset = read_stream(path, offset, limit=50)
        entries += more
    while (found := read_stream(path, offset))[0]:
        entries, offset = entries + found[0], found[1]
    assert len(entries) == whole and not any(isinstance(entry, Damaged) for entry in entries)
    assert offset == text.rfind(b"\n") + 1
    assert [e.step for e in entries if isinstance(e, Step)] == list(range(1, 12))[: max(0, min(whole - 1, 11))]


@pytest.mark.parametrize("damage", [b"hello", b"", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"kind":"step","step":"x"}',
                                    b'{"kind":"later","x":1}', b'{"kind":"step","step":3,"readings":{"a":NaN}}'])  # fmt: skip
def test_a_damaged_line_costs_only_itself(tmp_path: Path, damage: bytes) -> None:
    write(tmp_path, range(1, 6))
    lines = (tmp_path / FILE).read_bytes().split(b"\n")
    begin = len(b"\n".join(lines[:3])) + 1
    lines[3] = damage
    (tmp_path / FILE).write_bytes(b"\n".join(lines))
    stream = load_stream(tmp_path)
    assert stream.series["train/loss"] == [(1, 1.0), (2, 0.5), (4, 0.25), (5, 0.2)] and stream.status == "done"
    assert [d.offset for d in stream.damaged] == [begin] and stream.damaged[0].reason.isprintable()


def test_the_first_line_lost_leaves_the_readings(tmp_path: Path) -> None:
    write(tmp_path, range(1, 3))
    text = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(b"x" + text[1:])
    assert load_stream(tmp_path).series == {"train/loss": [(1, 1.0), (2, 0.5)]}


def test_a_newer_stream_is_refused_with_the_version_it_needs(tmp_path: Path) -> None:
    head = {"schema": 2, "kind": "run", "id": 5, "environment": {"towtank": "7.1"}}
    for id in (5, "a"):  # with and without a change of the fields this version knows
        (tmp_path / FILE).write_text(json.dumps(head | {"id": id}) + "\n")
        with pytest.raises(NewerRecordError, match=r"format 2.*install towtank 7.1 or later"):
            load_stream(tmp_path)
        with pytest.raises(NewerRecordError):
            StreamWriter(tmp_path / FILE)
        assert json.loads((tmp_path / FILE).read_text())["schema"] == 2


@pytest.mark.parametrize("content, message", [(None, "stream.jsonl in it"), (b"", "empty file"), (b"\0\1x\n", "a stream of a run"),
                                              (b'{"schema":1,"kind":"ru', "empty file")])  # fmt: skip
def test_what_is_no_stream_is_said(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / FILE).write_bytes(content)
    with pytest.raises(FolderError, match=message):
        load_stream(tmp_path)
    with pytest.raises(FolderError, match="nothing there"):
        load_stream(tmp_path / "missing")


def test_the_same_run_goes_on_behind_its_torn_line(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    whole = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(whole + b'{"kind":"step","step":6,"rea')
    write(tmp_path, range(4, 9), losses={4: 40.0})
    assert (tmp_path / FILE).read_bytes().startswith(whole + b'{"schema"')
    stream = load_stream(tmp_path)
    assert stream.damaged == () and stream.step == 8 and stream.status == "done"
    assert stream.series["train/loss"][:4] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 40.0)]  # steps 4 and 5 came again
    assert [step for step, _ in stream.series["train/loss"]] == list(range(1, 9))
    assert stream.time_s == pytest.approx(0.4 + 0.4)


def test_what_was_undone_by_a_resumption_is_forgotten(tmp_path: Path) -> None:
    for steps in (range(1, 5), range(3, 5)):
        with StreamWriter(tmp_path / FILE) as writer:
            writer.note(0, "capture", f"from {steps[0]}")
            for step in steps:
                writer.step(step, 0.1, {"a": 1.0})
                writer.alarm(ALARM | {"step": step, "name": f"of {steps[0]}"})
    stream = load_stream(tmp_path)
    assert [(a.step, a.name) for a in stream.alarms] == [(1, "of 1"), (2, "of 1"), (3, "of 3"), (4, "of 3")]
    assert [n.text for n in stream.notes] == ["from 1", "from 3"]


def test_another_run_sets_the_file_aside(tmp_path: Path) -> None:
    for lr in (0.1, 0.2, 0.3, 0.2):
        write(tmp_path, range(1, 3), config={"lr": lr})
    assert load_stream(tmp_path).header.config == {"lr": 0.2}
    assert len(list(tmp_path.glob("stream-*.jsonl"))) == 3
    (tmp_path / FILE).write_bytes(b"my notes")  # not ours: kept
    write(tmp_path, range(1, 3))
    assert (tmp_path / "stream-damaged.jsonl").read_bytes() == b"my notes"
    (tmp_path / FILE).write_bytes(b'{"schema":1,"kind":"ru')  # killed in its first line
    write(tmp_path, range(1, 3))
    assert load_stream(tmp_path).step == 2


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = StreamWriter(tmp_path / FILE)
    with pytest.raises(FolderError, match=rf"lock file .*stream.jsonl.lock is held by process {os.getpid()} on host"):
        StreamWriter(tmp_path / FILE)
    first.step(1, 0.1, {"a": 1.0})
    first.close()
    first.close()
    with pytest.raises(ValueError, match="after close"):
        first.step(2, 0.2, {})
    StreamWriter(tmp_path / FILE).close("stopped")
    assert load_stream(tmp_path).status == "stopped"


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt(), "stopped"), (RuntimeError(), "failed")])
def test_how_the_loop_ended_is_written(tmp_path: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), StreamWriter(tmp_path / FILE):
        raise error
    assert load_stream(tmp_path).status == status


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\n"
        "from towtank.record.stream import StreamWriter\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "writer, errors = StreamWriter(sys.argv[1]), 0\n"
        "for step in range(1, 101):\n"
        "    try: writer.step(step, 0.1, {'a/b/c': 1 / step})\n"
        "    except OSError: errors += 1\n"
        "print(errors)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / FILE], capture_output=True, text=True, check=True)
    stream = load_stream(tmp_path)
    assert (tmp_path / FILE).read_bytes().endswith(b"}\n") and stream.damaged == ()
    assert len(stream.series["a/b/c"]) == 100 - int(done.stdout) > 5


WRITER = """
import sys
from towtank.record.stream import StreamWriter
writer = StreamWriter(sys.argv[1], config={"lr": 0.1})
print("ready", flush=True)
step, key = 0, "grad/rms/" + 200_000 * "x"
while True:
    step += 1
    writer.step(step, 0.01 * step, {"train/loss": float(step), key: 1.0})
"""


def test_killed_writers_leave_a_stream_that_reads_and_goes_on(tmp_path: Path) -> None:
    delays, seen = random.Random(0), 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path / FILE], stdout=subprocess.PIPE)
        assert process.stdout and process.stdout.readline() == b"ready\n"
        time.sleep(delays.uniform(0.02, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        stream = load_stream(tmp_path)
        assert stream.damaged == () and stream.status == "running" and stream.step > 0
        assert stream.series["train/loss"] == [(i, float(i)) for i in range(1, stream.step + 1)]
        seen += stream.step
    assert seen > 10
    assert record_of(stream).status == "failed" and "has not said that it ended" in record_of(stream).reason


def test_a_reader_follows_and_notices_another_file(tmp_path: Path) -> None:
    reader = StreamReader(tmp_path / FILE, points=100)
    writer = StreamWriter(tmp_path / FILE, config={"lr": 1})
    for step in range(1, 1001):
        writer.step(step, 0.1 * step, {"a": float(step == 437)})
        if step % 100 == 0:
            stream = reader.read()
            assert stream.step == step and stream.series["a"][-1][0] == step and len(stream.series["a"]) <= 200
    assert (437, 1.0) in stream.series["a"] and stream.recent[-1] == (1000, pytest.approx(100.0))
    writer.close()
    write(tmp_path, range(1, 3), config={"lr": 2})
    assert reader.read().series == {"train/loss": [(1, 1.0), (2, 0.5)]}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(), min_size=1, max_size=300), st.integers(4, 60))
def test_thinning_keeps_ends_extremes_and_order(values: list[float], limit: int) -> None:
    curve = list(enumerate(values))
    kept = thin(curve, limit)
    assert len(kept) <= limit and kept[0] is curve[0] and kept[-1] is curve[-1]
    assert [i for i, _ in kept] == sorted({i for i, _ in kept}) and all(
        curve[i] is point for i, point in [(p[0], p) for p in kept]
    )
    finite = [v for v in values if math.isfinite(v)]
    if finite:
        assert max(v for _, v in kept if math.isfinite(v)) == max(finite)
    if len(finite) < len(values):
        assert any(not math.isfinite(v) for _, v in kept)
    else:
        assert min(v for _, v in kept) == min(finite)


def test_the_record_of_a_run_is_found_by_load_records(tmp_path: Path) -> None:
    losses = {step: 5.0 / step for step in range(1, 5001)}
    with StreamWriter(
        tmp_path / FILE, config={"lr": 0.5, "clip": math.inf}, environment={"torch": "2"}, parameters=9
    ) as w:
        for step, loss in losses.items():
            w.step(
                step,
                0.1 * step,
                {"train/loss": loss, "grad/norm": math.inf if step == 4000 else 100.0 * (step == 3000)},
            )
    saved = save_record(tmp_path)
    (record,), problems = load_records(tmp_path)
    assert problems == [] and record.id == saved.id == load_stream(tmp_path).header.id
    assert record.config == {"lr": 0.5, "clip": math.inf} and record.status == "done" and record.steps == 5000
    assert record.loss.initial == 5.0 and record.loss.final == 0.001 and 500 < len(record.loss.curve) <= 1000
    assert all(value == losses[step] for step, value in record.loss.curve)
    signal = record.signals["grad/norm"]
    assert (
        len(signal) <= 200 and (3000, 100.0) in signal and (4000, None) in signal and "train/loss" not in record.signals
    )
    assert (
        record.parameters == 9
        and record.time_s == pytest.approx(500.0)
        and "not held out" in str(record.environment["loss"])
    )


@pytest.mark.parametrize("status, known", [("diverged", "diverged"), ("stopped", "failed"), ("failed", "failed")])
def test_a_run_that_did_not_finish_has_no_final_loss(tmp_path: Path, status, known: str) -> None:
    writer = StreamWriter(tmp_path / FILE, id="../../etc/x")
    writer.step(1, 0.1, {"train/loss": 2.0})
    writer.step(2, 0.2, {"train/loss": math.nan})
    writer.alarm(ALARM | {"severity": "critical", "message": "loss is NaN"})
    writer.close(status)
    record = save_record(tmp_path)
    assert record.status == known and record.loss.final is None and record.loss.curve == [(1, 2.0), (2, None)]
    assert record.reason == f"{status} at step 2; epsilon at step 2: loss is NaN"
    assert [path.name for path in (tmp_path / "records").iterdir()] == [f"{record.id}.json"]  # no way out of the folder


def test_reading_a_stream_needs_no_torch() -> None:
    code = "import sys, towtank.record.stream; assert not {'torch', 'numpy', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
