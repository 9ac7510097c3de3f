"""What a run measured: a line of JSON per row, the same rows as CSV, and TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from pathlib import Path
from typing import Any

from leap_shared import files
from leap_shared.errors import UserError

__all__ = ["MetricLog"]

Row = dict[str, int | float | str]


class MetricLog:
    """Rows of one run in `folder`/metrics.jsonl, metrics.csv and tensorboard/; each has at least `step` and `phase`.

    The run goes on after `step`: rows of later ones, from a run that was killed, are dropped.
    """

    def __init__(self, folder: Path, step: int = 0, *, tensorboard: bool = True) -> None:
        self.folder, self.path = folder, folder / "metrics.jsonl"
        kept = [row for row in self._read() if step and int(row["step"]) <= step]
        files.write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self._events = _event_writer(folder / "tensorboard", step) if tensorboard else None

    def write(self, row: Row) -> None:
        """Add a row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._events is not None:
            prefix = "/".join(str(row[key]) for key in ("phase", "weights") if key in row)
            for name, value in row.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{prefix}/{name}", value, int(row["step"]))

    def close(self) -> None:
        """Write metrics.csv."""
        rows = self._read()
        table = io.StringIO()
        writer = csv.DictWriter(table, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        files.write_text(self.folder / "metrics.csv", table.getvalue())
        if self._events is not None:
            self._events.close()

    def _read(self) -> list[Row]:
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else ():
            with contextlib.suppress(json.JSONDecodeError):  # the line that a killed run was writing
                rows.append(json.loads(line))
        return rows


def _event_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError('TensorBoard is missing: pip install "leap-shared[vision]" or set tensorboard=False') from error
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
