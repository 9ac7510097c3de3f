"""The operator on a GPU: a program takes one head and a tile of pixels, and goes through the taps twice.

At each tap it multiplies its queries by the keys that are there, and the products by that tap's kernels; behind the
softmax it multiplies shares by kernels, and the products by values. Maps are read by their strides, as often as there
are taps, which is what caches are for; nothing but the output is written. Inputs of products stay float32, or are
rounded to TensorFloat-32 where those of the operator are halves.

The kernels compile for GPUs, and run in Triton's interpreter. A GPU still has to confirm their results, the sizes of
tiles and parts, which are chosen from shapes alone, and all speeds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from leap_slide.ops.reference import side_of

__all__ = ["Plan", "attention", "ceil", "forward", "head_of", "kernels_of", "mix", "pointers", "refusal", "scores"]
__all__ += ["shifted", "table_of", "unit_of"]

LARGEST_HEAD = 128  # channels: with the tiles of 32 pixels that then fit, what the registers of a program hold
LARGEST_SIDE = 7  # a side more, and slots would take 128 columns of every product


def ceil(number: int, divisor: int) -> int:
    """Quotient, rounded up."""
    return -(-number // divisor)


@dataclass(frozen=True)
class Plan:
    """What the kernels of a call are compiled for.

    Args:
        heads: number of heads.
        dim: channels of a head.
        channels: the next power of two, which products need.
        side: k.
        slots: a power of two with room for k * k.
        tile_height, tile_width: of a tile, in pixels.
        precision: of the products' inputs.
    """

    heads: int
    dim: int
    channels: int
    side: int
    slots: int
    tile_height: int
    tile_width: int
    precision: str

    @classmethod
    def of(cls, query: Tensor, key_weight: Tensor, pixels: int = 64) -> Plan:
        """Plan for a call whose queries and kernels these are, with tiles of some `pixels` at the most."""
        heads, dim, height, width = query.shape[1:]
        channels, slots = (max(triton.next_power_of_2(x), 16) for x in (dim, key_weight.shape[1]))
        pixels = max(min(triton.next_power_of_2(height * width), 4096 // max(channels, slots), pixels), 16)
        down = min(triton.next_power_of_2(height), pixels // min(triton.next_power_of_2(width), 8))
        precision = "ieee" if query.dtype == torch.float32 else "tf32"
        return cls(heads, dim, channels, side_of(key_weight), slots, down, pixels // down, precision)

    def tiles(self, height: int, width: int) -> int:
        """Number of tiles of a map."""
        return ceil(height, self.tile_height) * ceil(width, self.tile_width)

    def constants(self) -> dict[str, Any]:
        """Arguments of all kernels."""
        # Products of float32 keep their inputs in registers, which takes twice the threads; kernels that are loaded
        # ahead wait in shared memory, which has no room for three of the largest.
        stages = 2 if self.channels * self.slots > 4096 else 3
        return {**dataclasses.asdict(self), "num_warps": 8 if self.precision == "ieee" else 4, "num_stages": stages}


def table_of(weight: Tensor, bias: Tensor, plan: Plan) -> Tensor:
    """Kernels by tap and behind them the biases, (taps + 1, channels, slots) in float32, zeros in what is padding."""
    table = torch.cat([weight, bias[:, :, None]], 2).permute(2, 0, 1).float()
    return F.pad(table, (0, plan.slots - table.shape[2], 0, plan.channels - plan.dim)).contiguous()


@triton.jit
@no_type_check
def unit_of(unit, tiles, height, width, heads: tl.constexpr, tile_height: tl.constexpr, tile_width: tl.constexpr):
    """Image and head of a unit of work, and rows and columns of its pixels and whether they are on the map."""
    own = unit // heads
    tile, place = own % tiles, tl.arange(0, tile_height * tile_width)
    across = tl.cdiv(width, tile_width)
    row = tile // across * tile_height + place // tile_width
    column = tile % across * tile_width + place % tile_width
    there = (row < height) & (column < width)
    return (own // tiles).to(tl.int64), (unit % heads).to(tl.int64), row, column, there


@triton.jit
@no_type_check
def head_of(dim: tl.constexpr, channels: tl.constexpr):
    """Channels of a head, and which of them there are."""
    channel = tl.arange(0, channels)
    return channel.to(tl.int64), channel < dim


@triton.jit
@no_type_check
def pointers(x, row, column, channel, step, row_step, column_step):
    """Where numbers (pixels, channels) of a map are."""
    at = row.to(tl.int64) * row_step + column.to(tl.int64) * column_step
    return x + at[:, None] + (channel * step)[None, :]


@triton.jit
@no_type_check
def shifted(at, down, right, row, column, there, valid, height, width, row_step, column_step):
    """Numbers (pixels, channels) that are so many rows and columns from those at `at`; zeros outside of the map."""
    near = there & (row >= -down) & (row < height - down) & (column >= -right) & (column < width - right)
    used = near[:, None] & valid[None, :]
    return tl.load(at + (down * row_step + right * column_step), mask=used, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def kernels_of(table, channels: tl.constexpr, slots: tl.constexpr):
    """Where the kernels (channels, slots) of the first tap are."""
    return table + tl.arange(0, channels)[:, None] * slots + tl.arange(0, slots)[None, :]


@triton.jit
@no_type_check
def scores(
    source,
    other,
    table,
    row,
    column,
    there,
    height,
    width,
    step,
    row_step,
    column_step,
    dim: tl.constexpr,
    channels: tl.constexpr,
    side: tl.constexpr,
    slots: tl.constexpr,
    shift: tl.constexpr,
    precision: tl.constexpr,
):
    """Products (pixels, slots) of sources (pixels, channels) with another map's convolution.

    Tap 0 is `shift` rows above and `shift` columns left of a pixel; height and width are the other map's.
    """
    channel, valid = head_of(dim, channels)
    at = pointers(other, row, column, channel, step, row_step, column_step)
    kernels = kernels_of(table, channels, slots)
    total = tl.dot(source, tl.load(kernels + side * side * channels * slots), input_precision=precision)
    for tap in range(side * side):
        down, right = tap // side - shift, tap % side - shift
        neighbour = shifted(at, down, right, row, column, there, valid, height, width, row_step, column_step)
        total = tl.dot(source * neighbour, tl.load(kernels), total, input_precision=precision)
        kernels += channels * slots
    return total


@triton.jit
@no_type_check
def mix(
    share,
    other,
    table,
    row,
    column,
    there,
    height,
    width,
    step,
    row_step,
    column_step,
    dim: tl.constexpr,
    channels: tl.constexpr,
    side: tl.constexpr,
    slots: tl.constexpr,
    shift: tl.constexpr,
    precision: tl.constexpr,
):
    """Sums (pixels, channels) of another map's convolution with shares (pixels, slots), as for `scores`."""
    channel, valid = head_of(dim, channels)
    at = pointers(other, row, column, channel, step, row_step, column_step)
    kernels = kernels_of(table, channels, slots)
    total = tl.dot(share, tl.trans(tl.load(kernels + side * side * channels * slots)), input_precision=precision)
    for tap in range(side * side):
        down, right = tap // side - shift, tap % side - shift
        neighbour = shifted(at, down, right, row, column, there, valid, height, width, row_step, column_step)
        total += neighbour * tl.dot(share, tl.trans(tl.load(kernels)), input_precision=precision)
        kernels += channels * slots
    return total


