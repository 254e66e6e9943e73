"""Progress is a bar where it can be redrawn and plain lines elsewhere, and never lies about what is done."""

from __future__ import annotations

import io

import pytest

from towtank.study import progress as module
from towtank.study.progress import Progress, duration, is_live


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_say_what_is_done_and_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    with Progress(stream, live=False) as shown:
        cost = [5.0]  # made by an earlier stage
        shown.start("grid", 8, 80.0, lambda: cost[0])
        clock[0] += 10
        assert shown.text() == "grid: 0/8 runs"
        cost[0] += 20
        assert shown.text() == "grid: 0/8 runs, about 30 s left"
        shown.done(4, 40.0)
        assert shown.text() == "grid: 4/8 runs, 0.4 runs/s, about 10 s left"
        cost[0] += 1000  # a job that was tried again counts twice
        assert "left" in shown.text()
        shown.note("a\x1b[31mb")
        shown.done(4, 40.0)
    assert stream.getvalue().splitlines() == ["grid: 8 runs to do", "a?[31mb", "grid: 8/8 runs, 0.8 runs/s, 10 s"]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    with Progress(stream) as shown:
        shown.start("grid", 2, 2.0, lambda: 0.0)
        shown.note("look [bold]here")
        shown.done(2, 2.0)
    assert (
        "\x1b[" in stream.getvalue()
        and "grid: 2/2 runs" in stream.getvalue()
        and "look [bold]here" in stream.getvalue()
    )


@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"TERM": ""}, {"TERM": "xterm", "NO_COLOR": "1"}])
def test_no_bar_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert not is_live(Terminal()) and not is_live(io.StringIO())


def test_durations() -> None:
    assert [duration(s) for s in (0.4, 59.4, 60, 3599, 7260)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "59 min 59 s",
        "2 h 1 min",
    ]
