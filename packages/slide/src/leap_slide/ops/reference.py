"""Slide attention one tap at a time, and its gradient: no k*k copies of keys or values are ever made.

With W the summed kernels and b the summed biases of the two convolutions, slot i of a pixel has the logit
sum_t sum_j W[j,i,t] q_j k_j(x+t) + q . b_i + R_i sum_j q_j, and the output is
sum_t v_j(x+t) sum_i a_i W[j,i,t] + sum_i a_i b[j,i] (section 3 of the paper, rearranged).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = [
    "Bias",
    "Maps",
    "Padded",
    "Slots",
    "Taps",
    "forward",
    "gradients",
    "inside",
    "pad",
    "shares",
    "side_of",
    "widest",
]

Maps = Float[Tensor, "batch heads dim height width"]
Padded = Float[Tensor, "batch heads dim padded_height padded_width"]
Slots = Float[Tensor, "batch heads slots height width"]
Taps = Float[Tensor, "dim slots taps"]
Bias = Float[Tensor, "dim slots"]
Extent = tuple[int | torch.SymInt, int | torch.SymInt]
"""Height and width, which graphs of dynamic shapes leave open."""


def widest(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in."""
    return dtype if dtype == torch.float64 else torch.float32


def side_of(weight: Taps) -> int:
    """Kernel size k of weights with k * k taps."""
    return math.isqrt(weight.shape[2])


def _as(like: Tensor, x: Tensor) -> Tensor:
    """`x` in the dtype and memory order of `like`, which compiled graphs rely on."""
    order = sorted(range(like.ndim), key=like.stride, reverse=True)
    back = [order.index(dimension) for dimension in range(like.ndim)]  # copy_ has no form in ONNX
    return x.to(like.dtype).permute(order).clone(memory_format=torch.contiguous_format).permute(back)


def pad(x: Maps, radius: int) -> Padded:
    """Zeros around every map."""
    return F.pad(x, (radius,) * 4)


def inside(size: Extent, side: int, device: torch.device) -> Bool[Tensor, "slots height width"]:
    """Whether the pixel that a slot's plain shift reads is inside the map."""
    radius = side // 2
    offset = torch.arange(side, device=device) - radius
    within = []
    for length in size:
        place = torch.arange(length, device=device) + offset[:, None]
        within.append((place >= 0) & (place < length))
    return (within[0][:, None, :, None] & within[1][None, :, None, :]).flatten(0, 1)


def _shifts(x: Padded, side: int, size: Extent) -> Iterator[Maps]:
    """The map as each tap sees it, row by row."""
    for tap in range(side * side):
        row, column = divmod(tap, side)
        yield x[..., row : row + size[0], column : column + size[1]]


def _to_slots(x: Maps, weight: Bias) -> Slots:
    """Product over the channels of a head."""
    return torch.einsum("bhdyx,di->bhiyx", x, weight)


def _to_dim(x: Slots, weight: Bias) -> Maps:
    """Product over slots."""
    return torch.einsum("bhiyx,di->bhdyx", x, weight)


def _scores(query: Maps, key: Padded, weight: Taps, bias: Bias) -> Slots:
    """Query . (convolved key + bias) for every slot, without the convolved keys."""
    out = _to_slots(query, bias)
    for tap, shifted in enumerate(_shifts(key, side_of(weight), (query.shape[3], query.shape[4]))):
        out = out + _to_slots(query * shifted, weight[:, :, tap])
    return out


def _mix(share: Slots, value: Padded, weight: Taps, bias: Bias) -> Maps:
    """Sum over slots of share * (convolved value + bias), without the convolved values."""
    out = _to_dim(share, bias)
    for tap, shifted in enumerate(_shifts(value, side_of(weight), (share.shape[3], share.shape[4]))):
        out = out + shifted * _to_dim(share, weight[:, :, tap])
    return out


def shares(
    query: Maps,
    key: Padded,
    weight: Taps,
    bias: Bias,
    position: Float[Tensor, "heads slots"] | None,
    scale: float,
    on_logits: bool,
    masked: bool,
) -> Slots:
    """Softmax over the slots of each pixel."""
    logits = _scores(query * scale, key, weight, bias)
    if position is not None:
        factor = 1.0 if on_logits else (query * scale).sum(2, keepdim=True)
        logits = logits + position[:, :, None, None] * factor
    if masked:
        logits = logits.where(inside((query.shape[3], query.shape[4]), side_of(weight), query.device), -math.inf)
    return logits.softmax(2)


def _of_values(
    key_weight: Taps, key_bias: Bias, value_weight: Taps | None, value_bias: Bias | None
) -> tuple[Taps, Bias]:
    """Kernels of the values: their own, or the keys'."""
    if value_weight is None or value_bias is None:
        return key_weight, key_bias
    return value_weight, value_bias


