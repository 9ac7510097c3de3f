"""Weights from files of any origin, and runs that resume to the same bits."""

from __future__ import annotations

from leap_shared.checkpoints.reading import Report, load_into, read, rename, unwrap, write_safetensors
from leap_shared.checkpoints.running import CheckpointFolder, check_finite

__all__ = [
    "CheckpointFolder",
    "Report",
    "check_finite",
    "load_into",
    "read",
    "rename",
    "unwrap",
    "write_safetensors",
]
