"""The command line. Nothing heavy is imported before a command needs it."""

from towtank.cli.main import app, main

__all__ = ["app", "main"]
