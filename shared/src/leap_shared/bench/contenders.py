"""What can be timed: a callable of this process, or one that lives in a child and is asked in its turn."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["Child", "Local", "Remote"]


@dataclasses.dataclass(frozen=True)
class Remote:
    """A contender that cannot live in this process: a child runs it and is asked in its turn.

    Attributes:
        factory: "module:function"; called with `options` in the child, it returns the callable to time.
        options: keyword arguments of the factory.
    """

    factory: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Local:
    """A callable without arguments in this process, timed by CUDA events on CUDA devices, else by `timer` (seconds)."""

    def __init__(
        self, function: Callable[[], object], device: str, timer: Callable[[], float] = time.perf_counter
    ) -> None:
        self.function = function
        self.device = torch.device(device)
        self.timer = timer

    def time(self, iterations: int) -> float:
        """Seconds per call over `iterations` calls, without garbage collection, as `timeit` does it."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            if self.device.type == "cuda":
                return self._cuda_seconds(iterations) / iterations
            start = self.timer()
            for _ in range(iterations):
                self.function()
            return (self.timer() - start) / iterations
        finally:
            if collecting:
                gc.enable()

    def _cuda_seconds(self, iterations: int) -> float:
        with torch.cuda.device(self.device):
            event: Callable[..., Any] = torch.cuda.Event
            start, end = event(enable_timing=True), event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(iterations):
                self.function()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def facts(self) -> dict[str, float | None]:
        """Of one call: the memory that it adds at its peak (10^6 bytes) and the operations that torch counts (10^9).

        On CUDA the memory is what PyTorch's allocator hands out; on Linux CPUs the growth of the resident set, with
        what is not PyTorch's; elsewhere None. Operators without a FLOP formula count nothing, as what refuses to be
        looked into.
        """
        gc.collect()
        memory = self._cuda_peak() if self.device.type == "cuda" else self._cpu_peak()
        try:
            with FlopCounterMode(display=False) as counter:
                self.function()
            flop = counter.get_total_flops()
        except RuntimeError:  # what compiles parts of itself cannot be looked into
            flop = 0
        return {"peak_memory_mb": None if memory is None else memory / 1e6, "gflop": flop / 1e9 if flop else None}

    def _cuda_peak(self) -> int:
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.function()
        return int(torch.cuda.max_memory_allocated(self.device) - before)

    def _cpu_peak(self) -> int | None:
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # forgets the former peak
        except (OSError, AttributeError, TypeError):  # not Linux, or its C library keeps freed memory
            return None
        before = _peak_resident_bytes()
        self.function()
        return _peak_resident_bytes() - before


def _peak_resident_bytes() -> int:
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


@dataclasses.dataclass(frozen=True)
class Child:
    """A remote contender's process, with the methods of `Local`."""

    pool: ProcessPoolExecutor
    factory: str

    def time(self, iterations: int) -> float:
        """As `Local.time`."""
        return float(self._ask(_time, iterations))

    def facts(self) -> dict[str, float | None]:
        """As `Local.facts`."""
        return dict(self._ask(_facts))

    def _ask(self, function: Callable[..., Any], *args: object) -> Any:
        try:
            return self.pool.submit(function, *args).result()
        except BrokenProcessPool as error:
            raise RuntimeError(f"the process of {self.factory} ended while it was measured") from error

    @classmethod
    @contextmanager
    def started(cls, remote: Remote, device: str, threads: int) -> Iterator[Child]:
        """A fresh process that has built its callable."""
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            child = cls(pool, remote.factory)
            child._ask(_build, remote.factory, dict(remote.options), device, threads)
            yield child


_built: list[Local] = []  # in a child: its one contender


def _build(factory: str, options: dict[str, Any], device: str, threads: int) -> None:
    os.dup2(2, 1)  # what a peer prints must not join the results on stdout
    torch.set_num_threads(threads)
    module, _, name = factory.partition(":")
    _built.append(Local(getattr(importlib.import_module(module), name)(**options), device))


def _time(iterations: int) -> float:
    return _built[0].time(iterations)


def _facts() -> dict[str, float | None]:
    return _built[0].facts()
