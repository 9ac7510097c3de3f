"""The device that a text names, checked against the devices that exist here."""

from __future__ import annotations

import torch

from leap_shared.errors import UserError

__all__ = ["available_devices", "resolve_device"]


def available_devices() -> list[str]:
    """Names of the devices of this machine, best first."""
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return [*names, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]


def resolve_device(text: str) -> torch.device:
    """Device for ``auto`` (CUDA where there is one, else CPU), ``cpu``, ``cuda``, ``cuda:1`` or ``mps``.

    Raises:
        UserError: the text names no device, or one that this machine does not have.
    """
    known = available_devices()
    has_cuda = known[0] == "cuda:0"
    if text == "auto":
        return torch.device("cuda" if has_cuda else "cpu")
    if text in known or (text == "cuda" and has_cuda):
        return torch.device(text)
    raise UserError(f"device {text!r} is not available: use auto or one of {', '.join(known)}")
