"""`towtank watch`: what it shows of a run, in any terminal, and how it ends."""

from __future__ import annotations

import io
import json
import math
import os
import pty
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from rich.cells import cell_len

from towtank.cli.main import run
from towtank.cli.watch_rows import change, rows, sparkline
from towtank.record.stream import FILE, StreamWriter, load_stream

BARS = "▁▂▃▄▅▆▇█"
ALARM = {"step": 20, "name": "attention logits", "message": "attention logits cross 1e4 at about step 145", "source": "W",
         "suggestion": "normalize queries and keys", "severity": "warning", "key": "attention/max_logit", "value": 3.0,
         "limit": 1e4, "lead": [145.0, 130.0, 150.0]}  # fmt: skip


def write(folder: Path, *, status: str | None = "done", steps: int = 30, hostile: str = "") -> StreamWriter:
    writer = StreamWriter(folder / FILE, config={"lr": 0.1}, environment={"towtank": "0.1"})
    writer.note(0, "capture", f"fused attention cannot be seen{hostile}")
    for step in range(1, steps + 1):
        tensors = {f"update/ratio/transformer.h.{i}.attn.c_proj.weight{hostile}": 1e-3 * i for i in range(12)}
        noise = {"noise/scale": 100.0 + step, "noise/scale_low": 80.0, "noise/scale_high": 160.0}
        own = {
            "train/loss": 5.0 / step,
            "grad/norm": 1.0 if step < steps else math.inf,
            "stability/sharpness_ratio": step / 20,
        }
        writer.step(step, 0.5 * step, own | noise | tensors | {"attention/entropy/a": 2.0, "attention/entropy/b": 0.1})
    writer.alarm(ALARM)
    writer.alarm(
        ALARM | {"step": steps, "name": "overflow", "severity": "critical", "key": "grad/norm", "suggestion": "scale"}
    )
    if status:
        writer.close(status)  # pyright: ignore[reportArgumentType]
    return writer


def watch(*arguments: object, width: int = 100, monkeypatch: pytest.MonkeyPatch | None = None) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setenv("COLUMNS", str(width))
        code = run(["watch", *map(str, arguments)])
    return code, out.getvalue(), err.getvalue()


def test_what_is_shown(tmp_path: Path) -> None:
    write(tmp_path)
    code, out, err = watch(tmp_path)
    assert (code, err) == (0, "") and "ended: done, step 30, 15 s" in out
    lines = out.splitlines()
    loss = next(line for line in lines if " train/loss " in line)
    assert loss.split()[1:3] == [
        "0.1667",
        f"{(1 / 28 + 1 / 29 + 1 / 30) / (1 / 25 + 1 / 26 + 1 / 27) - 1:+.1%}",
    ] and loss.startswith(" ")
    ratio = next(line for line in lines if "stability/sharpness_ratio" in line)
    assert ratio.startswith("!") and "1.5" in ratio and "< 1 " in ratio and ratio.endswith("█")
    assert "130 [80, 160]" in out and "noise/scale_low" not in out
    assert next(line for line in lines if "grad/norm" in line).startswith("!grad/norm") and "inf" in out
    at = lines.index(" update/ratio/transformer.h.* (worst 3 of 12)")
    assert [line.split()[0] for line in lines[at + 1 : at + 4]] == [f"{i}.attn.c_proj.weight" for i in (11, 10, 9)]
    entropy = [line.split()[0] for line in lines if line.endswith("▄") and line.strip()[0] in "ab"]
    assert entropy == ["b", "a"]  # of entropies the lowest is the worst
    alarms = lines.index("Alarms (2), newest first")
    assert lines[alarms + 1].startswith("!! step 30 overflow: ") and lines[alarms + 2] == "   scale"
    assert lines[alarms + 3].startswith("! step 20 attention logits: ") and "normalize queries" in lines[alarms + 4]
    assert "step 0 capture: fused attention cannot be seen" in lines
    assert watch(tmp_path, "--all")[1].count("attn.c_proj.weight") == 12


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_every_line_fits(tmp_path: Path, width: int) -> None:
    write(tmp_path)
    code, out, _ = watch(tmp_path, width=width)
    assert code == 0 and max(map(cell_len, out.splitlines())) <= max(width, 34)
    assert all(part in out for part in ("train/loss", "0.1667"))


