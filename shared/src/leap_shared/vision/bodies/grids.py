"""Tokens as maps: windows, tables with one row per place, and their resampling to other sizes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from leap_shared.errors import UserError

__all__ = ["Map", "Number", "Size", "Tokens", "check_reduction", "merge", "pad_map", "partition", "replace_data"]
__all__ += ["resample_grid", "to_image", "to_map", "to_tokens"]

Size = tuple[int, int]
Number = int | float  # beartype takes `float` at its word
Tokens = Float[Tensor, "batch tokens channels"]
Map = Shaped[Tensor, "batch height width *rest"]


def check_reduction(hw: Size, ratio: int) -> None:
    """Raise UserError where a spatial reduction by `ratio` does not divide a map of `hw` tokens."""
    if ratio < 1 or hw[0] % ratio or hw[1] % ratio:
        raise UserError(f"a map of {hw[0]}x{hw[1]} tokens is not divisible by the spatial reduction ratio {ratio}")


def to_image(tokens: Tokens, hw: Size) -> Float[Tensor, "batch channels height width"]:
    """Tokens as an image, in channels-last memory."""
    return to_map(tokens, hw).permute(0, 3, 1, 2)


def to_tokens(image: Float[Tensor, "batch channels height width"]) -> Tokens:
    """Inverse of `to_image`."""
    return image.flatten(2).transpose(1, 2)


def to_map(tokens: Tokens, hw: Size) -> Float[Tensor, "batch height width channels"]:
    """Tokens as a map with channels last."""
    return tokens.reshape(tokens.shape[0], *hw, tokens.shape[2])


def pad_map(image: Map, padded: Size) -> Shaped[Tensor, "batch new_height new_width *rest"]:
    """Zero-pad a map (batch, height, width, channels) on the right and at the bottom."""
    right, bottom = padded[1] - image.shape[2], padded[0] - image.shape[1]
    return F.pad(image, (0, 0, 0, right, 0, bottom)) if right or bottom else image


def partition(image: Map, window: Size) -> Shaped[Tensor, "windows tokens *rest"]:
    """Cut a map into windows: row-major tokens inside a window, windows row by row, images outermost."""
    images, height, width, *rest = image.shape
    down, across = height // window[0], width // window[1]
    cut = image.reshape(images, down, window[0], across, window[1], *rest)
    return cut.transpose(2, 3).reshape(images * down * across, window[0] * window[1], *rest)


def merge(windows: Shaped[Tensor, "windows tokens *rest"], window: Size, hw: Size) -> Map:
    """Inverse of `partition`, for maps of size `hw`."""
    rest, down, across = windows.shape[2:], hw[0] // window[0], hw[1] // window[1]
    images = windows.shape[0] // (down * across)
    return windows.reshape(images, down, across, *window, *rest).transpose(2, 3).reshape(images, *hw, *rest)


def resample_grid(
    table: Float[Tensor, "one old_tokens channels"], old: Size, new: Size, mode: str = "bicubic"
) -> Float[Tensor, "one new_tokens channels"]:
    """Resample a table (1, height * width, channels) to another grid: align_corners False, no antialias, in float32."""
    if old == new:
        return table
    return to_tokens(F.interpolate(to_image(table.float(), old), new, mode=mode, align_corners=False)).to(table.dtype)


def replace_data(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter other values, of another shape perhaps, in place: optimisers go on holding the same object."""
    if values is parameter:
        return
    parameter.grad = None
    # A loss that is still referred to keeps the parameter's gradient accumulator, which expects the old shape: torch
    # makes a new one where the type changes, not where the shape does.
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = values.detach().contiguous()
