"""What goes to the standard output: JSON with a version, or text on a console."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

JSON_SCHEMA = 1


def print_json(command: str, **content: Any) -> None:
    """Print one JSON object: `schema`, `command` and the content; NaN and infinity are null."""
    import msgspec

    text = msgspec.json.encode({"schema": JSON_SCHEMA, "command": command, **content}, enc_hook=str)
    try:
        sys.stdout.write(text.decode() + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        drop_output()


def drop_output() -> None:
    """Lead the standard output, which nobody reads any more, to nowhere; the command goes on, and its exit code counts."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console() -> Console:
    """A console on the standard output that honours NO_COLOR, TERM=dumb and the width of the terminal."""
    from rich.console import Console

    class Patient(Console):
        """Rich's own would exit with 1 when its reader has had enough."""

        def on_broken_pipe(self) -> None:
            drop_output()

    return Patient(file=sys.stdout, markup=False, highlight=False, emoji=False)


def say(text: str) -> None:
    """One line on the error stream, without control characters."""
    from towtank.record.errors import plain

    print(plain(text), file=sys.stderr, flush=True)
