"""The operator on a GPU: norms token by token, sums over keys, then the queries' share of them with the convolution.

The norms that the focus keeps are over all heads; everything behind them is done by programs of one head and a tile of
tokens, which read query, key and value by their strides. Sums are split among programs, stored in parts and added up in
a fixed order. Inputs of products stay float32, or are rounded to TensorFloat-32 where those of the operator are halves.

A run on a GPU still has to confirm the sizes of tiles and splits, which are chosen from shapes alone, and all speeds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_shared.vision.bodies.grids import Number, Size

__all__ = ["LARGEST_HEAD", "TINY", "Map", "Plan", "ceil", "contiguous", "convolved", "features", "forward", "head_of"]
__all__ += ["measured", "places", "raise_to", "read", "read_facts", "read_input", "read_state", "refusal", "states"]

LARGEST_HEAD = 128  # channels: a state of 128 x 128 is what the registers and the shared memory of a program hold
PROGRAMS = 1024  # that a sum is split among: a few for each multiprocessor of a large GPU
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def ceil(number: int, divisor: int) -> int:
    """Quotient, rounded up."""
    return -(-number // divisor)


@dataclass(frozen=True)
class Plan:
    """What the kernels of a call are compiled for.

    Args:
        heads: number of heads.
        dim: channels of a head.
        width: the next power of two, which products need.
        tokens: of a tile.
        power: of the focus.
        precision: of the products' inputs.
    """

    heads: int
    dim: int
    width: int
    tokens: int
    power: float
    precision: str

    @classmethod
    def of(cls, query: Tensor, num_heads: int, power: Number) -> Plan:
        """Plan for a call whose queries these are."""
        dim = query.shape[2] // num_heads
        width = max(triton.next_power_of_2(dim), 16)
        tokens = max(min(triton.next_power_of_2(query.shape[1]), 2048 // width, 64), 16)
        precision = "ieee" if query.dtype == torch.float32 else "tf32"
        return cls(num_heads, dim, width, tokens, float(power), precision)

    def parts(self, tiles: int, programs: int) -> tuple[int, int]:
        """Number of parts that a sum over tiles is split into beside `programs` other ones, and tiles of each."""
        each = ceil(tiles, max(PROGRAMS // programs, 1))
        return ceil(tiles, each), each

    def constants(self) -> dict[str, Any]:
        """Arguments of the kernels that have programs of one head."""
        # Products of float32 keep their inputs in registers, which takes twice the threads.
        return {**dataclasses.asdict(self), "num_warps": 8 if self.precision == "ieee" else 4}


@dataclass(frozen=True)
class Map:
    """Tokens as tiles: pieces of the tokens before the map, then rectangles of the map.

    Args:
        first: tokens before the map: all, where there is no convolution.
        map_height, map_width: of the map.
        tile_height, tile_width: of a rectangle.
    """

    first: int
    map_height: int
    map_width: int
    tile_height: int
    tile_width: int

    @classmethod
    def of(cls, count: int, weight: Tensor | None, hw: Size, tokens: int) -> Map:
        """Tiles of `tokens` each, a power of two; about as wide as high where the map is."""
        height, width = (0, 1) if weight is None else hw
        across = min(triton.next_power_of_2(width), 1 << (tokens.bit_length() - 1) // 2)
        down = min(triton.next_power_of_2(max(height, 1)), tokens // across)
        return cls(count - height * width, height, width, down, tokens // down)

    @property
    def rectangles(self) -> int:
        """Number of tiles of the map."""
        return ceil(self.map_height, self.tile_height) * ceil(self.map_width, self.tile_width)

    @property
    def tiles(self) -> int:
        """Number of all tiles."""
        return ceil(self.first, self.tile_height * self.tile_width) + self.rectangles

    def constants(self) -> dict[str, Any]:
        """Arguments of the kernels that go over the map."""
        return dataclasses.asdict(self)


@triton.jit
@no_type_check
def read(x, token, channel, stride, step, used):
    """Tile of numbers in float32, zeros where it is not used."""
    return tl.load(x + token[:, None] * stride + channel[None, :] * step, mask=used, other=0.0).to(tl.float32)


@triton.jit
@no_type_check
def read_input(x, position, token, channel, stride, step, used, channels: tl.constexpr):
    """Tile of queries, or of keys with their position."""
    tile = read(x, token, channel, stride, step, used)
    if position is not None:
        tile += read(position, token, channel, channels, 1, used)
    return tile


@triton.jit
@no_type_check
def features(x, gain, floor, channel, valid, used):
    """Features of a tile; NaN stays NaN."""
    lowest = tl.load(floor + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    if gain is None:
        found = tl.where(x < lowest, lowest, x)
    else:
        factor = tl.load(gain + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
        found = tl.where(x < 0.0, 0.0, x) * factor + lowest
    return tl.where(used, found, 0.0)


@triton.jit
@no_type_check
def raise_to(x, power: tl.constexpr):
    """Power of numbers from 0 up."""
    if power == 0:
        return x * 0.0 + 1.0
    elif power == 1:  # noqa: RET505 - branches are chosen where a kernel is compiled, which needs them closed
        return x
    elif power == 2:
        return x * x
    elif power == 3:
        return x * x * x
    elif power == 4:
        return (x * x) * (x * x)
    else:
        return tl.exp2(tl.log2(tl.maximum(x, TINY)) * power)


@triton.jit
@no_type_check
def head_of(head, dim: tl.constexpr, width: tl.constexpr):
    """Channels of a head, which of them there are, and where its state is and which numbers of it there are."""
    place = tl.arange(0, width)
    valid = place < dim
    at = (head * dim + place[:, None]) * dim + place[None, :]
    return head * dim + place, valid, at, valid[:, None] & valid[None, :]


@triton.jit
@no_type_check
def read_state(sums, scale, channel, valid, at, square, heads: tl.constexpr, dim: tl.constexpr):
    """State of a head and its mean key, or the gradients for them."""
    state = tl.load(sums + at, mask=square, other=0.0) * scale
    return state, tl.load(sums + heads * dim * dim + channel, mask=valid, other=0.0) * scale


@triton.jit
@no_type_check
def read_facts(facts, image, count, token, there):
    """Of each token the largest feature, the features' norm, and that of their powers once divided by the largest.

    Of the first token for those that are not there, whose features are 0: nothing divides by 0.
    """
    facts += image * count * 3 + tl.where(there, token, 0)
    return tl.load(facts)[:, None], tl.load(facts + count)[:, None], tl.load(facts + 2 * count)[:, None]


@triton.jit
@no_type_check
def places(tile, first, map_height, map_width, tile_height: tl.constexpr, tile_width: tl.constexpr):
    """Tokens of a tile, whether they are there and whether on the map, and their rows and columns."""
    place = tl.arange(0, tile_height * tile_width)
    linear = tile * (tile_height * tile_width) + place
    before = tl.cdiv(first, tile_height * tile_width)
    across = tl.cdiv(map_width, tile_width)
    row = (tile - before) // across * tile_height + place // tile_width
    column = (tile - before) % across * tile_width + place % tile_width
    behind = linear >= before * (tile_height * tile_width)
    on_map = behind & (row < map_height) & (column < map_width)
    token = tl.where(behind, first + row * map_width + column, linear)
    return token, on_map | (linear < first), on_map, row, column


@triton.jit
@no_type_check
def convolved(
    x,
    weight,
    row,
    column,
    on_map,
    channel,
    valid,
    stride,
    step,
    first,
    map_height,
    map_width,
    kernels: tl.constexpr,
    side: tl.constexpr,
    flipped: tl.constexpr,
    tokens: tl.constexpr,
    width: tl.constexpr,
):
    """Depthwise convolution of a tile of the map, or with `flipped` kernels its transpose."""
    total = tl.zeros((tokens, width), tl.float32)
    x += channel[None, :] * step
    weight += channel % kernels * (side * side)
    for down in range(side):
        line = row + (down - side // 2)
        inside = on_map & (line >= 0) & (line < map_height)
        for right in tl.static_range(side):
            place = column + (right - side // 2)
            near = inside & (place >= 0) & (place < map_width)
            tap = down * side + right
            if flipped:
                tap = side * side - 1 - tap
            kernel = tl.load(weight + tap, mask=valid, other=0.0).to(tl.float32)
            at = (first + line * map_width + place) * stride
            total += kernel * tl.load(x + at[:, None], mask=near[:, None] & valid[None, :], other=0.0).to(tl.float32)
    return total


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


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """The small tensors, whose strides the kernels do not ask for."""
    return [None if x is None else x.contiguous() for x in tensors]


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
