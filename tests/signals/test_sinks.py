"""Sinks: TensorBoard read back with its own reader, other trackers by stubs that have the signatures of the real ones."""

from __future__ import annotations

import enum
import json
import math
import re
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from towtank.record.record import load_records
from towtank.record.stream import load_stream
from towtank.signals.alarm import Alarm
from towtank.signals.sinks import JSONL, MLflow, Sinks, TensorBoard, Trackio, WandB
from towtank.signals.sinks.mlflow import mlflow_key

ALARM = Alarm(name="attention logits", step=2, message="cross 1e4 at about step 9", source="Wortsman et al. 2023",
              suggestion="qk-norm", key="attention/max_logit", value=math.inf, limit=1e4, severity="critical")  # fmt: skip
READINGS = {"train/loss": 0.5, "grad/rms/h.0.attn.weight": math.nan, "update/ratio/a:0[1]": math.inf}


def play(sink: Any, status: Any = "done") -> None:
    """One short run."""
    for step in (1, 2):
        sink.write(step, 0.1 * step, READINGS | {"train/loss": 1.0 / step})
    sink.alarm(ALARM)
    sink.note(2, "noise scale", "one micro-batch")
    sink.close(status)


def test_the_run_folder(tmp_path: Path) -> None:
    sink = JSONL(tmp_path, config={"lr": 0.1})
    play(sink, "diverged")
    sink.close("diverged")
    stream = load_stream(tmp_path)
    assert stream.series["train/loss"] == [(1, 1.0), (2, 0.5)] and stream.status == "diverged"
    assert stream.alarms[0].suggestion == "qk-norm" and stream.alarms[0].nonfinite == {"value": "inf"}
    assert stream.notes[0].text == "one micro-batch"
    assert load_records(tmp_path)[0][0].reason.startswith("diverged at step 2; attention logits at step 2")


def test_tensorboard_reads_back_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator  # pyright: ignore[reportMissingImports]

    play(TensorBoard(tmp_path))
    found = EventAccumulator(str(tmp_path), {"tensors": 0, "scalars": 0})
    found.Reload()
    from tensorboard.util.tensor_util import make_ndarray  # pyright: ignore[reportMissingImports]

    read = {
        tag: [(e.step, make_ndarray(e.tensor_proto)) for e in found.Tensors(tag)] for tag in found.Tags()["tensors"]
    }
    assert [(step, float(value)) for step, value in read["train/loss"]] == [(1, 1.0), (2, 0.5)]
    assert math.isnan(float(read["grad/rms/h.0.attn.weight"][0][1]))
    assert float(read["update/ratio/a:0[1]"][0][1]) == math.inf
    texts = {tag: value[0][1].item() for tag, value in read.items() if "text_summary" in tag}
    alarm = next(text.decode() for tag, text in texts.items() if "alarm/attention logits" in tag)
    assert "qk-norm" in alarm and "critical" in alarm and any("note/noise scale" in tag for tag in texts)


