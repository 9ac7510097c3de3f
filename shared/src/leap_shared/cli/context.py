"""What a running verb may ask for: its device, its folder, progress bars and log lines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from leap_shared.files import ensure_folder

if TYPE_CHECKING:
    import torch

__all__ = ["CONFIG", "Context", "Progress"]

Item = TypeVar("Item")
PLAIN_INTERVAL_SECONDS = 5.0
CONFIG = "config.yaml"


class Progress(Generic[Item]):
    """One task's progress: iterate over it, or call `advance`; a bar on a terminal, else a plain line now and then.

    The first and the last state are always written.
    """

    def __init__(self, context: Context, iterable: Iterable[Item] | None, description: str, total: int | None) -> None:
        self._context = context
        self._iterable = iterable
        self._description = description
        self._total = total
        self._count = 0
        self._text = ""
        self._start = self._written = time.monotonic()
        self._ended = False
        self._task: TaskID | None = None
        if context.console.is_terminal:
            self._task = context.bars.add_task(description, total=total, text="")
        else:
            self._write_line()

    def __iter__(self) -> Iterator[Item]:
        if self._iterable is None:
            raise TypeError("this progress was made without an iterable: call advance(n) on it instead")
        for item in self._iterable:
            yield item
            self.advance()
        self.end()

    def advance(self, n: int = 1, *, text: str | None = None) -> None:
        """Count `n` more steps as done; `text` is shown beside them until the next one is given."""
        self._count += n
        self._text = self._text if text is None else text
        over = self._total is not None and self._count >= self._total
        if self._task is not None:
            self._context.bars.update(self._task, advance=n, text=self._text)
        elif not over and time.monotonic() - self._written >= PLAIN_INTERVAL_SECONDS:
            self._write_line()
        if over:
            self.end()

    def end(self) -> None:
        """Write the last state; further calls do nothing."""
        if self._ended:
            return
        self._ended = True
        if self._task is None:
            self._write_line()
        else:
            self._context.bars.update(self._task, total=self._total or self._count)
            self._context.bars.stop_task(self._task)

    def _write_line(self) -> None:
        self._written = time.monotonic()
        total = "" if self._total is None else f"/{self._total}"
        seconds = self._written - self._start
        left = ""
        if self._total and 0 < self._count < self._total:
            left = f", about {seconds / self._count * (self._total - self._count):.0f} s left"
        text = f" {self._text}" if self._text else ""
        self._context.log(f"{self._description}: {self._count}{total}{text} ({seconds:.0f} s{left})")


class Context:
    """Given to a verb's `run`; everything is made when it is first asked for.

    Under ``torchrun`` only the process of rank 0 writes to the terminal.
    """

    def __init__(self, device: str, seed: int, out: Path, on_out: Callable[[Path], None]) -> None:
        self._device = device
        self._out = out
        self._on_out = on_out
        self._tasks: list[Progress[Any]] = []
        self.seed = seed
        self.is_main = os.environ.get("RANK", "0") == "0"
        self.console = Console(stderr=True, quiet=not self.is_main)

    @cached_property
    def device(self) -> torch.device:
        """The device asked for; UserError where it does not exist."""
        from leap_shared.devices import resolve_device

        return resolve_device(self._device)

    @cached_property
    def out(self) -> Path:
        """The output folder, which exists from now on and holds the `config.yaml` of this run."""
        self._is_new = not self._out.exists()
        ensure_folder(self._out)
        if self.is_main:
            self._on_out(self._out)
        return self._out

    @cached_property
    def bars(self) -> Bars:
        """The live display that all progress of this run shares."""
        name, text = (TextColumn(f"{{task.{field}}}", markup=False) for field in ("description", "fields[text]"))
        columns = (name, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), text)
        bars = Bars(*columns, console=self.console, redirect_stdout=sys.stdout.isatty())
        bars.start()
        return bars

    def progress(
        self, iterable: Iterable[Item] | None = None, *, description: str, total: int | None = None
    ) -> Progress[Item]:
        """Progress over an iterable, or a handle to `advance`; `total` is taken from the iterable where it has one."""
        if total is None and hasattr(iterable, "__len__"):
            total = len(cast("Sized", iterable))
        task = Progress(self, iterable, description, total)
        self._tasks.append(task)
        return task

    def log(self, text: str) -> None:
        """Write one line to stderr, above the bars."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def discard(self) -> None:
        """Remove the output folder of a refused run where this run made it and wrote nothing but its config."""
        if "out" in vars(self) and self._is_new and self.is_main and [p.name for p in self.out.iterdir()] == [CONFIG]:
            (self.out / CONFIG).unlink()
            self.out.rmdir()

    def close(self) -> None:
        """End whatever progress is still shown."""
        if "bars" in self.__dict__:
            self.bars.stop()
        else:
            for task in self._tasks:
                task.end()