def test_text_of_the_file_steers_nothing(tmp_path: Path) -> None:
    write(tmp_path, hostile="\x1b[31m\x07\u202e<b>[red]\n\x9b2J")
    for arguments in ((), ("--all",), ("--follow",)):
        _, out, err = watch(tmp_path, *arguments)
        assert all(c.isprintable() or c == "\n" for c in out + err) and "[red]" in out


def test_ascii_where_the_terminal_cannot_write_more(tmp_path: Path) -> None:
    write(tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "TERM"} | {
        "PYTHONIOENCODING": "ascii",
        "COLUMNS": "80",
        "LANG": "C",
    }
    code = "import sys\nfrom towtank.cli.main import run\ncode = run(sys.argv[1:])\nassert not {'torch', 'scipy', 'numpy', 'plotly'} & set(sys.modules)\nsys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code, "watch", tmp_path], env=env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and b"train/loss" in done.stdout and b"\x1b" not in done.stdout


def test_json(tmp_path: Path) -> None:
    write(tmp_path, status="failed")
    code, out, err = watch(tmp_path, "--json")
    said = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert code == said["exit_code"] == 3 and err == "" and said["schema"] == 1 and said["command"] == "watch"
    assert said["status"] == "failed" and said["step"] == 30 and said["steps_per_s"] == pytest.approx(2.0)
    readings = {reading["key"]: reading for reading in said["readings"]}
    assert readings["grad/norm"]["value"] is None and readings["grad/norm"]["nonfinite"] == "inf"
    assert readings["noise/scale"]["low"] == 80.0 and readings["stability/sharpness_ratio"]["over"] is True
    assert [alarm["name"] for alarm in said["alarms"]] == ["attention logits", "overflow"]
    assert said["notes"][0]["probe"] == "capture" and said["config"] == {"lr": 0.1}


@pytest.mark.parametrize("make, words", [
    (lambda folder: folder.rmdir(), "nothing there"),
    (lambda folder: None, "stream.jsonl in it"),
    (lambda folder: (folder / "records").mkdir(), "towtank report"),
    (lambda folder: (folder / FILE).write_bytes(b""), "the run has not begun"),
    (lambda folder: (folder / FILE).write_bytes(b"hello\n"), "expected a stream of a run"),
    (lambda folder: (folder / FILE).write_text('{"schema":9,"kind":"run","environment":{"towtank":"8"}}\n'), "install towtank 8 or later"),
])  # fmt: skip
@pytest.mark.parametrize("arguments", [(), ("--json",), ("--follow",)])
def test_what_cannot_be_watched_is_said(tmp_path: Path, make, words: str, arguments: tuple[str, ...]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    make(folder)
    code, out, err = watch(folder, *arguments)
    assert code == 4 and out == "" and words in err and err.count("\n") == 1


def test_a_wrong_option_is_usage(tmp_path: Path) -> None:
    assert watch(tmp_path, "--every", "-1")[0] == 2


def test_a_crashed_run_is_not_running(tmp_path: Path) -> None:
    code = f"import os; from pathlib import Path; from tests.test_cli_watch import write; w = write(Path({str(tmp_path)!r}), status=None); os._exit(9)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False)
    for arguments in ((), ("--follow",)):  # following ends, too
        code, out, _ = watch(tmp_path, *arguments)
        assert code == 3 and "process" in out and "is gone" in out and "running, " not in out


def test_silence_is_said(tmp_path: Path) -> None:
    writer = write(tmp_path, status=None)  # this process: alive
    assert "running, step 30, 15 s, 2 steps/s, last line 0 s ago" in watch(tmp_path)[1]
    past = time.time() - 35
    os.utime(tmp_path / FILE, (past, past))
    assert "no line for 35 s: stuck, killed, or in a slow step; step 30" in watch(tmp_path)[1]
    writer.close()


def test_following_without_a_terminal_prints_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "towtank.cli", "watch", tmp_path, "--follow", "--every", "0.05"]
    writer = StreamWriter(tmp_path / FILE)
    writer.step(1, 0.1, {"train/loss": 2.0})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline().startswith("running, step 1, 0 s, last line")
    writer.alarm(ALARM)
    assert process.stdout.readline().startswith("alarm: step 20 attention logits: ")
    writer.close("diverged")
    rest, _ = process.communicate(timeout=20)
    assert rest == "ended: diverged, step 1, 0 s, train/loss 2\n" and process.returncode == 0