class Writer:
    """The part of SummaryWriter's interface that is used."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def add_scalar(self, tag, scalar_value, global_step=None, walltime=None, new_style=False, double_precision=False):
        self.calls.append((tag, scalar_value, global_step))

    def add_text(self, tag, text_string, global_step=None, walltime=None):
        self.calls.append((tag, global_step))

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


def test_a_given_writer_stays_open() -> None:
    writer = Writer()
    play(TensorBoard(writer))
    assert ("train/loss", 0.5, 2) in writer.calls and ("alarm/attention logits", 2) in writer.calls
    assert writer.calls[-1] == "flush" and "close" not in writer.calls


class WandBRun:
    def __init__(self) -> None:
        self.rows, self.alerts, self.metrics, self.summary, self.code = [], [], {}, {}, None

    def define_metric(
        self, name, step_metric=None, step_sync=None, hidden=None, summary=None, goal=None, overwrite=None
    ):
        assert name not in self.metrics
        self.metrics[name] = step_metric

    def log(self, data, step=None, commit=None):
        self.rows.append((data, step))

    def alert(self, title, text, level=None, wait_duration=None):
        assert level in ("INFO", "WARN", "ERROR")
        self.alerts.append((title, text, level))

    def finish(self, exit_code=None):
        self.code = exit_code


def stub(monkeypatch: pytest.MonkeyPatch, name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    for key, value in content.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize("own", [False, True])
def test_wandb(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    run, asked = WandBRun(), []
    stub(monkeypatch, "wandb", init=lambda **options: asked.append(options) or run)
    play(WandB(project="p", mode="offline") if own else WandB(run), "diverged")
    assert asked == ([{"project": "p", "mode": "offline"}] if own else [])
    (first, step), (second, _) = run.rows
    assert step is None and first["train/loss"] == 1.0 and first["towtank/step"] == 1 and second["towtank/step"] == 2
    assert run.metrics == {"towtank/step": None, **dict.fromkeys(READINGS, "towtank/step")}
    assert run.alerts == [("attention logits at step 2", "cross 1e4 at about step 9. Suggestion: qk-norm. Source: Wortsman et al. 2023.", "ERROR")]  # fmt: skip
    assert run.summary == {"towtank/note/noise scale": "step 2: one micro-batch", "towtank/status": "diverged"}
    assert run.code == (1 if own else None)


class Client:
    """MlflowClient with MLflow's own checks of names."""

    def __init__(self, tracking_uri=None, registry_uri=None):
        self.metrics, self.tags, self.ended, self.waited, self.created = [], {}, None, 0, None

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name, artifact_location=None, tags=None):
        self.created = name
        return "7"

    def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
        assert experiment_id == "7"
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))

    def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
        assert run_id == "abc" and len(metrics) <= 1000 and synchronous is False
        assert all(accepted(key) for key, *_ in metrics)
        self.metrics += metrics
        return types.SimpleNamespace(wait=self.wait)

    def wait(self):
        self.waited += 1

    def set_tag(self, run_id, key, value, synchronous=None):
        assert accepted(key) and len(value) <= 5000
        self.tags[key] = value

    def set_terminated(self, run_id, status=None, end_time=None):
        self.ended = status


def accepted(key: str) -> bool:
    """The rule of mlflow.utils.validation, written from its messages."""
    import posixpath

    norm = posixpath.normpath(key)
    path = norm == key and norm != "." and not norm.startswith(("..", "/"))
    return bool(re.fullmatch(r"[/\w.\- ]*", key)) and path and len(key) <= 250


@settings(max_examples=60, deadline=None)
@given(st.text("ab./:-_ [é\n", max_size=300))
def test_every_key_becomes_one_that_mlflow_accepts(key: str) -> None:
    assert accepted(mlflow_key(key))
    if accepted(key) and not re.search(r"(^|/)\.", key):
        assert mlflow_key(key) == key


