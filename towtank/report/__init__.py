"""The answer, and its three views: terminal, JSON and page."""