@triton.jit
@no_type_check
def attention(
    logits,
    query,
    position,
    head,
    row,
    column,
    there,
    height,
    width,
    side: tl.constexpr,
    slots: tl.constexpr,
    on_logits: tl.constexpr,
    masked: tl.constexpr,
):
    """Softmax over slots, of logits that still lack the position; pixels that are not there see all slots."""
    slot = tl.arange(0, slots)
    if position is not None:
        added = tl.load(position + head * (side * side) + slot, mask=slot < side * side, other=0.0).to(tl.float32)
        if on_logits:
            logits += added[None, :]
        else:
            logits += added[None, :] * tl.sum(query, 1)[:, None]
    seen = (slot < side * side)[None, :]
    if masked:
        line = row[:, None] + (slot // side - side // 2)[None, :]
        place = column[:, None] + (slot % side - side // 2)[None, :]
        inside = (line >= 0) & (line < height) & (place >= 0) & (place < width)
        seen = seen & (inside | (there[:, None] == 0))
    logits = tl.where(seen, logits, float("-inf"))
    share = tl.exp(logits - tl.max(logits, 1)[:, None])
    return share / tl.sum(share, 1)[:, None]


@triton.jit
@no_type_check
def _attend(
    query,
    key,
    value,
    keys,
    values,
    position,
    keep,
    out,
    scale,
    tiles,
    height,
    width,
    key_height,
    key_width,
    query_batch,
    query_head,
    query_channel,
    query_row,
    query_column,
    key_batch,
    key_head,
    key_channel,
    key_row,
    key_column,
    value_batch,
    value_head,
    value_channel,
    value_row,
    value_column,
    keep_batch,
    keep_head,
    keep_slot,
    keep_row,
    keep_column,
    out_batch,
    out_head,
    out_channel,
    out_row,
    out_column,
    shift: tl.constexpr,
    on_logits: tl.constexpr,
    masked: tl.constexpr,
    heads: tl.constexpr,
    dim: tl.constexpr,
    channels: tl.constexpr,
    side: tl.constexpr,
    slots: tl.constexpr,
    tile_height: tl.constexpr,
    tile_width: tl.constexpr,
    precision: tl.constexpr,
):
    image, head, row, column, there = unit_of(tl.program_id(0), tiles, height, width, heads, tile_height, tile_width)
    channel, valid = head_of(dim, channels)
    used = there[:, None] & valid[None, :]
    query += image * query_batch + head * query_head
    at = pointers(query, row, column, channel, query_channel, query_row, query_column)
    x = tl.load(at, mask=used, other=0.0).to(tl.float32) * scale
    logits = scores(
        x,
        key + image * key_batch + head * key_head,
        keys,
        row,
        column,
        there,
        key_height,
        key_width,
        key_channel,
        key_row,
        key_column,
        dim,
        channels,
        side,
        slots,
        shift,
        precision,
    )
    share = attention(logits, x, position, head, row, column, there, height, width, side, slots, on_logits, masked)
    if keep is not None:
        keep += image * keep_batch + head * keep_head
        slot, real = head_of(side * side, slots)
        at = pointers(keep, row, column, slot, keep_slot, keep_row, keep_column)
        share *= tl.load(at, mask=there[:, None] & real[None, :], other=0.0).to(tl.float32)
    result = mix(
        share,
        value + image * value_batch + head * value_head,
        values,
        row,
        column,
        there,
        key_height,
        key_width,
        value_channel,
        value_row,
        value_column,
        dim,
        channels,
        side,
        slots,
        shift,
        precision,
    )
    out += image * out_batch + head * out_head
    at = pointers(out, row, column, channel, out_channel, out_row, out_column)
    tl.store(at, result.to(out.dtype.element_ty), mask=used)


def refusal(query: Tensor, key_weight: Tensor) -> str | None:
    """Why the kernels cannot take these arguments; None where they can."""
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16, not {query.dtype}"
    if (dim := query.shape[2]) > LARGEST_HEAD:
        return f"a head of {dim} channels is more than the {LARGEST_HEAD} that a program holds"
    if (side := side_of(key_weight)) > LARGEST_SIDE:
        return f"kernels of {side}x{side} have more slots than the {LARGEST_SIDE}x{LARGEST_SIDE} that a program holds"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor | None,
    value_bias: Tensor | None,
    position: Tensor | None,
    keep: Tensor | None,
    scale: float,
    on_logits: bool,
    masked: bool,
    padded: bool,
) -> Tensor:
    """See `leap_slide.ops.slide_attention`."""
    out = torch.empty_like(query)
    if not out.numel():
        return out
    plan = Plan.of(query, key_weight)
    keys = values = table_of(key_weight, key_bias, plan)
    if value_weight is not None and value_bias is not None:
        values = table_of(value_weight, value_bias, plan)
    size, tiles = query.shape[3:], plan.tiles(*query.shape[3:])
    tensors = (query, key, value, keys, values, None if position is None else position.contiguous(), keep, out)
    steps = (*query.stride(), *key.stride(), *value.stride(), *((0,) * 5 if keep is None else keep.stride()))
    constants = {"shift": 0 if padded else plan.side // 2, "on_logits": on_logits, "masked": masked}
    grid = (query.shape[0] * tiles * plan.heads,)
    _attend[grid](*tensors, scale, tiles, *size, *key.shape[3:], *steps, *out.stride(), **constants, **plan.constants())
    return out
