"""Gradients on a GPU, with the programs and tiles of `triton.py`.

First come, by queries, the shares and the gradients of the logits, both kept in the dtype of the queries: together
2 * k * k / dim times as much memory as a map. Keys and values then collect from the pixels around them what those send,
and kernels sum over all pixels, in parts that are added up in a fixed order: nothing is added atomically.

The kernels compile for GPUs, and run in Triton's interpreter. A GPU still has to confirm their results, the sizes of
tiles and parts, which are chosen from shapes alone, and all speeds.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_slide.ops.triton import (
    Plan,
    attention,
    ceil,
    head_of,
    kernels_of,
    mix,
    pointers,
    scores,
    shifted,
    table_of,
    unit_of,
)

__all__ = ["PROGRAMS", "gradients"]

PROGRAMS = 1024  # that a sum is split among: a few for each multiprocessor of a large GPU


@triton.jit
@no_type_check
def _of_queries(
    gradient,
    query,
    key,
    value,
    keys,
    values,
    position,
    keep,
    shares,
    of_logits,
    of_query,
    of_position,
    scale,
    tiles,
    height,
    width,
    key_height,
    key_width,
    gradient_batch,
    gradient_head,
    gradient_channel,
    gradient_row,
    gradient_column,
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
    slot, real = head_of(side * side, slots)
    used, counted = there[:, None] & valid[None, :], there[:, None] & real[None, :]
    query += image * query_batch + head * query_head
    key += image * key_batch + head * key_head
    at = pointers(query, row, column, channel, query_channel, query_row, query_column)
    x = tl.load(at, mask=used, other=0.0).to(tl.float32) * scale
    logits = scores(
        x,
        key,
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
    plain = attention(logits, x, position, head, row, column, there, height, width, side, slots, on_logits, masked)
    gradient += image * gradient_batch + head * gradient_head
    at = pointers(gradient, row, column, channel, gradient_channel, gradient_row, gradient_column)
    outer = tl.load(at, mask=used, other=0.0).to(tl.float32)
    of_share = scores(
        outer,
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
    share = plain
    if keep is not None:
        keep += image * keep_batch + head * keep_head
        at = pointers(keep, row, column, slot, keep_slot, keep_row, keep_column)
        kept = tl.load(at, mask=counted, other=0.0).to(tl.float32)
        share = plain * kept
        of_share *= kept
    found = plain * (of_share - tl.sum(plain * of_share, 1)[:, None])
    at = pointers((image * heads + head) * (side * side) * height * width, row, column, slot, height * width, width, 1)
    tl.store(shares + at, share.to(shares.dtype.element_ty), mask=counted)
    tl.store(of_logits + at, found.to(of_logits.dtype.element_ty), mask=counted)
    result = mix(
        found,
        key,
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
    if position is not None:
        its_position = found
        if not on_logits:
            added = tl.load(position + head * (side * side) + slot, mask=real, other=0.0).to(tl.float32)
            result += tl.sum(found * added[None, :], 1)[:, None]
            its_position = found * tl.sum(x, 1)[:, None]
        of_position += tl.program_id(0).to(tl.int64) * (side * side) + slot
        tl.store(of_position, tl.sum(its_position, 0), mask=real)
    of_query += image * out_batch + head * out_head
    at = pointers(of_query, row, column, channel, out_channel, out_row, out_column)
    tl.store(at, (result * scale).to(of_query.dtype.element_ty), mask=used)


@triton.jit
@no_type_check
def _collect(
    source,
    shares,
    table,
    out,
    scale,
    tiles,
    height,
    width,
    out_height,
    out_width,
    source_batch,
    source_head,
    source_channel,
    source_row,
    source_column,
    out_batch,
    out_head,
    out_channel,
    out_row,
    out_column,
    shift: tl.constexpr,
    heads: tl.constexpr,
    dim: tl.constexpr,
    channels: tl.constexpr,
    side: tl.constexpr,
    slots: tl.constexpr,
    tile_height: tl.constexpr,
    tile_width: tl.constexpr,
    precision: tl.constexpr,
):
    image, head, row, column, there = unit_of(
        tl.program_id(0), tiles, out_height, out_width, heads, tile_height, tile_width
    )
    channel, valid = head_of(dim, channels)
    slot, real = head_of(side * side, slots)
    source += image * source_batch + head * source_head
    shares += (image * heads + head) * (side * side) * height * width
    sources = pointers(source, row, column, channel, source_channel, source_row, source_column)
    shares = pointers(shares, row, column, slot, height * width, width, 1)
    kernels = kernels_of(table, channels, slots)
    total = tl.zeros((tile_height * tile_width, channels), tl.float32)
    for tap in range(side * side):
        # The pixel that meets this one at the tap is as far on the other side as the one that this one meets.
        down, right = shift - tap // side, shift - tap % side
        x = shifted(sources, down, right, row, column, there, valid, height, width, source_row, source_column)
        share = shifted(shares, down, right, row, column, there, real, height, width, width, 1)
        total += x * tl.dot(share, tl.trans(tl.load(kernels)), input_precision=precision)
        kernels += channels * slots
    at = pointers(out + image * out_batch + head * out_head, row, column, channel, out_channel, out_row, out_column)
    tl.store(at, (total * scale).to(out.dtype.element_ty), mask=there[:, None] & valid[None, :])


@triton.jit
@no_type_check
def _sum_products(
    source,
    other,
    shares,
    sums,
    scale,
    tiles,
    units,
    each,
    height,
    width,
    other_height,
    other_width,
    source_batch,
    source_head,
    source_channel,
    source_row,
    source_column,
    other_batch,
    other_head,
    other_channel,
    other_row,
    other_column,
    taps: tl.constexpr,
    shift: tl.constexpr,
    heads: tl.constexpr,
    dim: tl.constexpr,
    channels: tl.constexpr,
    side: tl.constexpr,
    slots: tl.constexpr,
    tile_height: tl.constexpr,
    tile_width: tl.constexpr,
    precision: tl.constexpr,
):
    blocks = tl.cdiv(side * side + 1, taps)
    part, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * taps
    index = tl.arange(0, taps * channels)
    tap, channel = first + index // channels, (index % channels).to(tl.int64)
    down, right = tap // side - shift, tap % side - shift
    valid, is_bias = ((channel < dim) & (tap <= side * side))[None, :], (tap == side * side)[None, :]
    slot, real = head_of(side * side, slots)
    other += (down * other_row + right * other_column)[None, :]
    total = tl.zeros((taps * channels, slots), tl.float32)
    for step in range(tl.minimum(each, units - part * each)):
        unit = part * each + step
        image, head, row, column, there = unit_of(unit, tiles, height, width, heads, tile_height, tile_width)
        used, source_at = there[:, None] & valid, image * source_batch + head * source_head
        at = pointers(source, row, column, channel, source_channel, source_row, source_column) + source_at
        x = tl.load(at, mask=used, other=0.0).to(tl.float32)
        line, place = row[:, None] + down[None, :], column[:, None] + right[None, :]
        near = used & (line >= 0) & (line < other_height) & (place >= 0) & (place < other_width) & (is_bias == 0)
        at = pointers(other, row, column, channel, other_channel, other_row, other_column)
        y = tl.load(at + (image * other_batch + head * other_head), mask=near, other=0.0).to(tl.float32)
        y = tl.where(is_bias, 1.0, y)
        at = pointers(shares, row, column, slot, height * width, width, 1)
        at += (image * heads + head) * (side * side) * height * width
        share = tl.load(at, mask=there[:, None] & real[None, :], other=0.0).to(tl.float32)
        total = tl.dot(tl.trans(x * y), share, total, input_precision=precision)
    sums += part.to(tl.int64) * (blocks * taps * channels * slots) + first * (channels * slots)
    tl.store(sums + index[:, None] * slots + tl.arange(0, slots)[None, :], total * scale)


def _of_kernels(
    source: Tensor, other: Tensor, shares: Tensor, weight: Tensor, scale: float, shift: int
) -> tuple[Tensor, Tensor]:
    """Gradients (dim, slots, taps) of kernels and (dim, slots) of biases."""
    plan = Plan.of(source, weight, 32)  # of which products with several taps, and what waits for them, fit
    height, width = source.shape[3:]
    tiles, taps = plan.tiles(height, width), max(128 // plan.channels, 1)
    units, blocks = source.shape[0] * tiles * plan.heads, ceil(plan.side**2 + 1, taps)
    each = ceil(units, ceil(PROGRAMS, blocks))
    parts = ceil(units, each)
    sums = source.new_empty(parts, blocks * taps, plan.channels, plan.slots, dtype=torch.float32)
    numbers = (scale, tiles, units, each, height, width, *other.shape[3:], *source.stride(), *other.stride())
    sizes: dict[str, Any] = {"taps": taps, "shift": shift, **plan.constants(), "num_stages": 1}
    _sum_products[(parts * blocks,)](source, other, shares, sums, *numbers, **sizes)
    found = sums.sum(0)[:, : plan.dim, : plan.side**2].permute(1, 2, 0)
    return found[:, :, : plan.side**2].contiguous(), found[:, :, plan.side**2].contiguous()


def gradients(
    gradient: Tensor,
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
) -> tuple[Tensor, ...]:
    """See `leap_slide.ops.slide_attention_backward`."""
    outputs = [torch.empty_like(x) for x in (query, key, value)]
    tables = (key_weight, key_bias, value_weight, value_bias, position)
    if not query.numel():
        zeros = [query.new_zeros(0 if x is None else x.shape, dtype=torch.float32) for x in tables]
        return *outputs, *zeros
    plan = Plan.of(query, key_weight)
    keys = values = table_of(key_weight, key_bias, plan)
    if value_weight is not None and value_bias is not None:
        values = table_of(value_weight, value_bias, plan)
    position = None if position is None else position.contiguous()
    (batch, heads, _, *size), around = query.shape, key.shape[3:]
    tiles, counted = plan.tiles(*size), plan.side**2
    shift, sizes = 0 if padded else plan.side // 2, plan.constants()

    shares, of_logits = (query.new_empty(batch, heads, counted, *size) for _ in range(2))
    of_position = keys.new_empty(0 if position is None else (batch * tiles, heads, counted))
    given = (gradient, query, key, value, keys, values, position, keep, shares, of_logits, outputs[0], of_position)
    steps = [step for x in (gradient, query, key, value) for step in x.stride()]
    steps += [*((0,) * 5 if keep is None else keep.stride()), *outputs[0].stride()]
    constants: dict[str, Any] = {"shift": shift, "on_logits": on_logits, "masked": masked, **sizes}
    _of_queries[(batch * tiles * heads,)](*given, scale, tiles, *size, *around, *steps, **constants)

    found: list[Tensor] = []
    for source, share, table, factor, other, out in (
        (query, of_logits, keys, scale, key, outputs[1]),
        (gradient, shares, values, 1.0, value, outputs[2]),
    ):
        their_tiles = plan.tiles(*around)
        numbers = (factor, their_tiles, *size, *around, *source.stride(), *out.stride())
        _collect[(batch * their_tiles * heads,)](source, share, table, out, *numbers, shift=shift, **sizes)
        found += _of_kernels(source, other, share, key_weight, factor, shift)
    if value_weight is None:
        found = [found[0] + found[2], found[1] + found[3], keys.new_zeros(0), keys.new_zeros(0)]
    return *outputs, *found, of_position if position is None else of_position.sum(0)
