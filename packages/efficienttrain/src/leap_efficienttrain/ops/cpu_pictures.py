"""Lanczos on a CPU by float32 sums that are exact, and pictures of bytes prepared for a model without another pass.

A weight of 22 bits is split into a high and a low part, such that every sum of either's products with bytes stays a
whole number below 2**24. Only the few weights that are not zero are multiplied, in rows that hold one column of the
picture, then one line.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leap_efficienttrain.ops.cpu import NUMBERS, cropped, few, form, parts
from leap_efficienttrain.ops.folding import Bags
from leap_efficienttrain.ops.weights import LANCZOS_BITS, lanczos_sizes, lanczos_table

__all__ = ["MOST_TAPS", "Plan", "lanczos", "plan_of", "prepare", "taps"]

PIXELS = 2**16  # of the pictures that come at once, for each thread
MOST_TAPS = 512  # more, and no split keeps both sums below 2**24


def taps(length: int, size: int) -> int:
    """The most weights that an output has, or more."""
    return 6 * max(-(-length // size), 1) + 2


class _Pass:
    """The pass over one axis.

    Args:
        length, size: of the axis.
        sources: of every place of the axis, the rows of a matrix that hold it; (length, others).
        targets: the same for the output, (size, others).
    """

    def __init__(self, length: int, size: int, sources: NDArray[np.int64], targets: NDArray[np.int64]) -> None:
        table = lanczos_table(length, size)
        out, place = np.nonzero(table)
        weights = table[out, place][:, None]
        low_bits = min(11, 16 - int(np.ceil(np.log2((table != 0).sum(1).max()))))
        self.unit = 2.0 ** (low_bits - LANCZOS_BITS)
        self.count = targets.size
        high, low = (weights >> low_bits) * self.unit, (weights & (2**low_bits - 1)) * 2.0**-low_bits
        entries = [(targets[out], sources[place], high), (targets[out] + self.count, sources[place], low)]
        self.bags = Bags(entries, 2 * self.count)

    def __call__(self, x: Tensor) -> Tensor:
        """Whole numbers from 0 to 255 in float32."""
        found = self.bags(x)
        high, low = found[: self.count], found[self.count :]
        return high.add_(low.floor_(), alpha=self.unit).add_(0.5).floor_().clamp_(0.0, 255.0)


class Plan:
    """Both passes for some pictures.

    Args:
        given: height, width and channels of the input.
        height, width: of the output.
        pictures: how many come at once.
        planar: whether the output has its channels first.
    """

    def __init__(self, given: tuple[int, int, int], height: int, width: int, pictures: int, planar: bool) -> None:
        rows, columns, channels = given
        channel = np.arange(channels)
        last, first = (np.arange(width)[:, None] * channels + channel, np.arange(width)[:, None] + channel * width)
        self.across = _Pass(columns, width, np.arange(columns)[:, None] * channels + channel, first if planar else last)
        others = channels if planar else 1
        picture, other = np.divmod(np.arange(pictures * others), others)
        sources = (picture * rows + np.arange(rows)[:, None]) * others + other
        self.down = _Pass(rows, height, sources, (picture * others + other) * height + np.arange(height)[:, None])
        self.others = others
        self.shape = (pictures, channels, height, width) if planar else (pictures, height, width, channels)

    def __call__(self, x: Tensor) -> Tensor:
        """Pictures of bytes, contiguous with channels last, to whole numbers in float32."""
        lines = x.view(x.shape[0] * x.shape[1], -1)
        upright = torch.empty(lines.shape[::-1]).copy_(lines.t())
        short = self.across(upright).t().contiguous()
        return self.down(short.view(short.shape[0] * self.others, -1)).view(self.shape)


@functools.lru_cache(maxsize=32)
def plan_of(given: tuple[int, int, int], height: int, width: int, pictures: int, planar: bool) -> Plan:
    """The plan for a shape, made once."""
    with torch.inference_mode(mode=False):
        return Plan(given, height, width, pictures, planar)


def _plan(part: Tensor, height: int, width: int, planar: bool) -> Plan:
    rows, columns, channels = part.shape[1:]
    return plan_of((rows, columns, channels), height, width, len(part), planar)


def lanczos(images: Tensor, height: int, width: int) -> Tensor:
    """See `leap_efficienttrain.ops.lanczos_resize`."""
    out = images.new_empty(len(images), height, width, images.shape[3])
    for part, target in parts(images, out, few(len(images), images.shape[1] * images.shape[2], PIXELS)):
        target.copy_(_plan(part, height, width, planar=False)(part.contiguous()))
    return out


def prepare(
    images: Tensor, size: int, mean: Sequence[float], std: Sequence[float], method: str, dtype: torch.dtype
) -> Tensor:
    """See `leap_efficienttrain.ops.prepare`."""
    count, height, width, channels = images.shape
    wanted = {"lanczos": lanczos_sizes(height, width, size), "fourier": (size, size)}.get(method, (height, width))
    out = torch.empty(count, channels, *wanted, dtype=dtype)
    scale = torch.tensor([1 / (255 * value) for value in std])[:, None, None]
    shift = torch.tensor([-value / by for value, by in zip(mean, std, strict=True)])[:, None, None]
    most = NUMBERS[form(height, width, torch.float32)] // max(channels, 1) if method == "fourier" else PIXELS
    for part, target in parts(images, out, few(count, height * width, most)):
        if method == "lanczos":
            found = _plan(part, *wanted, planar=True)(part.contiguous())
        else:
            plain = method == "none" and dtype == torch.float32
            found = target if plain else torch.empty(len(part), channels, height, width)
            found.copy_(part.permute(0, 3, 1, 2))
        if method == "fourier":
            found = cropped(found.view(-1, height, width), size).view(len(part), channels, size, size)
        torch.add(found.mul_(scale), shift, out=target)
    return out
