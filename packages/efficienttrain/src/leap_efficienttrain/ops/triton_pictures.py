"""Lanczos on a GPU in whole numbers, and pictures of bytes prepared for a model: one kernel for each axis.

The kernel of the rows normalises too, and puts channels first, where that is asked for; so does the crop's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import no_type_check

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_efficienttrain.ops.triton import sandwich, tables
from leap_efficienttrain.ops.weights import LANCZOS_BITS, lanczos_sizes, lanczos_table

__all__ = ["lanczos", "prepare"]


@functools.lru_cache(maxsize=64)
def _weights(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first place that every output sees, and its weights from there on, (size, taps)."""
    table = lanczos_table(length, size)
    first = (table != 0).argmax(1)
    last = length - (table != 0)[:, ::-1].argmax(1)
    place = first[:, None] + np.arange((last - first).max())
    weights = np.where(place < length, np.take_along_axis(table, place.clip(max=length - 1), 1), 0)
    with torch.inference_mode(mode=False):
        starts = torch.from_numpy(first.astype(np.int32)).to(device)
        return starts, torch.from_numpy(weights.astype(np.int32)).to(device)


@triton.jit
@no_type_check
def _pass(
    x,
    starts,
    weights,
    scale,
    shift,
    out,
    count,
    length,
    size,
    inner,
    channels,
    taps,
    bits: tl.constexpr,
    block: tl.constexpr,
):
    """Sums over an axis of (outer, length, inner) bytes, to (outer, size, inner).

    With a `scale` the output is normalised, and (outer, channels, size, inner / channels).
    """
    number = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    there = number < count
    if scale is not None:
        column, rest = number % (inner // channels), number // (inner // channels)
        place, rest = rest % size, rest // size
        channel, outer = rest % channels, rest // channels
        at = column * channels + channel
    else:
        at, rest = number % inner, number // inner
        place, outer = rest % size, rest // size
    start = tl.load(starts + place, mask=there, other=0)
    total = tl.full((block,), 1 << (bits - 1), tl.int32)
    for tap in range(taps):
        line = start + tap
        weight = tl.load(weights + place * taps + tap, mask=there, other=0)
        source = (outer * length + line) * inner + at
        total += weight * tl.load(x + source, mask=there & (line < length), other=0).to(tl.int32)
    whole = tl.minimum(tl.maximum(total >> bits, 0), 255)
    if scale is not None:
        value = whole.to(tl.float32) * tl.load(scale + channel, mask=there, other=0.0)
        value += tl.load(shift + channel, mask=there, other=0.0)
        tl.store(out + number, value.to(out.dtype.element_ty), mask=there)
    else:
        tl.store(out + number, whole.to(tl.uint8), mask=there)


def _along(x: Tensor, axis: int, size: int, out: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """One pass over the axis of (batch, height, width, channels), contiguous."""
    if out.numel():
        length, inner = x.shape[axis], x.shape[axis + 1 :].numel()
        starts, weights = _weights(length, size, x.device)
        grid = (triton.cdiv(out.numel(), 1024),)
        numbers = (out.numel(), length, size, inner, x.shape[3], weights.shape[1])
        _pass[grid](x, starts, weights, scale, shift, out, *numbers, bits=LANCZOS_BITS, block=1024)
    return out


def _across(images: Tensor, width: int) -> Tensor:
    images = images.contiguous()
    if images.shape[2] == width:
        return images
    out = images.new_empty(*images.shape[:2], width, images.shape[3])
    return _along(images, 2, width, out, None, None)


def lanczos(images: Tensor, height: int, width: int) -> Tensor:
    """See `leap_efficienttrain.ops.lanczos_resize`."""
    short = _across(images, width)
    return _along(short, 1, height, short.new_empty(len(short), height, width, short.shape[3]), None, None)


def prepare(
    images: Tensor, size: int, mean: Sequence[float], std: Sequence[float], method: str, dtype: torch.dtype
) -> Tensor:
    """See `leap_efficienttrain.ops.prepare`."""
    batch, height, width, channels = images.shape
    scale = torch.tensor([1 / (255 * value) for value in std], device=images.device)
    shift = torch.tensor([-value / by for value, by in zip(mean, std, strict=True)], device=images.device)
    if method == "fourier":
        given = tables(height, width, size, False, images.device)
        out = images.new_empty(batch, channels, size, size, dtype=dtype)
        return sandwich(images.permute(0, 3, 1, 2), given, out, 1.0, dtype == torch.bfloat16, scale, shift)
    tall, wide = lanczos_sizes(height, width, size) if method == "lanczos" else (height, width)
    short = _across(images, wide)
    return _along(short, 1, tall, short.new_empty(batch, channels, tall, wide, dtype=dtype), scale, shift)
