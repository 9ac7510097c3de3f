"""Focused linear attention by its N x N matrices, in float64: what the operators are measured against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def focused(x: Tensor, scale: Tensor, power: float) -> Tensor:
    """Features of all channels, sharpened."""
    t = (x.clamp_min(0) + 1e-6) / torch.log1p(torch.exp(scale))
    raised = (t / t.amax(-1, keepdim=True)) ** power  # the largest cancels; 1e-6 ** 32 is 0 in float64 too
    return raised / raised.square().sum(-1, keepdim=True).sqrt() * t.square().sum(-1, keepdim=True).sqrt()


def stretching(count: int, keys: int) -> Tensor:
    """Linear interpolation along the flattened tokens, align_corners False, as a matrix (count, keys)."""
    matrix = torch.zeros(count, keys, dtype=torch.float64)
    for row in range(count):
        source = max((row + 0.5) * keys / count - 0.5, 0.0)
        left = min(math.floor(source), keys - 1)
        matrix[row, left] += 1 - (source - left)
        matrix[row, min(left + 1, keys - 1)] += source - left
    return matrix


def convolution(kernels: Tensor, hw: tuple[int, int]) -> Tensor:
    """Zero-padded depthwise convolution of a map as matrices (kernels, places, places)."""
    places, side = hw[0] * hw[1], kernels.shape[-1]
    matrices = torch.zeros(len(kernels), places, places, dtype=torch.float64)
    for place in range(places):
        for row in range(side):
            for column in range(side):
                y, x = place // hw[1] + row - side // 2, place % hw[1] + column - side // 2
                if 0 <= y < hw[0] and 0 <= x < hw[1]:
                    matrices[:, place, y * hw[1] + x] = kernels[:, 0, row, column]
    return matrices


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    scale: Tensor,
    pos: Tensor | None = None,
    dwc_weight: Tensor | None = None,
    dwc_bias: Tensor | None = None,
    p: float = 3,
    hw: tuple[int, int] | None = None,
    denominator: str = "mean",
    prefix_tokens: int = 0,
    **_: Any,
) -> Tensor:
    """The function of the same arguments, each head and channel by its own matrix."""
    q, k, v, scale = (x.detach().double() for x in (q, k, v, scale.reshape(-1)))
    k = k if pos is None else k + pos.detach().double()
    q, k = focused(q, scale, p), focused(k, scale, p)
    (batch, count, channels), keys, dim = q.shape, k.shape[1], q.shape[2] // num_heads
    out = torch.empty(batch, count, channels, dtype=torch.float64)
    for channel in range(channels):
        head = slice(channel // dim * dim, (channel // dim + 1) * dim)
        products = q[..., head] @ k[..., head].transpose(1, 2)
        total = products.sum(2, keepdim=True)
        share = total + 1e-6 if denominator == "sum" else total + 1e-6 * keys
        out[..., channel] = (products / share @ v[..., channel, None])[..., 0]
    if dwc_weight is not None:
        assert hw is not None
        kernels = dwc_weight.detach().double().repeat(channels // len(dwc_weight), 1, 1, 1)
        image = v[:, prefix_tokens:] if keys == count else stretching(count, keys) @ v
        out[:, prefix_tokens:] += torch.einsum("cij,bjc->bic", convolution(kernels, hw), image)
        if dwc_bias is not None:
            out[:, prefix_tokens:] += dwc_bias.detach().double().repeat(channels // len(dwc_weight))
    return out
