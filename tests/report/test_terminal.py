"""The answer in a terminal: complete, inert, and readable where only ASCII and 40 columns are left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tests.report import sample
from towtank.report import terminal

NASTY = "[red]mark[/red] \x1b[31mred\x1b[0m \u202eback :ship: <b>"


def shown(answer, *, width=80, encoding="utf-8", color=None):
    """What a console of this width and encoding receives."""
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True)
    console = Console(file=out, width=width, force_terminal=color is not None, color_system=color)
    terminal.show_answer(answer, console)
    return raw.getvalue().decode(encoding)


def test_everything_is_told_in_80_columns():
    said = shown(sample.answer())
    for part in (
        "OK: At width 256",
        "0.00662 [0.00568, 0.00787]",
        "-0.89 [-1.02, -0.75]",
        "0.00362",
        "1.15",
        "held",
        "105 done",
    ):
        assert part in said
    assert max(map(len, said.splitlines())) <= 80


def test_40_columns_of_ascii():
    said = shown(sample.hostile("größe ☃ \U0001f6a2"), width=40, encoding="ascii")
    assert max(map(len, said.splitlines())) <= 40
    assert "gr??e" in said


def test_only_ascii_is_added_to_the_text_of_the_user():
    assert shown(sample.answer()).isascii()


def test_names_are_inert():
    said = shown(sample.hostile(NASTY), width=200)
    assert "[red]mark[/red] red back :ship: <b>" in said
    assert "\x1b" not in said and "\u202e" not in said


def test_no_escape_codes_when_asked(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    raw = io.StringIO()
    terminal.show_answer(sample.answer(), Console(file=raw, width=80, force_terminal=True))
    assert "\x1b[3" not in raw.getvalue()


@pytest.mark.parametrize("answer", [sample.refused(), sample.empty()])
def test_refusal_says_why(answer):
    said = " ".join(shown(answer).split())
    assert said.count("REFUSE: Cannot tell") == 1
    assert answer.verdict.reason in said


def test_predictions_alone():
    raw = io.StringIO()
    made = [arm.prediction for arm in sample.answer().arms if arm.prediction]
    terminal.show_predictions(made, Console(file=raw, width=90))
    assert "0.0171 [0.0136, 0.0213]" in raw.getvalue()