def forward(
    query: Maps,
    key: Padded,
    value: Padded,
    key_weight: Taps,
    key_bias: Bias,
    value_weight: Taps | None,
    value_bias: Bias | None,
    position: Float[Tensor, "heads slots"] | None,
    keep: Slots | None,
    scale: float,
    on_logits: bool,
    masked: bool,
    padded: bool,
) -> Maps:
    """Local attention of every pixel to the slots that convolutions make of its neighbours."""
    given, wide = query, widest(query.dtype)
    query, key, value, key_weight, key_bias = (x.to(wide) for x in (query, key, value, key_weight, key_bias))
    value_weight, value_bias, position, keep = (
        None if x is None else x.to(wide) for x in (value_weight, value_bias, position, keep)
    )
    if not padded:
        key, value = (pad(x, side_of(key_weight) // 2) for x in (key, value))
    share = shares(query, key, key_weight, key_bias, position, scale, on_logits, masked)
    if keep is not None:
        share = share * keep
    weight, bias = _of_values(key_weight, key_bias, value_weight, value_bias)
    return _as(given, _mix(share, value, weight, bias))


def _scatter(source: Maps, share: Slots, weight: Taps, radius: int) -> Padded:
    """Gradient of `_scores` for its keys, and of `_mix` for its values: what pixels send to their neighbours."""
    side, (height, width) = side_of(weight), source.shape[3:]
    total = source.new_zeros(*source.shape[:3], height + 2 * radius, width + 2 * radius)
    for tap in range(side * side):
        row, column = divmod(tap, side)
        sent = source * _to_dim(share, weight[:, :, tap])
        total = total + F.pad(sent, (column, 2 * radius - column, row, 2 * radius - row))
    return total


def _weight_gradient(source: Maps, other: Padded, share: Slots, side: int) -> Taps:
    """Gradient of `_scores` (share: that of the logits) and of `_mix` (source: that of the output) for the weights."""
    shifts = _shifts(other, side, (source.shape[3], source.shape[4]))
    return torch.stack([torch.einsum("bhdyx,bhiyx->di", source * shifted, share) for shifted in shifts], 2)


def gradients(
    gradient: Maps,
    query: Maps,
    key: Padded,
    value: Padded,
    key_weight: Taps,
    key_bias: Bias,
    value_weight: Taps | None,
    value_bias: Bias | None,
    position: Float[Tensor, "heads slots"] | None,
    keep: Slots | None,
    scale: float,
    on_logits: bool,
    masked: bool,
    padded: bool,
) -> tuple[Tensor, ...]:
    """Gradients of `forward` for all but `keep`, in order; empty where there is none."""
    given, wide = (query, key, value), widest(query.dtype)
    gradient, query, key, value, key_weight, key_bias = (
        x.to(wide) for x in (gradient, query, key, value, key_weight, key_bias)
    )
    value_weight, value_bias, position, keep = (
        None if x is None else x.to(wide) for x in (value_weight, value_bias, position, keep)
    )
    side, (height, width) = side_of(key_weight), query.shape[3:]
    radius = side // 2
    if not padded:
        key, value = pad(key, radius), pad(value, radius)
    weight, bias = _of_values(key_weight, key_bias, value_weight, value_bias)
    plain = shares(query, key, key_weight, key_bias, position, scale, on_logits, masked)
    share = plain if keep is None else plain * keep
    of_share = _scores(gradient, value, weight, bias)
    if keep is not None:
        of_share = of_share * keep
    of_logits = plain * (of_share - (plain * of_share).sum(2, keepdim=True))
    of_value = _scatter(gradient, share, weight, radius)
    of_key = _scatter(query * scale, of_logits, key_weight, radius)
    of_query = _mix(of_logits, key, key_weight, key_bias) * scale
    of_position = query.new_zeros(0)
    if position is not None:
        factor = 1.0 if on_logits else (query * scale).sum(2, keepdim=True)
        of_position = (of_logits * factor).sum((0, 3, 4))
        if not on_logits:
            of_query = of_query + torch.einsum("bhiyx,hi->bhyx", of_logits, position)[:, :, None] * scale
    of_weight = _weight_gradient(query * scale, key, of_logits, side)
    of_bias = torch.einsum("bhdyx,bhiyx->di", query * scale, of_logits)
    of_value_weight = _weight_gradient(gradient, value, share, side)
    of_value_bias = torch.einsum("bhdyx,bhiyx->di", gradient, share)
    if value_weight is None:
        of_weight, of_bias = of_weight + of_value_weight, of_bias + of_value_bias
        of_value_weight, of_value_bias = query.new_zeros(0), query.new_zeros(0)
    if not padded:
        of_key, of_value = (x[..., radius : radius + height, radius : radius + width] for x in (of_key, of_value))
    inputs = (_as(like, x) for x, like in zip((of_query, of_key, of_value), given, strict=True))
    tables = (of_weight, of_bias, of_value_weight, of_value_bias, of_position)
    return *inputs, *(x.contiguous() for x in tables)
