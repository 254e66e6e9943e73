"""The two ways a study fails before it answers: it was asked wrongly, or its folder does not serve."""

from __future__ import annotations

import json
from collections.abc import Iterable
from difflib import get_close_matches

MISSING = object()


class ConfigError(ValueError):
    """A study that cannot be run as written; the text is one line.

    Args:
        key: dotted name of the key, `grid.lr`.
        expected: what is allowed there.
        value: what was found; left out when there is none to show.
        nearest: the known key that was probably meant.
        where: file, or file and line.

    Example:
        >>> print(ConfigError("grid.lr", "a positive number", value=-1))
        grid.lr = -1: expected a positive number
    """

    def __init__(
        self, key: str, expected: str, *, value: object = MISSING, nearest: str | None = None, where: str = ""
    ) -> None:
        self.key, self.expected, self.value, self.nearest, self.where = key, expected, value, nearest, where
        super().__init__(self._line())

    def _line(self) -> str:
        where = f"{self.where}: " if self.where else ""
        shown = "" if self.value is MISSING else f" = {show(self.value)}"
        hint = f"; did you mean {self.nearest}?" if self.nearest else ""
        return plain(f"{where}{self.key}{shown}: expected {self.expected}{hint}")

    def at(self, where: str) -> ConfigError:
        """The same error, located."""
        return ConfigError(self.key, self.expected, value=self.value, nearest=self.nearest, where=where)

    def under(self, section: str) -> ConfigError:
        """The same error, its key below a section."""
        return ConfigError(
            f"{section}.{self.key}", self.expected, value=self.value, nearest=self.nearest, where=self.where
        )


class FolderError(RuntimeError):
    """A study folder that cannot be read, written or locked; the text says which file and what to do."""


class NewerRecordError(FolderError):
    """A record that a later version of towtank wrote."""


def show(value: object, limit: int = 60) -> str:
    """A value in one short line of printable ASCII.

    Example:
        >>> show([1, True, "a"])
        '[1, true, "a"]'
    """
    try:
        text = json.dumps(value, default=str)
    except (ValueError, RecursionError):
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def nearest(word: object, known: Iterable[str]) -> str | None:
    """The known word closest to `word`, if one is close.

    Example:
        >>> nearest("widht", ["width", "depth"])
        'width'
    """
    found = get_close_matches(str(word)[:200], list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def plain(text: str) -> str:
    r"""Text without what could steer a terminal: control, format and line-breaking characters become `?`.

    Example:
        >>> plain("a\x1b[31mb")
        'a?[31mb'
    """
    return "".join(c if c.isprintable() else "?" for c in text)
