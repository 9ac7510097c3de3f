"""The command `leap-efficienttrain`: verbs, no logic."""

from __future__ import annotations

from leap_efficienttrain.verbs import planning, results, training, weights
from leap_shared.cli import App

app = App(
    name="leap-efficienttrain",
    package="leap_efficienttrain",
    commands=(
        planning.List,
        planning.Plan,
        training.Train,
        training.Search,
        weights.Eval,
        weights.Convert,
        weights.Cache,
        planning.ExportLaunch,
        results.Bench,
        results.Demo,
    ),
)


def main() -> None:
    """Entry point of the console script."""
    app.main()
