"""Gradients on a GPU, with the programs and tiles of `triton.py`: inputs are focused again, nothing else is kept.

The gradient through a focused vector needs its product with its own gradient, over all heads. So queries are gone over
twice, and keys too: once for each head's part of that product, once for the gradients.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from leap_flatten.ops import reference
from leap_flatten.ops.triton import measured, states
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

__all__ = ["gradients"]


@triton.jit
@no_type_check
def _through_focus(found, of_sharp, peak, norm, length, product, used, power: tl.constexpr):
    """Gradient for features: of the norm and of the direction apart, see `reference`."""
    ratio = found / peak
    below = raise_to(ratio, power - 1)
    norm = tl.maximum(norm, TINY)
    along = product[:, None] / norm
    of_direction = (of_sharp - below * ratio * (along / length)) * below * (norm / (peak * length) * power)
    return tl.where(used, found * (along / norm) + of_direction, 0.0)


@triton.jit
@no_type_check
def _through_features(x, of_features, gain, floor, channel, valid):
    """Gradient for inputs, and what each token adds to those for gain and floor."""
    if gain is None:
        lowest = tl.load(floor + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
        of_input = tl.where(x > lowest, of_features, 0.0)
        of_floor = of_features - of_input
        of_gain = tl.zeros_like(of_floor)
    else:
        factor = tl.load(gain + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
        of_input = tl.where(x > 0.0, of_features * factor, 0.0)
        of_floor = of_features
        of_gain = tl.where(x > 0.0, of_features * x, 0.0)
    return of_input, of_gain, of_floor


@triton.jit
@no_type_check
def _query_products(
    query,
    gradient,
    gain,
    floor,
    facts,
    sums,
    products,
    tiles,
    scale,
    epsilon,
    count,
    query_batch,
    query_token,
    query_channel,
    gradient_batch,
    gradient_token,
    gradient_channel,
    heads: tl.constexpr,
    dim: tl.constexpr,
    width: tl.constexpr,
    tokens: tl.constexpr,
    power: tl.constexpr,
    precision: tl.constexpr,
):
    own = tl.program_id(0) // heads
    image, head = (own // tiles).to(tl.int64), tl.program_id(0) % heads
    channel, valid, at, square = head_of(head, dim, width)
    token = own % tiles * tokens + tl.arange(0, tokens)
    there = token < count
    used = there[:, None] & valid[None, :]
    peak, norm, length = read_facts(facts, image, count, token, there)
    x = read(query + image * query_batch, token, channel, query_token, query_channel, used)
    sharp = raise_to(features(x, gain, floor, channel, valid, used) / peak, power) * (norm / length)
    sums += image * (heads * dim * (dim + 1))
    state, mean = read_state(sums, scale, channel, valid, at, square, heads, dim)
    share = tl.sum(sharp * mean[None, :], 1) + epsilon
    result = tl.dot(sharp, state, input_precision=precision)
    outer = read(gradient + image * gradient_batch, token, channel, gradient_token, gradient_channel, used)
    # q . dq is that of q / (q . mean of k + epsilon): without epsilon, the length of q would not matter.
    product = tl.sum(outer * result, 1) / share * (epsilon / share)
    tl.store(products + (image * heads + head) * count + token, product, mask=there)


@triton.jit
@no_type_check
def _query_gradients(
    query,
    gradient,
    gain,
    floor,
    facts,
    sums,
    products,
    of_query,
    of_sums,
    of_features_sums,
    parts,
    each,
    scale,
    epsilon,
    count,
    query_batch,
    query_token,
    query_channel,
    gradient_batch,
    gradient_token,
    gradient_channel,
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
    query += image * query_batch
    gradient += image * gradient_batch
    sums += image * (heads * dim * (dim + 1))
    state, mean = read_state(sums, scale, channel, valid, at, square, heads, dim)
    of_state = tl.zeros((width, width), tl.float32)
    of_mean = tl.zeros((tokens, width), tl.float32)
    of_gain = tl.zeros((tokens, width), tl.float32)
    of_floor = tl.zeros((tokens, width), tl.float32)
    for tile in range(part * each, (part + 1) * each):
        token = tile * tokens + tl.arange(0, tokens)
        there = token < count
        used = there[:, None] & valid[None, :]
        peak, norm, length = read_facts(facts, image, count, token, there)
        x = read(query, token, channel, query_token, query_channel, used)
        found = features(x, gain, floor, channel, valid, used)
        sharp = raise_to(found / peak, power) * (norm / length)
        share = tl.sum(sharp * mean[None, :], 1)[:, None] + epsilon
        outer = read(gradient, token, channel, gradient_token, gradient_channel, used) / share
        result = tl.dot(sharp, state, input_precision=precision)
        of_share = -tl.sum(outer * result, 1)[:, None] / share
        of_state = tl.dot(tl.trans(sharp), outer, of_state, input_precision=precision)
        of_mean += of_share * sharp
        of_sharp = tl.dot(outer, tl.trans(state), input_precision=precision) + of_share * mean[None, :]
        product = tl.load(products + image * count + token, mask=there, other=0.0)
        of_features = _through_focus(found, of_sharp, peak, norm, length, product, used, power)
        of_input, its_gain, its_floor = _through_features(x, of_features, gain, floor, channel, valid)
        of_gain += its_gain
        of_floor += its_floor
        target = of_query + (image * count + token[:, None]) * (heads * dim) + channel[None, :]
        tl.store(target, of_input.to(of_query.dtype.element_ty), mask=used)
    of_sums += own.to(tl.int64) * (heads * dim * (dim + 1))
    tl.store(of_sums + at, of_state, mask=square)
    tl.store(of_sums + heads * dim * dim + channel, tl.sum(of_mean, 0), mask=valid)
    of_features_sums += own.to(tl.int64) * (2 * heads * dim) + channel
    tl.store(of_features_sums, tl.sum(of_gain, 0), mask=valid)
    tl.store(of_features_sums + heads * dim, tl.sum(of_floor, 0), mask=valid)


@triton.jit
@no_type_check
def _key_products(
    key,
    value,
    position,
    gain,
    floor,
    facts,
    of_sums,
    products,
    tiles,
    scale,
    count,
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
    image, head = (own // tiles).to(tl.int64), tl.program_id(0) % heads
    channel, valid, at, square = head_of(head, dim, width)
    token = own % tiles * tokens + tl.arange(0, tokens)
    there = token < count
    used = there[:, None] & valid[None, :]
    peak, norm, length = read_facts(facts, image, count, token, there)
    x = read_input(key + image * key_batch, position, token, channel, key_token, key_channel, used, heads * dim)
    sharp = raise_to(features(x, gain, floor, channel, valid, used) / peak, power) * (norm / length)
    of_sums += image * (heads * dim * (dim + 1))
    of_state, of_mean = read_state(of_sums, scale, channel, valid, at, square, heads, dim)
    of_value = tl.dot(sharp, of_state, input_precision=precision)
    its_value = read(value + image * value_batch, token, channel, value_token, value_channel, used)
    product = tl.sum(its_value * of_value + sharp * of_mean[None, :], 1)
    tl.store(products + (image * heads + head) * count + token, product, mask=there)


@triton.jit
@no_type_check
def _key_gradients(
    key,
    value,
    position,
    gain,
    floor,
    facts,
    of_sums,
    products,
    gradient,
    weight,
    of_key,
    of_value,
    of_features_sums,
    tiles,
    scale,
    count,
    key_batch,
    key_token,
    key_channel,
    value_batch,
    value_token,
    value_channel,
    gradient_batch,
    gradient_token,
    gradient_channel,
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
    x = read_input(key + image * key_batch, position, token, channel, key_token, key_channel, used, heads * dim)
    found = features(x, gain, floor, channel, valid, used)
    sharp = raise_to(found / peak, power) * (norm / length)
    of_sums += image * (heads * dim * (dim + 1))
    of_state, of_mean = read_state(of_sums, scale, channel, valid, at, square, heads, dim)
    its_value = read(value + image * value_batch, token, channel, value_token, value_channel, used)
    of_sharp = tl.dot(its_value, tl.trans(of_state), input_precision=precision) + of_mean[None, :]
    product = tl.load(products + image * count + token, mask=there, other=0.0)
    of_features = _through_focus(found, of_sharp, peak, norm, length, product, used, power)
    of_input, of_gain, of_floor = _through_features(x, of_features, gain, floor, channel, valid)
    of_features_sums += own.to(tl.int64) * (2 * heads * dim) + channel
    tl.store(of_features_sums, tl.sum(of_gain, 0), mask=valid)
    tl.store(of_features_sums + heads * dim, tl.sum(of_floor, 0), mask=valid)
    at = (image * count + token[:, None]) * (heads * dim) + channel[None, :]
    tl.store(of_key + at, of_input.to(of_key.dtype.element_ty), mask=used)
    result = tl.dot(sharp, of_state, input_precision=precision)
    if weight is not None:
        result += convolved(
            gradient + image * gradient_batch,
            weight,
            row,
            column,
            on_map,
            channel,
            valid,
            gradient_token,
            gradient_channel,
            first,
            map_height,
            map_width,
            kernels,
            side,
            True,
            tokens,
            width,
        )
    tl.store(of_value + at, result.to(of_value.dtype.element_ty), mask=used)


@triton.jit
@no_type_check
def _kernel_gradients(
    value,
    gradient,
    sums,
    rectangles,
    all_rectangles,
    each,
    value_batch,
    value_token,
    value_channel,
    gradient_batch,
    gradient_token,
    gradient_channel,
    first,
    map_height,
    map_width,
    tile_height: tl.constexpr,
    tile_width: tl.constexpr,
    channels: tl.constexpr,
    side: tl.constexpr,
    width: tl.constexpr,
):
    blocks = tl.cdiv(channels, width)
    part = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * width + tl.arange(0, width)
    valid = channel < channels
    before = tl.cdiv(first, tile_height * tile_width)
    last = tl.minimum((part + 1) * each, all_rectangles)
    sums += part.to(tl.int64) * ((side * side + 1) * channels) + channel
    for tap in range(side * side + 1):
        down, right = tap // side - side // 2, tap % side - side // 2
        total = tl.zeros((tile_height * tile_width, width), tl.float32)
        for index in range(part * each, last):
            image = (index // rectangles).to(tl.int64)
            tile = before + index % rectangles
            token, _, on_map, row, column = places(tile, first, map_height, map_width, tile_height, tile_width)
            used = on_map[:, None] & valid[None, :]
            outer = read(gradient + image * gradient_batch, token, channel, gradient_token, gradient_channel, used)
            if tap < side * side:
                near = (row + down >= 0) & (row + down < map_height)
                near = near & (column + right >= 0) & (column + right < map_width)
                shifted = token + down * map_width + right
                used = used & near[:, None]
                outer *= read(value + image * value_batch, shifted, channel, value_token, value_channel, used)
            total += outer
        tl.store(sums + tap * channels, tl.sum(total, 0), mask=valid)


def _of_kernels(value: Tensor, gradient: Tensor, weight: Tensor, tiling: Map, plan: Plan) -> tuple[Tensor, Tensor]:
    """Gradients for the kernels and, as for one more tap, for the biases."""
    batch, _, channels = value.shape
    kernels, side, width = weight.shape[0], weight.shape[2], min(triton.next_power_of_2(channels), 64)
    parts, each = plan.parts(batch * tiling.rectangles, ceil(channels, width))
    sums = value.new_empty(parts, side * side + 1, channels, dtype=torch.float32)
    numbers = (tiling.rectangles, batch * tiling.rectangles, each, *value.stride(), *gradient.stride())
    sizes = {"channels": channels, "side": side, "width": width}
    grid = (parts * ceil(channels, width),)
    _kernel_gradients[grid](value, gradient, sums, *numbers, **tiling.constants(), **sizes)
    shared = sums.sum(0).reshape(-1, channels // kernels, kernels).sum(1)
    return shared[:-1].t().reshape(weight.shape), shared[-1].clone()


def gradients(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position: Tensor | None,
    gain: Tensor | None,
    floor: Tensor,
    weight: Tensor | None,
    num_heads: int,
    power: Number,
    epsilon: float,
    hw: Size,
) -> tuple[Tensor, ...]:
    """See `leap_flatten.ops.reference.gradients`."""
    if not query.numel():
        tensors = (gradient, query, key, value, position, gain, floor, weight)
        return reference.gradients(*tensors, num_heads, power, epsilon, hw)
    (batch, count, channels), keys = query.shape, key.shape[1]
    position, gain, floor, weight = contiguous(position, gain, floor, weight)
    plan = Plan.of(query, num_heads, power)
    tiling = Map.of(keys, weight, hw, plan.tokens)
    of_query, of_key, of_value = (x.new_empty(x.shape) for x in (query, key, value))
    scale, constants = 1 / keys, plan.constants()
    of_keys = measured(key, position, gain, floor, plan)
    sums = states(key, value, position, gain, floor, of_keys, plan)

    tiles = ceil(count, plan.tokens)
    parts, each = plan.parts(tiles, batch * num_heads)
    products = sums.new_empty(batch, num_heads, count)
    of_sums = sums.new_empty(batch, parts, channels * (plan.dim + 1))
    of_features = sums.new_empty(batch * (parts + tiling.tiles), 2, channels)
    given: tuple[Any, ...] = (query, gradient, gain, floor, measured(query, None, gain, floor, plan), sums)
    numbers: tuple[Any, ...] = (scale, epsilon, count, *query.stride(), *gradient.stride())
    _query_products[(batch * tiles * num_heads,)](*given, products, tiles, *numbers, **constants)
    found: tuple[Any, ...] = (products.sum(1), of_query, of_sums, of_features)
    constants |= {"num_warps": 8, "num_stages": 1}  # these hold the most: other kernels can wait for more loads at once
    _query_gradients[(batch * parts * num_heads,)](*given, *found, parts, each, *numbers, **constants)

    tiles = ceil(keys, plan.tokens)
    products = sums.new_empty(batch, num_heads, keys)
    given = (key, value, position, gain, floor, of_keys, of_sums.sum(1))
    numbers = (scale, keys, *key.stride(), *value.stride())
    _key_products[(batch * tiles * num_heads,)](*given, products, tiles, *numbers, **constants)
    found = (products.sum(1), gradient, weight, of_key, of_value, of_features[batch * parts :])
    kernels, side = (1, 1) if weight is None else (weight.shape[0], weight.shape[2])
    constants |= {**tiling.constants(), "kernels": kernels, "side": side}
    numbers = (tiling.tiles, *numbers, *gradient.stride())
    _key_gradients[(batch * tiling.tiles * num_heads,)](*given, *found, *numbers, **constants)

    of_gain, of_floor = of_features.sum(0)
    if gain is None:
        of_gain = of_gain[:0]
    if weight is None:
        return of_query, of_key, of_value, of_gain, of_floor, of_floor[:0], of_floor[:0]
    return of_query, of_key, of_value, of_gain, of_floor, *_of_kernels(value, gradient, weight, tiling, plan)
