"""How numbers and names are written, the same in the terminal, on the page and in the figures."""

from __future__ import annotations

import html
import math
import re
import unicodedata
from collections.abc import Mapping

from towtank.estimate import Interval, Status

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-_])|\x9b[0-?]*[ -/]*[@-~]")
_SPACES = re.compile(r"\s+")
_ASCII = {"×": "x", "–": "-", "—": "-", "−": "-", "±": "+/-", "≤": "<=", "≥": ">=", "→": "->", "…": "...", "·": "-"}
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
VERDICT_WORDS: dict[Status, str] = {"ok": "holds up", "weak": "read with care", "refuse": "cannot tell"}


def clean(text: object, limit: int = 160) -> str:
    r"""Text of the user made fit for display: one line, no escape codes, no invisible or reordering characters.

    Args:
        text: anything; converted with `str`.
        limit: longest result in characters; what is longer ends in an ellipsis.

    Example:
        >>> clean("a\x1b[31mred\u202e\n b")
        'ared b'
    """
    raw = str(text)[: 20 * limit]
    flat = _SPACES.sub(" ", _ANSI.sub("", raw))
    kept = "".join(c for c in flat if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")).strip()
    return kept if len(kept) <= limit else kept[: limit - 1].rstrip() + "…"


def plotly_text(text: object, limit: int = 60) -> str:
    """Text for a title, legend or hover of plotly, which reads a subset of HTML: markup becomes inert.

    Example:
        >>> plotly_text("<b>a & b</b>")
        '&lt;b&gt;a &amp; b&lt;/b&gt;'
    """
    return html.escape(clean(text, limit), quote=False)


def encodable(text: str, encoding: str) -> str:
    """Text that can be written in `encoding`; common signs get their ASCII spelling, the rest a question mark.

    Example:
        >>> encodable("2 × 3 ± 1 ☃", "ascii")
        '2 x 3 +/- 1 ?'
    """
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        spelled = "".join(_ASCII.get(c, c) for c in text)
        return spelled.encode("ascii", "replace").decode("ascii")
    return text


def number(x: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits; thousands in full; a dash when there is none.

    Example:
        >>> number(0.0078125), number(234440.0), number(None)
        ('0.00781', '234,440', '-')
    """
    if x is None or math.isnan(x):
        return "-"
    if math.isinf(x) or abs(x) >= 1e7:
        return f"{x:.{digits}g}"
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.{digits}g}"


def size(x: float) -> str:
    """A size as people write it: 128, not 128.0.

    Example:
        >>> size(128.0), size(1.5)
        ('128', '1.5')
    """
    return str(int(x)) if math.isfinite(x) and float(x).is_integer() and abs(x) < 1e9 else f"{x:.4g}"


def interval(x: Interval | None, digits: int = 3) -> str:
    """A value with its interval; a dash when there is none.

    Example:
        >>> interval(Interval(0.00312, 0.0025, 0.004))
        '0.00312 [0.0025, 0.004]'
    """
    return "-" if x is None else f"{number(x.value, digits)} [{number(x.low, digits)}, {number(x.high, digits)}]"


def rate_label(lr: float) -> str:
    """A learning rate for an axis: a power of two as such, anything else as a decimal number.

    Example:
        >>> rate_label(2.0**-7), rate_label(0.003)
        ('2⁻⁷', '0.003')
    """
    exponent = math.log2(lr) if lr > 0 and math.isfinite(lr) else math.nan
    if math.isfinite(exponent) and abs(exponent - round(exponent)) < 1e-9:
        return "2" + str(round(exponent)).translate(_SUPERSCRIPT)
    return number(lr)


def decimal(x: float) -> str:
    """A round number for an axis: powers of ten as such where writing them out would be long.

    Example:
        >>> decimal(1e4), decimal(1e8), decimal(2e-7)
        ('10,000', '10⁸', '2×10⁻⁷')
    """
    exponent = math.floor(math.log10(x) + 1e-9)
    if -5 < exponent < 7:
        return number(x)
    times, power = number(x / 10.0**exponent), "10" + str(exponent).translate(_SUPERSCRIPT)
    return power if times == "1" else f"{times}×{power}"


def place(x: Mapping[str, float]) -> str:
    """A point by its variables.

    Example:
        >>> place({"N": 7e10, "D": 1.4e12})
        'N = 7e+10, D = 1.4e+12'
    """
    return ", ".join(f"{name} = {number(v)}" for name, v in x.items())


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use.

    Example:
        >>> duration(9.5), duration(312), duration(7500)
        ('9.5 s', '5 min 12 s', '2 h 05 min')
    """
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def percent(level: float) -> str:
    """A level of confidence: `0.95` is `95 %`."""
    return f"{100 * level:.3g} %"
