"""Slide attention pixel by pixel and slot by slot, in float64: what everything else is measured against."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def place(at: int, length: int, mode: str) -> int | None:
    """Where in a row the number is that padding puts at `at`; None for a zero."""
    if 0 <= at < length:
        return at
    if mode == "zeros":
        return None
    if mode == "circular":
        return at % length
    if mode == "replicate":
        return min(max(at, 0), length - 1)
    return -at if at < 0 else 2 * (length - 1) - at


def convolved(x: Tensor, weight: Tensor, bias: Tensor, y: int, column: int, mode: str) -> Tensor:
    """The slots (batch, heads, dim, k * k) of one pixel of maps (batch, heads, dim, height, width)."""
    side, dim = weight.shape[-1], x.shape[2]
    slots = bias.reshape(dim, side * side).expand(*x.shape[:2], -1, -1)
    for tap_y in range(side):
        for tap_x in range(side):
            row = place(y + tap_y - side // 2, x.shape[3], mode)
            col = place(column + tap_x - side // 2, x.shape[4], mode)
            if row is not None and col is not None:
                slots = slots + weight[:, 0, tap_y, tap_x].reshape(dim, -1) * x[:, :, :, row, col, None]
    return slots


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor,
    bias: Tensor,
    rpb: Tensor | None = None,
    *,
    num_heads: int,
    kernel_size: int = 3,
    scale: float | None = None,
    value_weight: Tensor | None = None,
    value_bias: Tensor | None = None,
    rpb_on: str = "keys",
    mask_padding: bool = False,
    padding_mode: str = "zeros",
) -> Tensor:
    """`leap_slide.functional.slide_attention` of maps (batch, height, width, channels)."""
    batch, height, width, channels = q.shape
    dim, side = channels // num_heads, kernel_size
    q, k, v, weight, bias = (x.double() for x in (q, k, v, weight, bias))
    q, k, v = (x.reshape(batch, height, width, num_heads, dim).permute(0, 3, 4, 1, 2) for x in (q, k, v))
    of_values = (weight, bias)
    if value_weight is not None and value_bias is not None:
        of_values = (value_weight.double(), value_bias.double())
    rows = []
    for y in range(height):
        for x in range(width):
            query = q[:, :, :, y, x] * (dim**-0.5 if scale is None else scale)
            keys = convolved(k, weight, bias, y, x, padding_mode)
            if rpb is not None and rpb_on == "keys":
                keys = keys + rpb.double().reshape(1, num_heads, 1, side * side)
            logits = (query[..., None] * keys).sum(2)
            if rpb is not None and rpb_on == "logits":
                logits = logits + rpb.double().reshape(1, num_heads, side * side)
            if mask_padding:
                offsets = [(slot // side - side // 2, slot % side - side // 2) for slot in range(side * side)]
                seen = [0 <= y + dy < height and 0 <= x + dx < width for dy, dx in offsets]
                logits = logits.masked_fill(~torch.tensor(seen), -math.inf)
            values = convolved(v, *of_values, y, x, padding_mode)
            rows.append((logits.softmax(2)[:, :, None] * values).sum(3))  # batch, heads, dim
    return torch.stack(rows, 1).reshape(batch, height, width, channels)


def layer(x: Tensor, state: Mapping[str, Tensor], hw: tuple[int, int], num_heads: int) -> Tensor:
    """The released module on tokens (batch, height * width, dim) by the checkpoint's entries (see `SlideAttention`)."""
    state = {name: value.double() for name, value in state.items()}
    projected = x.double() @ state["qkv.weight"].T + state["qkv.bias"]
    dim = x.shape[2] // num_heads
    parts = []
    for part in range(3):
        channels = [head * 3 * dim + part * dim + channel for head in range(num_heads) for channel in range(dim)]
        parts.append(projected[..., channels].reshape(-1, *hw, x.shape[2]))
    weight = state["dep_conv.weight"] + state["dep_conv1.weight"]
    bias = state["dep_conv.bias"] + state["dep_conv1.bias"]
    table = state["relative_position_bias_table"]
    out = attention(*parts, weight, bias, table, num_heads=num_heads, kernel_size=weight.shape[-1])
    return out.flatten(1, 2) @ state["proj.weight"].T + state["proj.bias"]
