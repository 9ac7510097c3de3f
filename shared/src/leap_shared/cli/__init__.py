"""Command lines from typed dataclasses: every package's verbs, their flags, their YAML and their exit codes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leap_shared.cli.app import App, Command
from leap_shared.cli.context import Context, Progress

if TYPE_CHECKING:
    import torch

__all__ = ["App", "Command", "Context", "Progress", "resolve_device"]


def resolve_device(text: str) -> torch.device:
    """See :func:`leap_shared.devices.resolve_device`; torch is imported by the first call."""
    from leap_shared import devices

    return devices.resolve_device(text)
