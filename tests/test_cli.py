"""The command line as a user meets it: exit codes, one-line errors, interruption, and what goes to which stream."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import towtank.study.dry_run  # noqa: F401  (patched by name below)
from towtank.cli.main import run
from towtank.study.grid import Describer

LIGHT = Path(__file__).parent / "study" / "light_cli.py"
STUDY = """\
name = "mine"
question = "Which learning rate?"
task = "light_task:bowl"
[grid]
width = [32, 64, 128]
lr = {log2 = [-13, -4]}
seed = [0, 1]
"""
VERIFY = "[verify]\nwidth = 256\n"


def start(*arguments: str, cwd: Path, program: str = str(LIGHT), **environment: str) -> subprocess.Popen[str]:
    plain = {key: value for key, value in os.environ.items() if key not in ("TERM", "NO_COLOR", "COLUMNS")}
    path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    env = plain | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    command = [sys.executable, *([program] if program else ["-m", "towtank.cli"]), *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)


def shell(*arguments: str, cwd: Path, **environment: str) -> tuple[int, str, str]:
    """Exit code and streams of a process of its own."""
    process = start(*arguments, cwd=cwd, **environment)
    out, err = process.communicate(timeout=120)
    assert "Traceback" not in err, err
    return process.returncode, out, err


def towtank(*arguments: str, cwd: Path) -> tuple[int, str, str]:
    """The same within this process, with the light task's training: its imports are paid once."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["towtank", *arguments])
        patch.setattr(sys, "path", [*sys.path, str(LIGHT.parent)])
        patch.setattr("towtank.study.run._train_cells", lambda: light_task().work)
        patch.setattr("towtank.study.run.describer", lambda describe: Describer(light_task().describe))
        patch.setattr("towtank.study.dry_run.describer", lambda describe: Describer(light_task().describe))
        patch.setattr("towtank.study.dry_run.measured_rate", lambda *_, **__: 1e10)
        code = run(list(arguments))
    return code, out.getvalue(), err.getvalue()


def light_task() -> Any:
    return importlib.import_module("light_task")


