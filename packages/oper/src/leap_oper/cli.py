"""The command `leap-oper`: verbs, no logic."""

from __future__ import annotations

from leap_oper.verbs import data, results, training
from leap_shared.cli import App

app = App(
    name="leap-oper",
    package="leap_oper",
    commands=(
        data.Convert,
        data.Inspect,
        data.Generate,
        data.GenerateMaze,
        data.WeightsR,
        data.WeightsA,
        *training.TRAIN,
        training.Eval,
        training.Sweep,
        results.Report,
        results.Bench,
        results.Demo,
    ),
)


def main() -> None:
    """Entry point of the console script."""
    app.main()
