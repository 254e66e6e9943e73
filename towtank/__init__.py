"""Know how a network will train before you pay for the big run."""

__version__ = "0.1.0"
