"""The command `leap-flatten`: verbs, no logic."""

from __future__ import annotations

from leap_shared.cli import App

app = App(name="leap-flatten", package="leap_flatten", commands=())


def main() -> None:
    """Entry point of the console script."""
    app.main()
