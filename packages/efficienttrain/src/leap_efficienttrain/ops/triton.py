"""The crop and its adjoint on a GPU: both products of L X R, and what is subtracted from it, in one kernel.

A program takes some rows and columns of an output. It multiplies its rows of L by blocks of the image, and each result,
which stays in registers, by R's rows that belong to it. The image is read by its strides, so that channels may come
first or last; from bytes, the kernel normalises what it writes.

The kernels run in Triton's interpreter. A GPU still has to confirm their results, the sizes of blocks, which are chosen
from shapes alone, and all speeds.
"""

from __future__ import annotations

import functools
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_efficienttrain.ops.weights import crop_axis

__all__ = ["Tables", "adjoint", "crop", "refusal", "sandwich", "tables"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Tables = tuple[Tensor, ...]
"""L, R, the vectors whose product with the image is a number, and those whose product that number multiplies."""


def refusal(x: Tensor) -> str | None:
    """Why the kernel cannot take these images; None where it can."""
    return None if x.dtype in DTYPES else f"it takes float32, bfloat16 and float16, not {x.dtype}"


@functools.lru_cache(maxsize=64)
def tables(height: int, width: int, size: int, transposed: bool, device: torch.device) -> Tables:
    """Tables for the crop of an image, or for its adjoint, in float32."""
    rows, columns = crop_axis(height, size), crop_axis(width, size)
    given, wanted = (rows.sine, columns.sine), (rows.alternating, columns.alternating)
    matrices = (rows.matrix.T, columns.matrix) if transposed else (rows.matrix, columns.matrix.T)
    if transposed:
        given, wanted = wanted, given
    with torch.inference_mode(mode=False):
        arrays = (*matrices, *given, *wanted)
        return tuple(torch.from_numpy(x.astype("float32", order="C")).to(device) for x in arrays)


@triton.jit
@no_type_check
def _sandwich(
    x,
    left,
    right,
    given_left,
    given_right,
    wanted_left,
    wanted_right,
    scale,
    shift,
    out,
    gain,
    channels,
    height,
    width,
    out_height,
    out_width,
    image_step,
    channel_step,
    row_step,
    column_step,
    tall: tl.constexpr,
    wide: tl.constexpr,
    block: tl.constexpr,
    precision: tl.constexpr,
):
    image, tile = tl.program_id(0), tl.program_id(1)
    across = tl.cdiv(out_width, wide)
    row = tile // across * tall + tl.arange(0, tall)
    column = tile % across * wide + tl.arange(0, wide)
    channel = image % channels
    x += (image // channels).to(tl.int64) * image_step + channel.to(tl.int64) * channel_step
    total = tl.zeros((tall, wide), tl.float32)
    single = 0.0
    for first_column in range(0, width, block):
        place = first_column + tl.arange(0, block)
        short = tl.zeros((tall, block), tl.float32)
        sums = tl.zeros((block,), tl.float32)
        for first_row in range(0, height, block):
            line = first_row + tl.arange(0, block)
            inside = (line < height)[:, None] & (place < width)[None, :]
            at = line.to(tl.int64)[:, None] * row_step + place.to(tl.int64)[None, :] * column_step
            pixels = tl.load(x + at, mask=inside, other=0).to(tl.float32)
            weights = tl.load(
                left + row[:, None] * height + line[None, :],
                mask=(row < out_height)[:, None] & (line < height)[None, :],
                other=0.0,
            )
            short = tl.dot(weights, pixels, short, input_precision=precision)
            sums += tl.sum(pixels * tl.load(given_left + line, mask=line < height, other=0.0)[:, None], 0)
        single += tl.sum(sums * tl.load(given_right + place, mask=place < width, other=0.0), 0)
        weights = tl.load(
            right + place[:, None] * out_width + column[None, :],
            mask=(place < width)[:, None] & (column < out_width)[None, :],
            other=0.0,
        )
        total = tl.dot(short, weights, total, input_precision=precision)
    of_row = tl.load(wanted_left + row, mask=row < out_height, other=0.0)
    of_column = tl.load(wanted_right + column, mask=column < out_width, other=0.0)
    total = (total - single * of_row[:, None] * of_column[None, :]) * gain
    if scale is not None:
        total = total * tl.load(scale + channel) + tl.load(shift + channel)
    at = (image.to(tl.int64) * out_height + row[:, None]) * out_width + column[None, :]
    there = (row < out_height)[:, None] & (column < out_width)[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=there)


def sandwich(
    x: Tensor, given: Tables, out: Tensor, gain: float, amp: bool, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """Write L X R - (g^T X h) u v^T, times `gain`, then scaled and shifted by channel, for images of any strides.

    Products are those of three TensorFloat-32 parts, which lose nothing that float32 has, or with `amp` of one.
    """
    if not out.numel():
        return out
    batch, channels, height, width = x.shape
    tall, wide = (
        min(max(triton.next_power_of_2(n), 16), most) for n, most in zip(out.shape[2:], (64, 128), strict=True)
    )
    tiles = triton.cdiv(out.shape[2], tall) * triton.cdiv(out.shape[3], wide)
    sizes = (channels, height, width, *out.shape[2:], *x.stride())
    constants = {"tall": tall, "wide": wide, "block": 32, "precision": "tf32" if amp else "tf32x3"}
    _sandwich[(batch * channels, tiles)](
        x, *given, scale, shift, out, gain, *sizes, **constants, num_warps=8 if wide > 64 else 4
    )
    return out


def crop(x: Tensor, size: int, gain: float, amp: bool) -> Tensor:
    """See `leap_efficienttrain.ops.low_frequency_crop`."""
    given = tables(x.shape[2], x.shape[3], size, False, x.device)
    return sandwich(x, given, x.new_empty(*x.shape[:2], size, size), gain, amp, None, None)


def adjoint(gradient: Tensor, height: int, width: int, gain: float, amp: bool) -> Tensor:
    """See `leap_efficienttrain.ops.low_frequency_crop_adjoint`."""
    given = tables(height, width, gradient.shape[3], True, gradient.device)
    out = gradient.new_empty(*gradient.shape[:2], height, width)
    return sandwich(gradient, given, out, gain, amp, None, None)
