"""The command `leap-slide`: verbs, no logic."""

from __future__ import annotations

from leap_shared.cli import App
from leap_slide.verbs import bench, models, pictures, results, training

app = App(
    name="leap-slide",
    package="leap_slide",
    commands=(
        models.List,
        models.Info,
        training.Eval,
        training.Train,
        models.Reparam,
        models.Convert,
        pictures.Export,
        pictures.Visualize,
        bench.Bench,
        results.Experiment,
        results.Demo,
    ),
)


def main() -> None:
    """Entry point of the console script."""
    app.main()
