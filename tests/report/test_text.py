"""Names and numbers as they are shown."""

from __future__ import annotations

import pytest

from towtank.report import text


@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain", "plain"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07after", "after"),
        ("\x9b31mred", "red"),
        ("a\u202eb\u2066c\u200fd", "abcd"),
        ("one\ntwo\r\n\tthree", "one two three"),
        ("nul\x00bell\x07", "nulbell"),
        ("ship ⛵ \U0001f6a2", "ship ⛵ \U0001f6a2"),
        ("\ud800", ""),
    ],
)
def test_clean(raw, shown):
    assert text.clean(raw) == shown


def test_long_text_is_cut_with_a_mark():
    assert text.clean("x" * 10_000, 50) == "x" * 49 + "…"


@pytest.mark.parametrize("value", [0.0, -0.89, 1e-8, 234_440.0, 3.2e9, float("inf")])
def test_numbers_read_back(value):
    assert float(text.number(value).replace(",", "")) == pytest.approx(value, rel=5e-3)


def test_no_number_is_a_dash():
    assert text.number(None) == text.number(float("nan")) == text.interval(None) == "-"
