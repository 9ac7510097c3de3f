"""The command `leap-slide`: verbs, no logic."""

from __future__ import annotations

from leap_shared.cli import App

app = App(name="leap-slide", package="leap_slide", commands=())


def main() -> None:
    """Entry point of the console script."""
    app.main()
