"""The command `leap-flatten`: verbs, no logic."""

from __future__ import annotations

from leap_flatten.verbs import bench, models, pictures, results, training
from leap_shared.cli import App

app = App(
    name="leap-flatten",
    package="leap_flatten",
    commands=(
        models.List,
        models.Info,
        training.Eval,
        training.Train,
        models.Convert,
        pictures.Visualize,
        bench.Bench,
        results.Experiment,
        results.Demo,
    ),
)


def main() -> None:
    """Entry point of the console script."""
    app.main()
