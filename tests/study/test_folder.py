"""A study's folder: its name, its lock, and refusals before any compute."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from towtank.record.errors import FolderError
from towtank.study.config import Study
from towtank.study.folder import StudyFolder, default_folder, safe_name
from towtank.study.load import load_study

STUDY = Study(name="x", task="light_task:bowl", grid={"width": [32], "lr": [0.1]})


@given(
    st.text(max_size=200)
    | st.sampled_from(["../../etc/x", "/etc/x", "a\0b", "CON", "nul.txt", "x.", "", "..", "\u202ex", "x" * 10_000])
)
def test_any_name_becomes_one_safe_part_of_a_path(name: str) -> None:
    safe = safe_name(name)
    assert safe and len(safe) <= 80 and safe.isascii() and safe[0] not in ".-" and safe[-1] not in ". "
    assert Path(safe).name == safe and safe.split(".")[0].lower() not in ("con", "nul", "prn", "aux", "com1", "lpt1")
    assert (Path("/root/out") / safe).resolve().parent == Path("/root/out")


def test_names_that_are_safe_stay_and_others_stay_apart() -> None:
    assert safe_name("lr-transfer_2.1") == "lr-transfer_2.1"
    assert len({safe_name(name) for name in ("a/b", "a b", "a\\b", "a-b", "a\x00b", "A/B")}) == 6


def test_a_link_in_place_of_the_default_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_folder(STUDY) == Path("runs/x")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x").symlink_to("/etc")
    with pytest.raises(FolderError, match="symbolic link"):
        default_folder(STUDY)


@pytest.mark.parametrize("where", ["/proc/towtank", "file/out", "file", "nul\0byte"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="give another --out") as caught:
        StudyFolder(tmp_path / where).create()
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()


def test_the_study_is_kept_beside_its_records(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    assert folder.study() is None
    assert folder.save_study(STUDY) is False
    assert folder.save_study(STUDY) is False
    assert load_study(tmp_path / "study.toml", check_task=False) == folder.study() == STUDY
    other = Study(name="x", task="light_task:bowl", grid={"width": [64], "lr": [0.1]})
    assert folder.save_study(other) is True and folder.study() == other


HOLDER = """
import sys, time
from towtank.study.folder import StudyFolder
from towtank.record.errors import FolderError
sys.stdin.readline()
time.sleep(float(sys.argv[2]))
folder = StudyFolder(sys.argv[1])
folder.create()
try:
    with folder.locked():
        print("held", flush=True)
        sys.stdin.readline()
except FolderError as error:
    print(error, flush=True)
"""


def start(folder: Path, delay: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLDER, str(folder), str(delay)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(*processes: subprocess.Popen[str]) -> list[str]:
    """Let the processes run, and read the line each prints."""
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.stdout.readline().strip() for process in processes if process.stdout]


def test_of_processes_that_start_together_one_holds_the_folder(tmp_path: Path) -> None:
    processes = [start(tmp_path, delay) for delay in (0.0, 0.0, 0.001, 0.003, 0.01, 0.03)]
    lines = go(*processes)
    assert lines.count("held") == 1
    for process in processes:
        process.communicate("\n")
    for line in lines:
        assert line == "held" or f"{tmp_path} is in use: lock file {tmp_path}/.lock is held by" in line


def test_the_second_is_told_who_and_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    holder = start(tmp_path)
    assert go(holder) == ["held"]
    [refusal] = go(start(tmp_path))
    assert f"lock file {tmp_path}/.lock is held by process {holder.pid} on host {os.uname().nodename}" in refusal
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    heir = start(tmp_path)
    assert go(heir) == ["held"]
    heir.communicate("\n")
    with StudyFolder(tmp_path).locked():
        assert time.time()