def write_study(folder: Path, text: str = STUDY, name: str = "mine.toml") -> str:
    (folder / name).write_text(text)
    return name


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `runs/mine` is swept and verified."""
    folder = tmp_path_factory.mktemp("swept")
    code, out, err = towtank("sweep", write_study(folder, STUDY + VERIFY), "--workers", "1", "--json", cwd=folder)
    assert code == 0, err
    (folder / "out.json").write_text(out)
    (folder / "err.txt").write_text(err)
    return folder


@pytest.fixture
def copy(swept: Path, tmp_path: Path) -> Path:
    subprocess.run(["cp", "-r", f"{swept}/.", tmp_path], check=True)
    return tmp_path


def test_help_is_fast_and_says_the_exit_codes(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code, out, _ = shell("--help", cwd=tmp_path, program="")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert code == 0 and "130 interrupted" in out
    assert all(f"\n  {command} " in out for command in ("studies", "sweep", "predict", "report"))
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_version_and_built_in_studies(tmp_path: Path) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", towtank("--version", cwd=tmp_path)[1])
    code, out, _ = towtank("studies", cwd=tmp_path)
    names = ["attention-logits", "lr-transfer", "optimizers-digits", "optimizers"]
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == names
    listed = json.loads(towtank("studies", "--json", cwd=tmp_path)[1])
    assert listed["schema"] == 1 and set(listed["studies"]) == set(names)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["swep"], "Did you mean 'sweep'?"),
        (["sweep"], "Missing argument 'STUDY'"),
        (["sweep", "mine.toml", "--wrokers", "2"], "--workers"),
        (["sweep", "mine.toml", "--workers", "0"], "--workers"),
        (["sweep", "mine.toml", "--memory", "4 apples"], '--memory = "4 apples": expected a size such as 4GB'),
        (["sweep", "mine.toml", "--device", "gpu"], '--device = "gpu": expected cpu, cuda'),
        (["sweep", "lr-transfr"], "did you mean lr-transfer?"),
        (["sweep", "bad.toml"], "bad.toml:5: grid.widht: expected a keyword of the task or a training setting; did you mean width?"),
        (["sweep", "odd.toml"], "width = 33: expected a multiple of 2"),
        (["sweep", "bomb.toml"], "TOML: expected a plain study"),
        (["predict", "runs/mine"], "expected exactly one of --width, --depth, --size"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_2(swept: Path, arguments: list[str], expected: str) -> None:
    write_study(swept, STUDY.replace("width", "widht", 1) + "[fixed]\nwidth = 32\n", "bad.toml")
    write_study(swept, STUDY.replace("32", "33"), "odd.toml")
    write_study(swept, "x = " + "[" * 90_000, "bomb.toml")
    code, out, err = towtank(*arguments, cwd=swept)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and expected in err
    assert [path.name for path in (swept / "runs").iterdir()] == ["mine"]


def test_a_sweep_answers_writes_its_page_and_prints_only_json(swept: Path) -> None:
    said = json.loads((swept / "out.json").read_text())
    assert said["schema"] == 1 and said["exit_code"] == 0 and said["ran"] == 60 + 3
    assert said["answer"]["verdict"]["status"] in ("ok", "weak") and said["answer"]["arms"][0]["verification"]["held"]
    assert (swept / "runs" / "mine" / "report.html").read_text().startswith("<!")
    err = (swept / "err.txt").read_text()
    assert "grid: 60/60 runs" in err and "verify: 3/3 runs" in err and "\x1b" not in err


def test_the_same_command_again_trains_nothing(copy: Path) -> None:
    code, out, _ = towtank("sweep", "mine.toml", "--workers", "1", "--json", cwd=copy)
    first, again = json.loads((copy / "out.json").read_text()), json.loads(out)
    assert code == 0 and again["ran"] == 0 and again["answer"] == first["answer"]


def test_report_is_rebuilt_from_the_records_alone(copy: Path) -> None:
    page = copy / "runs" / "mine" / "report.html"
    page.unlink()
    for file in (copy / "mine.toml", copy / "runs" / "mine" / ".lock"):
        file.unlink()
    code, out, err = towtank("report", "runs/mine", cwd=copy)
    assert code == 0 and page.exists() and "Which learning rate?" in out and "report: runs/mine/report.html" in err


def test_predict(swept: Path) -> None:
    code, out, _ = towtank("predict", "runs/mine", "--width", "512", "--json", cwd=swept)
    said = json.loads(out)
    [prediction] = said["predictions"]
    assert code == 0 and said["size_axis"] == "width" and prediction["size"] == 512
    assert prediction["lr"]["low"] <= 0.1 / 512 <= prediction["lr"]["high"]
    code, text, _ = towtank("predict", "runs/mine", "--size", "512", cwd=swept)
    assert code == 0 and "512" in text
    code, _, err = towtank("predict", "runs/mine", "--width", "-1", cwd=swept)
    assert code == 2 and "expected a positive number" in err


@pytest.mark.parametrize("broken", [False, True])
def test_without_a_study_the_size_key_is_found_from_the_records(tmp_path: Path, broken: bool) -> None:
    study = write_study(
        tmp_path, 'size = "depth"\n' + STUDY.replace("width = [32, 64, 128]", "depth = [2, 4]\nwidth = [32]")
    )
    towtank("sweep", study, "--workers", "1", cwd=tmp_path)
    kept = tmp_path / "runs" / "mine" / "study.toml"
    kept.write_text("name = [") if broken else kept.unlink()
    code, out, err = towtank("report", "runs/mine", "--json", cwd=tmp_path)
    said = json.loads(out)["answer"]
    assert code in (0, 1) and said["size_axis"] == "depth"
    assert ("study.toml" in err) == broken == any("study.toml" in warning for warning in said["warnings"])
    code, out, err = towtank("predict", "runs/mine", "--size", "8", "--json", cwd=tmp_path)
    assert code in (0, 1) and json.loads(out)["size_axis"] == "depth" and ("study.toml" in err) == broken


def test_a_task_beside_its_study_is_found(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "task_beside.py").write_text("from light_task import bowl\n")
    study = write_study(tmp_path, STUDY.replace("light_task:", "task_beside:"), "far/mine.toml")
    code, _, err = towtank("sweep", study, "--workers", "1", cwd=tmp_path)
    assert code in (0, 1) and "runs" in err and "imports" not in err


def test_dry_run_trains_and_writes_nothing(swept: Path, tmp_path: Path) -> None:
    study = write_study(tmp_path, STUDY + "[fixed]\ntrace = 'trace'\n[refine]\nseeds = [2]\n" + VERIFY)
    code, out, _ = towtank("sweep", study, "--dry-run", "--json", "--workers", "2", cwd=tmp_path)
    said = json.loads(out)
    rows = [(row["stage"], row["size"], row["runs"], row["done"]) for row in said["plan"]["rows"]]
    grid = [("grid", float(w), 20, 0) for w in (32, 64, 128)]
    assert code == 0 and rows == [*grid, *(("refine", float(w), 3, 0) for w in (32, 64, 128)), ("verify", 256.0, 3, 0)]
    assert said["plan"]["time_s"] > 0 and [path.name for path in tmp_path.iterdir()] == ["mine.toml"]
    code, text, _ = towtank("sweep", "mine.toml", "--dry-run", cwd=swept)
    assert code == 0 and "63 of 63 runs are done in runs/mine" in text
    assert "widened by up to 2 learning rates for each arm" in " ".join(text.split())


def test_seeds(tmp_path: Path) -> None:
    code, out, _ = towtank("sweep", write_study(tmp_path), "--seeds", "3", "--dry-run", "--json", cwd=tmp_path)
    assert code == 0 and json.loads(out)["runs"] == 90


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_an_interrupted_sweep_says_how_to_go_on(tmp_path: Path, number: int, expected: int, workers: str) -> None:
    study = write_study(tmp_path, STUDY + "[fixed]\nsleep = 0.5\n")
    process = start("sweep", study, "--workers", workers, "--json", cwd=tmp_path)
    records = tmp_path / "runs" / "mine" / "records"
    wait_for(lambda: len(list(records.glob("*.json"))) > 0)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    saved = len(list(records.glob("*.json")))
    assert process.returncode == expected and out == "" and "Traceback" not in err
    assert f"interrupted; {saved} runs are saved. To go on: towtank sweep mine.toml --workers {workers} --json" in err
    assert 0 < saved < 60
    code, out, _ = towtank("sweep", study, "--workers", workers, "--json", cwd=tmp_path)
    assert code in (0, 1) and json.loads(out)["ran"] == 60 - saved


def test_a_second_interrupt_ends_at_once_and_the_folder_stays_valid(tmp_path: Path) -> None:
    study = write_study(tmp_path, STUDY + "[fixed]\nsleep = 60.0\ntrace = 'trace'\n")
    process = start("sweep", study, "--workers", "2", cwd=tmp_path)
    wait_for(lambda: (tmp_path / "trace").exists())
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - began < 10
    assert list((tmp_path / "runs" / "mine" / "records").iterdir()) == []
    write_study(tmp_path, STUDY)
    assert towtank("sweep", study, "--workers", "1", cwd=tmp_path)[0] in (0, 1)


def test_a_second_process_is_refused_by_name(tmp_path: Path) -> None:
    study = write_study(tmp_path, STUDY + "[fixed]\nsleep = 60.0\ntrace = 'trace'\n")
    first = start("sweep", study, "--workers", "1", cwd=tmp_path)
    wait_for(lambda: (tmp_path / "trace").exists())
    code, out, err = towtank("sweep", study, cwd=tmp_path)
    assert (code, out) == (4, "") and len(err.splitlines()) == 1
    assert f"lock file runs/mine/.lock is held by process {first.pid} on host {os.uname().nodename}" in err
    first.kill()
    first.communicate()
    write_study(tmp_path, STUDY)
    assert towtank("sweep", study, "--workers", "1", cwd=tmp_path)[0] in (0, 1)


def test_a_folder_that_cannot_be_written_exits_4_before_any_compute(tmp_path: Path) -> None:
    study = write_study(tmp_path, STUDY + "[fixed]\ntrace = 'trace'\n")
    for out in ("/proc/towtank", "mine.toml/out"):
        code, said, err = towtank("sweep", study, "--out", out, cwd=tmp_path)
        assert (code, said) == (4, "") and "expected a folder that can be written" in err
    assert not (tmp_path / "trace").exists()


def test_a_damaged_record_is_named_and_the_rest_used(copy: Path) -> None:
    records = sorted((copy / "runs" / "mine" / "records").glob("*.json"))
    records[0].write_text("hello")
    for command in (["report", "runs/mine"], ["predict", "runs/mine", "--width", "512"]):
        code, out, err = towtank(*command, cwd=copy)
        assert code == 4 and out and f"record is damaged: runs/mine/records/{records[0].name}: not JSON" in err
    code, _, err = towtank("sweep", "mine.toml", "--workers", "1", cwd=copy)
    assert code == 4 and "its run is run again" in err
    assert towtank("sweep", "mine.toml", "--workers", "1", cwd=copy)[0] == 0


def test_a_newer_record_is_refused(copy: Path) -> None:
    record = sorted((copy / "runs" / "mine" / "records").glob("*.json"))[0]
    record.write_text(record.read_text().replace('"schema": 1', '"schema": 2'))
    for command in (["report", "runs/mine"], ["sweep", "mine.toml"]):
        code, out, err = towtank(*command, cwd=copy)
        assert (code, out) == (4, "") and "has format 2, this towtank reads up to 1: install towtank" in err


@pytest.mark.parametrize("where", ["nowhere", "."])
def test_a_folder_without_records_exits_4(tmp_path: Path, where: str) -> None:
    code, out, err = towtank("report", where, cwd=tmp_path)
    assert (code, out) == (4, "") and "`towtank sweep` makes one" in err


def test_failed_runs_exit_3(tmp_path: Path) -> None:
    study = write_study(tmp_path, STUDY + 'fault = ["", "raise"]\n')
    code, _, err = towtank("sweep", study, "--workers", "1", cwd=tmp_path)
    assert code == 3 and "runs failed: RuntimeError: the task is broken" in err


@pytest.mark.parametrize("lr", ["[0.6, 0.7, 0.8]", "[0.1]", "[0.1, 0.2, 0.4]"], ids=["all diverge", "one rate", "edge"])
def test_no_answer_is_said_and_exits_1(tmp_path: Path, lr: str) -> None:
    study = write_study(tmp_path, STUDY.replace("{log2 = [-13, -4]}", lr) + VERIFY)
    code, out, _ = towtank("sweep", study, "--workers", "1", "--json", cwd=tmp_path)
    answer = json.loads(out)["answer"]
    assert code == 1 and answer["verdict"]["status"] == "refuse" and answer["verdict"]["reason"]
    assert [arm["prediction"]["lr"] for arm in answer["arms"]] == [None]
    if lr == "[0.1, 0.2, 0.4]":
        assert "bracket" in json.dumps(answer)
    code, out, _ = towtank("predict", "runs/mine", "--width", "256", "--json", cwd=tmp_path)
    assert code == 1 and json.loads(out)["predictions"][0]["lr"] is None


def test_a_closed_standard_output_is_no_error(swept: Path) -> None:
    for command in (["report", "runs/mine"], ["report", "runs/mine", "--json"]):
        process = start(*command, cwd=swept)
        assert process.stdout and process.stderr
        process.stdout.close()
        assert "Traceback" not in (err := process.stderr.read()) and "BrokenPipe" not in err
        assert process.wait() == 0


@pytest.mark.parametrize("command", ["studies", "studies --json", "report runs/mine", "--version"])
def test_a_standard_output_closed_from_the_start_is_no_error(swept: Path, command: str) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])}
    line = f"{shlex.quote(sys.executable)} -m towtank.cli {command} >&-"
    ended = subprocess.run(line, shell=True, cwd=swept, env=env, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 0 and "Error" not in ended.stderr


@pytest.mark.parametrize("command", [["report", "runs/mine"], ["sweep", "mine.toml", "--dry-run"], ["--help"]])
def test_a_poor_terminal_gets_readable_ascii(swept: Path, command: list[str]) -> None:
    poor = {
        "TERM": "dumb",
        "NO_COLOR": "1",
        "COLUMNS": "40",
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
    }
    code, out, err = shell(*command, cwd=swept, **poor)
    assert code == 0 and out.isascii() and err.isascii() and "\x1b" not in out + err


def test_names_steer_no_terminal_and_lead_nowhere(tmp_path: Path) -> None:
    evil = "../../etc/\\u001b[31m<script>alert(1)</script>\\u202e"
    text = (
        STUDY.replace("mine", evil).replace("rate?", "\\u001b]0;x\\u0007\\u202erate?") + 'kind = ["\\u001b[2J", "b"]\n'
    )
    study = write_study(tmp_path, text)
    before = set(tmp_path.parent.iterdir())
    code, out, err = towtank("sweep", study, "--workers", "1", cwd=tmp_path)
    assert code in (0, 1) and not set("\x1b\x07\u202e") & set(out + err)
    [folder] = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"etc-[\w-]+", folder.name) and set(tmp_path.parent.iterdir()) == before
    assert "<script>alert(1)" not in (folder / "report.html").read_text()


OFFLINE = """
import runpy, socket, sys
def refuse(*arguments, **more): raise OSError("network used")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.argv[0] = {light!r}
sys.path.insert(0, {folder!r})
runpy.run_path({light!r}, run_name="__main__")
"""


def test_everything_works_offline(tmp_path: Path) -> None:
    script = tmp_path / "offline.py"
    script.write_text(OFFLINE.format(light=str(LIGHT), folder=str(LIGHT.parent)))
    study = write_study(tmp_path)
    code, _, err = shell("sweep", study, "--workers", "1", cwd=tmp_path, program=str(script))
    assert code in (0, 1) and "network used" not in err


def test_a_real_model_end_to_end(tmp_path: Path) -> None:
    text = 'name = "tiny"\n[grid]\nwidth = [32]\nlr = [0.01, 0.03]\n[fixed]\nsteps = 3\ncontext = 16\nheldout_batches = 1\n'
    study = write_study(tmp_path, text)
    code, out, err = shell("sweep", study, "--workers", "2", "--json", cwd=tmp_path, program="")
    said = json.loads(out)
    assert code == 1 and said["ran"] == 2 and said["answer"]["verdict"]["status"] == "refuse", err
    losses = [rate["loss"] for rate in said["answer"]["arms"][0]["sizes"][0]["rates"]]
    assert len(losses) == 2 and all(2 < loss < 7 for loss in losses)


def wait_for(condition, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.05)
