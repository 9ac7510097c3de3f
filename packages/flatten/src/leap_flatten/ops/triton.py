"""The operator on a GPU: norms token by token, sums over keys, then the queries' share of them with the convolution.

The norms that the focus keeps are over all heads; everything behind them is done by programs of one head and a tile of
tokens, which read query, key and value by their strides. Sums are split among programs, stored in parts and added up in
a fixed order. Inputs of products stay float32, or are rounded to TensorFloat-32 where those of the operator are halves.

The kernels compile for GPUs, and run in Triton's interpreter. A GPU still has to confirm their results, the sizes of
tiles and parts, which are chosen from shapes alone, and all speeds.
"""

from __future__ import annotations

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_flatten.ops.triton_tiles import (
    TINY,
    Map,
    Plan,
    ceil,
    contiguous,
    convolved,
    features,
    head_of,
    places,
    raise_to,
    read,
    read_facts,
    read_input,
    read_state,
)
from leap_shared.vision.bodies.grids import Number, Size

__all__ = ["LARGEST_HEAD", "forward", "measured", "refusal", "states"]

LARGEST_HEAD = 128  # channels: a state of 128 x 128 is what the registers and the shared memory of a program hold


@triton.jit
@no_type_check
def _measure(
    x,
    position,
    gain,
    floor,
    facts,
    count,
    x_batch,
    x_token,
    x_channel,
    channels: tl.constexpr,
    power: tl.constexpr,
    width: tl.constexpr,
    tokens: tl.constexpr,
):
    tiles = tl.cdiv(count, tokens)
    image = (tl.program_id(0) // tiles).to(tl.int64)
    token = tl.program_id(0) % tiles * tokens + tl.arange(0, tokens)
    there = token < count
    peak = tl.full((tokens,), TINY, tl.float32)
    square = tl.zeros((tokens,), tl.float32)
    raised = tl.zeros((tokens,), tl.float32)
    for start in range(0, channels, width):
        channel = start + tl.arange(0, width)
        valid = channel < channels
        used = there[:, None] & valid[None, :]
        tile = read_input(x + image * x_batch, position, token, channel, x_token, x_channel, used, channels)
        tile = features(tile, gain, floor, channel, valid, used)
        higher = tl.maximum(peak, tl.max(tile, 1))
        fall = raise_to(peak / higher, power)
        powers = raise_to(tile / higher[:, None], power)
        raised = raised * fall * fall + tl.sum(powers * powers, 1)
        square += tl.sum(tile * tile, 1)
        peak = higher
    facts += image * count * 3 + token
    tl.store(facts, peak, mask=there)
    tl.store(facts + count, tl.sqrt(square), mask=there)
    tl.store(facts + 2 * count, tl.maximum(tl.sqrt(raised), TINY), mask=there)


@triton.jit
@no_type_check
def _sum_keys(
    key,
    value,
    position,
    gain,
    floor,
    facts,
    sums,
    count,
    parts,
    each,
    key_batch,
    key_token,
    key_channel,
    value_batch,
    value_token,
    value_channel,
    heads: tl.constexpr,
    dim: tl.constexpr,
    width: tl.constexpr,
    tokens: tl.constexpr,
    power: tl.constexpr,
    precision: tl.constexpr,
):
    own = tl.program_id(0) // heads
    part, image = own % parts, (own // parts).to(tl.int64)
    channel, valid, at, square = head_of(tl.program_id(0) % heads, dim, width)
    key += image * key_batch
    value += image * value_batch
    state = tl.zeros((width, width), tl.float32)
    total = tl.zeros((tokens, width), tl.float32)
    for tile in range(part * each, (part + 1) * each):
        token = tile * tokens + tl.arange(0, tokens)
        there = token < count
        used = there[:, None] & valid[None, :]
        peak, norm, length = read_facts(facts, image, count, token, there)
        x = read_input(key, position, token, channel, key_token, key_channel, used, heads * dim)
        sharp = raise_to(features(x, gain, floor, channel, valid, used) / peak, power) * (norm / length)
        its_value = read(value, token, channel, value_token, value_channel, used)
        state = tl.dot(tl.trans(sharp), its_value, state, input_precision=precision)
        total += sharp
    sums += own.to(tl.int64) * (heads * dim * (dim + 1))
    tl.store(sums + at, state, mask=square)
    tl.store(sums + heads * dim * dim + channel, tl.sum(total, 0), mask=valid)


@triton.jit
@no_type_check
def _share(
    query,
    value,
    gain,
    floor,
    weight,
    bias,
    facts,
    sums,
    out,
    tiles,
    scale,
    epsilon,
    count,
    query_batch,
    query_token,
    query_channel,
    value_batch,
    value_token,
    value_channel,
    first,
    map_height,
    map_width,
    tile_height: tl.constexpr,
    tile_width: tl.constexpr,
    kernels: tl.constexpr,
    side: tl.constexpr,
    heads: tl.constexpr,
    dim: tl.constexpr,
    width: tl.constexpr,
    tokens: tl.constexpr,
    power: tl.constexpr,
    precision: tl.constexpr,
):
    own = tl.program_id(0) // heads
    tile, image = own % tiles, (own // tiles).to(tl.int64)
    channel, valid, at, square = head_of(tl.program_id(0) % heads, dim, width)
    token, there, on_map, row, column = places(tile, first, map_height, map_width, tile_height, tile_width)
    used = there[:, None] & valid[None, :]
    peak, norm, length = read_facts(facts, image, count, token, there)
    x = read(query + image * query_batch, token, channel, query_token, query_channel, used)
    sharp = raise_to(features(x, gain, floor, channel, valid, used) / peak, power) * (norm / length)
    sums += image * (heads * dim * (dim + 1))
    state, mean = read_state(sums, scale, channel, valid, at, square, heads, dim)
    share = tl.sum(sharp * mean[None, :], 1) + epsilon
    result = tl.dot(sharp, state, input_precision=precision) / share[:, None]
    if weight is not None:
        result += convolved(
            value + image * value_batch,
            weight,
            row,
            column,
            on_map,
            channel,
            valid,
            value_token,
            value_channel,
            first,
            map_height,
            map_width,
            kernels,
            side,
            False,
            tokens,
            width,
        )
    if bias is not None:
        offset = tl.load(bias + channel % kernels, mask=valid, other=0.0).to(tl.float32)
        result += tl.where(on_map[:, None], offset[None, :], 0.0)
    out += (image * count + token[:, None]) * (heads * dim) + channel[None, :]
    tl.store(out, result.to(out.dtype.element_ty), mask=used)


def measured(x: Tensor, position: Tensor | None, gain: Tensor | None, floor: Tensor, plan: Plan) -> Tensor:
    """What `read_facts` reads of queries or keys, (batch, 3, tokens)."""
    batch, count, channels = x.shape
    facts = x.new_empty(batch, 3, count, dtype=torch.float32)
    width = min(triton.next_power_of_2(channels), 1024)
    tokens = 4096 // width if count > 4096 // width else triton.next_power_of_2(count)
    sizes = {"channels": channels, "power": plan.power, "width": width, "tokens": tokens}
    _measure[(batch * ceil(count, tokens),)](x, position, gain, floor, facts, count, *x.stride(), **sizes)
    return facts


def states(
    key: Tensor,
    value: Tensor,
    position: Tensor | None,
    gain: Tensor | None,
    floor: Tensor,
    facts: Tensor,
    plan: Plan,
) -> Tensor:
    """Sums over keys: of k v^T by head, (batch, channels * dim), and behind them of k, (batch, channels)."""
    batch, count, channels = key.shape
    parts, each = plan.parts(ceil(count, plan.tokens), batch * plan.heads)
    sums = facts.new_empty(batch, parts, channels * (plan.dim + 1))
    tensors = (key, value, position, gain, floor, facts, sums)
    strides = (*key.stride(), *value.stride())
    _sum_keys[(batch * parts * plan.heads,)](*tensors, count, parts, each, *strides, **plan.constants())
    return sums.sum(1)


def refusal(query: Tensor, key: Tensor, value: Tensor, weight: Tensor | None, num_heads: int) -> str | None:
    """Why the kernels cannot take these arguments; None where they can."""
    dtypes = {x.dtype for x in (query, key, value)}
    if not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        given = ", ".join(sorted(map(str, dtypes)))
        return f"it takes float32, bfloat16 and float16, not {given}"
    if (dim := query.shape[2] // num_heads) > LARGEST_HEAD:
        return f"a head of {dim} channels is more than the {LARGEST_HEAD} that a program holds"
    if weight is not None and key.shape[1] != query.shape[1]:
        return f"it convolves values of all {query.shape[1]} tokens, not of {key.shape[1]}"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor | None,
    gain: Tensor | None,
    floor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_heads: int,
    power: Number,
    epsilon: float,
    hw: Size,
) -> Tensor:
    """See `leap_flatten.ops.reference.forward`."""
    batch, count, channels = query.shape
    out = query.new_empty(batch, count, channels)
    if not out.numel():
        return out
    position, gain, floor, weight, bias = contiguous(position, gain, floor, weight, bias)
    plan = Plan.of(query, num_heads, power)
    tiling = Map.of(count, weight, hw, plan.tokens)
    sums = states(key, value, position, gain, floor, measured(key, position, gain, floor, plan), plan)
    facts = measured(query, None, gain, floor, plan)
    tensors = (query, value, gain, floor, weight, bias, facts, sums, out)
    numbers = (tiling.tiles, 1 / key.shape[1], epsilon, count, *query.stride(), *value.stride())
    kernels, side = (1, 1) if weight is None else (weight.shape[0], weight.shape[2])
    constants = {**plan.constants(), **tiling.constants(), "kernels": kernels, "side": side}
    _share[(batch * tiling.tiles * plan.heads,)](*tensors, *numbers, **constants)
    return out