@pytest.mark.parametrize("run", [None, "abc", types.SimpleNamespace(info=types.SimpleNamespace(run_id="abc"))])
def test_mlflow(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    stub(monkeypatch, "mlflow", MlflowClient=Client)
    stub(monkeypatch, "mlflow.entities", Metric=lambda key, value, timestamp, step: (key, value, timestamp, step))
    sink = MLflow(run, tracking_uri="file:x", experiment="e")
    many = {f"grad/rms/{i}": 1.0 for i in range(1500)}
    for step in range(100, 140):
        sink.write(step, 0.1, many)
    assert len(sink.client.metrics) == 40 * 1500 and sink.client.waited == 40 * 2 - 64
    play(sink, "stopped")
    assert sink.client.waited == 40 * 2 + 2
    assert [(key, value, step) for key, value, _, step in sink.client.metrics][-3::2] == [
        ("train/loss", 0.5, 2), ("update/ratio/a_0_1_", math.inf, 2)]  # fmt: skip
    assert sink.client.tags["towtank.alarm.attention logits"].startswith("step 2: critical: cross 1e4")
    assert sink.client.tags["towtank.note.noise scale"] == "step 2: one micro-batch"
    assert sink.client.ended == ("KILLED" if run is None else None) and sink.client.created == (None if run else "e")


class TrackioRun:
    def __init__(self):
        self.rows, self.alerts, self.done = [], [], False

    def log(self, metrics: dict, step: int | None = None):
        self.rows.append((metrics, step))

    def alert(self, title, text=None, level=None, step=None, webhook_url=None):
        self.alerts.append((title, level.value, step))

    def finish(self):
        self.done = True


@pytest.mark.parametrize("own", [False, True])
def test_trackio(monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    run, asked = TrackioRun(), []
    level = enum.Enum("AlertLevel", {"INFO": "info", "WARN": "warn", "ERROR": "error"})
    stub(monkeypatch, "trackio", init=lambda **options: asked.append(options) or run, AlertLevel=level)
    play(Trackio(name="n") if own else Trackio(run))
    assert asked == ([{"project": "towtank", "name": "n"}] if own else [])
    assert [(row["train/loss"], step) for row, step in run.rows] == [(1.0, 1), (0.5, 2)]
    assert run.alerts == [("attention logits", "error", 2), ("note of noise scale", "info", 2)] and run.done is own


@pytest.mark.parametrize("make, extra", [(TensorBoard, "tensorboard"), (WandB, "wandb"), (MLflow, "mlflow"), (Trackio, "trackio")])  # fmt: skip
def test_a_missing_library_is_said_with_its_extra(monkeypatch: pytest.MonkeyPatch, make: Any, extra: str) -> None:
    for name in (extra, "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"expected the package {extra}, got.*install towtank\[{extra}\]"):
        make()


class Flaky:
    """Fails from one call to another."""

    def __init__(self, fails: range) -> None:
        self.fails, self.calls, self.took = fails, 0, []

    def _call(self, *said: Any) -> None:
        self.calls += 1
        if self.calls in self.fails:
            raise ConnectionError("tracker\nis down")
        self.took.append(said)

    def write(self, step, time_s, readings):
        self._call("write", step)

    def alarm(self, alarm):
        self._call("alarm", alarm.step)

    def note(self, step, probe, text):
        self._call("note", step, probe, text)

    def close(self, status):
        self._call("close", status)


def test_a_sink_that_fails_warns_once_and_the_others_go_on() -> None:
    good, bad = Flaky(range(0)), Flaky(range(3, 6))
    sinks = Sinks([bad, good])
    with pytest.warns(
        RuntimeWarning, match="Flaky failed at step 3: ConnectionError: tracker is down; training goes on"
    ) as warned:
        for step in range(1, 31):
            sinks.write(step, 0.1 * step, {"a": 1.0})
    assert len(warned) == 1
    assert [said[1] for said in good.took if said[0] == "write"] == list(range(1, 31))
    assert [said[2:] for said in good.took if said[0] == "note"] == [
        ("sinks", "Flaky failed at step 3: ConnectionError: tracker is down")
    ]
    # fails at 3, rests 1, fails at 5, rests 2, fails at 8, rests 4, is back at 13
    assert [said[1] for said in bad.took] == [1, 2, *range(13, 31)]
    sinks.close("done")
    assert good.took[-2:] == [
        ("note", 30, "sinks", "Flaky lost 10 calls; the first: step 3: ConnectionError: tracker is down"),
        ("close", "done"),
    ]
    assert bad.took[-1] == ("close", "done")


def test_alarms_reach_a_sink_that_is_being_left_alone() -> None:
    sink = Flaky(range(1, 6))
    sinks = Sinks([sink])
    with pytest.warns(RuntimeWarning):
        for step in range(1, 20):
            sinks.write(step, 0.1, {})
    before = sink.calls
    sinks.alarm(ALARM)
    assert sink.calls == before + 1


def test_all_sinks_may_fail_and_an_interruption_is_passed_on() -> None:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        sinks = Sinks([Flaky(range(1, 10_000)), Flaky(range(1, 10_000))])
        play(sinks)
    assert len(warned) == 2 and len(sinks) == 2 and all(isinstance(sink, Flaky) for sink in sinks)

    class Stopped(Flaky):
        def write(self, step, time_s, readings):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sinks([Stopped(range(0))]).write(1, 0.1, {})


def test_a_full_disk_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    sinks = Sinks([JSONL(tmp_path)])
    real, full = os.write, [False]

    def write(handle: int, text: bytes) -> int:
        return real(handle, text[:10]) if full[0] else real(handle, text)

    monkeypatch.setattr(os, "write", write)
    sinks.write(1, 0.1, {"a": 1.0})
    full[0] = True
    with pytest.warns(RuntimeWarning, match="JSONL failed at step 2: OSError.*No space left"):
        sinks.write(2, 0.2, {"a": 2.0})
    full[0] = False
    for step in range(3, 6):
        sinks.write(step, 0.1 * step, {"a": float(step)})
    sinks.close("done")
    stream = load_stream(tmp_path)
    assert stream.series["a"] == [(1, 1.0), (4, 4.0), (5, 5.0)] and stream.damaged == () and stream.status == "done"
    assert all(json.loads(line) for line in (tmp_path / "stream.jsonl").read_text().splitlines())
