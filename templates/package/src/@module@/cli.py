"""The command `leap-@name@`: verbs, no logic."""

from __future__ import annotations

from leap_shared.cli import App

app = App(name="leap-@name@", package="@module@", commands=())


def main() -> None:
    """Entry point of the console script."""
    app.main()
