"""What the package is measured beside: the formula as a script holds it, and the bare products."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leap_flatten.attention import (
    CSWinFocusedLinearAttention,
    Focused,
    FocusedLinearAttention,
    PVTFocusedLinearAttention,
)
from leap_flatten.functional import EPSILON, Keys
from leap_shared.bench import copy_with
from leap_shared.vision.bodies.grids import Number, Size, Tokens, to_image

__all__ = ["EagerAttention", "Floor", "eager_attention", "eager_copy"]

Module = TypeVar("Module", bound=nn.Module)


def eager_attention(
    query: Tokens,
    key: Keys,
    value: Keys,
    position: Tensor,
    scale: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_heads: int,
    power: Number,
    hw: Size,
) -> Tokens:
    """Focused linear attention between its projections, one PyTorch operator for each step of the formula."""
    batch, count, channels = query.shape
    dim = channels // num_heads
    key = key + position
    query, key = ((x.relu() + EPSILON) / F.softplus(scale) for x in (query, key))
    query_norm, key_norm = (x.norm(dim=-1, keepdim=True) for x in (query, key))
    query, key = query**power, key**power
    query = query / query.norm(dim=-1, keepdim=True) * query_norm
    key = key / key.norm(dim=-1, keepdim=True) * key_norm
    query, key, value = (x.reshape(batch, -1, num_heads, dim).permute(0, 2, 1, 3) for x in (query, key, value))
    share = 1 / (query @ key.mean(dim=2, keepdim=True).transpose(2, 3) + EPSILON)
    half = key.shape[2] ** -0.5
    out = query @ ((key.transpose(2, 3) * half) @ (value * half)) * share
    image = value.transpose(2, 3).reshape(batch * num_heads, dim, *hw)
    convolved = F.conv2d(image, weight, bias, padding=weight.shape[2] // 2, groups=dim)
    merged: Tensor = out.transpose(1, 2).reshape(batch, count, channels)
    return merged + convolved.reshape(batch, channels, count).transpose(1, 2)


class EagerAttention(nn.Module):
    """A layer of this package by `eager_attention`, with the layer's own parameters and, for CSWin, its LePE.

    It has the mean denominator, and neither class tokens nor PVT's spatial reduction.
    """

    def __init__(self, layer: Focused) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, hw: Size | None = None) -> Tokens:
        """What the layer gives, on the map that its positional encoding is for."""
        layer: Any = self.layer
        hw = hw or layer.grid
        if isinstance(layer, CSWinFocusedLinearAttention):
            value = x[2]
            lepe: Tensor = layer.get_v(to_image(value, hw)).flatten(2).transpose(1, 2)
            return self.attend(x[0], x[1], value, hw) + lepe
        if isinstance(layer, PVTFocusedLinearAttention):
            query, (key, value) = layer.q(x), layer.kv(x).chunk(2, 2)
        else:
            query, key, value = layer.qkv(x).chunk(3, 2)
        out: Tensor = layer.proj(self.attend(query, key, value, hw))
        return out

    def attend(self, query: Tokens, key: Keys, value: Keys, hw: Size) -> Tokens:
        """What `Focused.attend` gives."""
        layer = self.layer
        tensors = (layer.positional_encoding, layer.scale, layer.dwc.weight, layer.dwc.bias)
        return eager_attention(query, key, value, *tensors, layer.num_heads, layer.focusing_factor, hw)


def eager_copy(model: Module) -> Module:
    """A copy of a model in which `EagerAttention` computes this package's layers."""
    return copy_with(model, Focused, EagerAttention)


class Floor(nn.Module):
    """The products and the convolution of a layer alone, on operands that lie as suits them best.

    No feature map, no norms, no division, nothing copied or added: what a layer takes above it is its own to lose. It
    is no strict bound, since a layer that goes over its tokens in blocks finds them in the cache.

    Args:
        layer: whose parameters are taken.
        x: its input.
        hw: height and width of the map.
    """

    def __init__(self, layer: FocusedLinearAttention, x: Tokens, hw: Size) -> None:
        super().__init__()
        self.layer, self.x = layer, x
        with torch.no_grad():
            packed = layer.qkv(x)
            parts = packed.unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)
            query, key, value = (part.contiguous() for part in parts)
            image = to_image(packed[..., 2 * x.shape[2] :].contiguous(), hw)
        self.operands = [part.requires_grad_(x.requires_grad) for part in (query, key, value, image)]

    def forward(self) -> tuple[Tensor, ...]:
        """Projections of the input and of the output, state, its products with the queries, convolution."""
        query, key, value, image = self.operands
        layer = self.layer
        state = key.transpose(1, 2) @ value
        bias = layer.dwc.bias
        assert bias is not None  # noqa: S101 - for the type checker
        kernels = layer.dwc.weight.repeat(layer.num_heads, 1, 1, 1), bias.repeat(layer.num_heads)
        convolved = F.conv2d(image, *kernels, padding=kernels[0].shape[2] // 2, groups=image.shape[1])
        return layer.qkv(self.x), query @ state, convolved, layer.proj(self.x)
