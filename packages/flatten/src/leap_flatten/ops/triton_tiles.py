"""What the kernels of both passes share: how work is laid out, and what a program reads of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_shared.vision.bodies.grids import Number, Size

__all__ = ["PROGRAMS", "TINY", "Map", "Plan", "ceil", "contiguous", "convolved", "features", "head_of", "places"]
__all__ += ["raise_to", "read", "read_facts", "read_input", "read_state"]

PROGRAMS = 1024  # that a sum is split among: a few for each multiprocessor of a large GPU
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def ceil(number: int, divisor: int) -> int:
    """Quotient, rounded up."""
    return -(-number // divisor)


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """The small tensors, whose strides the kernels do not ask for."""
    return [None if x is None else x.contiguous() for x in tensors]


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
