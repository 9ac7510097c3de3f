"""What a call allocates: PyTorch's own account of it, tensor by tensor."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.profiler import profile  # the newer one of torch.profiler imports the compiler first

__all__ = ["peak_allocation"]


def peak_allocation(function: Callable[[], tuple[Tensor, ...]], device: torch.device) -> int:
    """Bytes that PyTorch's allocator hands out for a call at its peak, but for those of its results.

    The call runs in a fresh thread, so that buffers which operators keep for their thread count too. What libraries
    below PyTorch take from the system for themselves does not.

    Args:
        function: what is called, once; it returns its results.
        device: whose memory is meant.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_peak, function, device).result()


def _peak(function: Callable[[], tuple[Tensor, ...]], device: torch.device) -> int:
    with tempfile.TemporaryDirectory() as folder, _quiet():
        with profile(profile_memory=True) as profiler:
            results = function()
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        told = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    kind = 1 if device.type == "cuda" else 0  # of c10::DeviceType
    events = [event["args"] for event in sorted(told, key=lambda event: float(event["ts"]))]
    events = [event for event in events if event["Device Type"] == kind]
    last = {event["Addr"]: number for number, event in enumerate(events) if event["Bytes"] > 0}
    left_out = {last.get(x.untyped_storage().data_ptr()) for x in results}
    total = peak = 0
    for number, event in enumerate(events):
        total += 0 if number in left_out else event["Bytes"]
        peak = max(peak, total)
    return peak


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the terminal what the profiler's library tells there of its own course."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