def test_on_a_terminal_it_follows_and_ctrl_c_leaves_the_last_picture(tmp_path: Path) -> None:
    writer = write(tmp_path, status=None)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": "80", "LINES": "30"}
        os.execv(sys.executable, [sys.executable, "-m", "towtank.cli", "watch", str(tmp_path), "--every", "0.1"])
    seen = _read_until(terminal, b"train/loss")
    assert b"\x1b[?1049h" in seen  # a screen of its own
    writer.step(31, 15.5, {"train/loss": 0.1})
    _read_until(terminal, b"running, step 31")
    os.kill(pid, signal.SIGINT)
    rest = _read_until(terminal, b"fused attention", after=b"\x1b[?1049l")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert b"train/loss" in rest.partition(b"\x1b[?1049l")[2] and b"Traceback" not in rest
    writer.close()


def _read_until(terminal: int, wanted: bytes, after: bytes = b"") -> bytes:
    seen, deadline = b"", time.monotonic() + 60
    while wanted not in seen.partition(after)[2] if after else wanted not in seen:
        assert time.monotonic() < deadline, seen[-2000:]
        seen += os.read(terminal, 65536)
    return seen


def test_sparklines() -> None:
    assert sparkline([(i, float(i)) for i in range(8)], 8, BARS + "×") == BARS
    assert sparkline([(i, 10.0**i) for i in range(8)], 8, BARS + "×") == BARS  # logarithmic beyond two decades
    assert sparkline([(i, 3.0 + 1e-16 * i) for i in range(8)], 4, BARS + "×") == "▄▄▄▄"
    assert sparkline([(0, 1.0), (1, math.nan), (2, 2.0)], 3, BARS + "×") == "▁×█"
    assert sparkline([(0, 1.0), (9, 2.0)], 10, BARS + "×") == "▁" * 9 + "█"  # over steps, not over readings
    assert sparkline([(5, math.inf)], 3, BARS + "×") == "×××" and sparkline([], 3, BARS + "×") == ""


def test_change_is_none_where_there_is_nothing_to_tell() -> None:
    assert change([(1, 1.0)]) is None and change([(1, 0.0), (2, 1.0)]) is None and change([(1, -1.0), (2, 1.0)]) is None
    assert change([(1, -2.0), (2, -1.0)]) == 0.5 and change([(1, 1.0), (2, math.nan)]) is None


def test_limits_of_alarms_are_shown_and_fade(tmp_path: Path) -> None:
    with StreamWriter(tmp_path / FILE) as writer:
        writer.step(1, 0.1, {"my/reading": 3.0})
        writer.alarm(ALARM | {"step": 1, "key": "my/reading", "limit": 2.5})
        (row,) = rows(load_stream(tmp_path))
        assert row.limit == 2.5 and row.over and row.alarmed == "warning"
        writer.step(200, 0.1, {"my/reading": 1.0})
        (row,) = rows(load_stream(tmp_path))
        assert row.limit == 2.5 and not row.over and row.alarmed == ""
