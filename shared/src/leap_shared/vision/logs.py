"""What a run measured: a line of JSON per row, the same rows as CSV, and TensorBoard."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leap_shared import files
from leap_shared.errors import UserError

__all__ = ["MetricLog"]

Row = dict[str, int | float | str]


class MetricLog:
    """Rows of one run in `folder`/metrics.jsonl, metrics.csv and tensorboard/; each has at least `step` and `phase`.

    The run goes on after `step`: rows of later ones, from a run that was killed, are dropped.

    Raises:
        UserError: the disk is full or the folder not writable (by every method).
    """

    def __init__(self, folder: Path, step: int = 0, *, tensorboard: bool = True) -> None:
        self.folder, self.path = folder, folder / "metrics.jsonl"
        kept = [row for row in self._read() if step and int(row["step"]) <= step]
        files.write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        with _refused(folder / "tensorboard"):
            self._events = _Events(folder / "tensorboard", step) if tensorboard else None

    def write(self, row: Row) -> None:
        """Add a row."""
        with _refused(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        if self._events is not None:
            prefix = "/".join(str(row[key]) for key in ("phase", "weights") if key in row)
            with _refused(self.folder / "tensorboard"):
                for name, value in row.items():
                    if isinstance(value, float):
                        self._events.add(f"{prefix}/{name}", value, int(row["step"]))

    def close(self) -> None:
        """Write metrics.csv."""
        rows = self._read()
        table = io.StringIO()
        writer = csv.DictWriter(table, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        files.write_text(self.folder / "metrics.csv", table.getvalue())
        if self._events is not None:
            with _refused(self.folder / "tensorboard"):
                self._events.close()

    def _read(self) -> list[Row]:
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else ():
            with contextlib.suppress(json.JSONDecodeError):  # the line that a killed run was writing
                rows.append(json.loads(line))
        return rows


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Turn what the disk says into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot write {path}: {reason}. Free some space or mend the permissions, then start the run again: "
            "it goes on from its last checkpoint"
        ) from error


class _Events:
    """TensorBoard's file of one process, written at once: its own writer's thread dies of a full disk with a traceback.

    From `step` on, what earlier files hold is to be passed over.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise UserError(
                'TensorBoard is missing: pip install "leap-shared[vision]" or set tensorboard=False'
            ) from error
        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}").open("xb", buffering=0)
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if step:
            self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, name: str, value: float, step: int) -> None:
        """Add a number to the curve `name`."""
        self._write(step=step, summary=self._summary(value=[self._summary.Value(tag=name, simple_value=value)]))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
