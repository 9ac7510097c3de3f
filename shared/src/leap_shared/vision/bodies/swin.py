"""Swin body (Liu et al. 2021): shifted windows, or another attention over the map or over windows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers import PatchEmbed, trunc_normal_
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from leap_shared.errors import UserError
from leap_shared.vision.bodies.common import Body, Names
from leap_shared.vision.bodies.grids import (
    Number,
    Size,
    Tokens,
    merge,
    pad_map,
    partition,
    replace_data,
    resample_grid,
    to_map,
)
from leap_shared.vision.bodies.parts import AttentionFactory, Block, Site, resize

__all__ = ["Swin", "SwinBlock", "WindowAttention"]


def _relative_position_index(window: int, device: torch.device | None = None) -> Int[Tensor, "tokens tokens"]:
    """Row of the bias table of each pair: (dy + w - 1)(2w - 1) + (dx + w - 1), query minus key."""
    place = torch.arange(window * window, device=device)
    row, column = place // window, place % window
    return (row[:, None] - row + window - 1) * (2 * window - 1) + column[:, None] - column + window - 1


class WindowAttention(nn.Module):
    """Softmax attention inside square windows, with a learned bias for each relative position."""

    relative_position_index: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.num_heads, self.window, self.attn_drop = site.num_heads, site.input_size[0], site.attn_drop
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=site.qkv_bias)
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * self.window - 1) ** 2, site.num_heads))
        trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", _relative_position_index(self.window), persistent=False)
        self.proj = nn.Linear(site.dim, site.dim)
        self.proj_drop = nn.Dropout(site.proj_drop)

    def _table_and_index(self, window: int) -> tuple[Tensor, Tensor]:
        table, index = self.relative_position_bias_table, self.relative_position_index
        if window == self.window:
            return table, index
        old, new = 2 * self.window - 1, 2 * window - 1
        resampled = resample_grid(table[None], (old, old), (new, new))[0]
        return resampled, _relative_position_index(window, index.device)

    def set_input_size(self, hw: Size) -> None:
        """Resample the bias table where the window is another one."""
        table, self.relative_position_index = self._table_and_index(hw[0])
        replace_data(self.relative_position_bias_table, table)
        self.window = hw[0]

    def forward(self, x: Tokens, hw: Size, mask: Tensor | None = None) -> Tokens:
        """Attend inside each window; `mask` (windows of one image, tokens, tokens) is added to the logits."""
        query, key, value = (
            self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, x.shape[2] // self.num_heads).permute(2, 0, 3, 1, 4)
        )
        table, index = self._table_and_index(hw[0])
        bias = table[index].permute(2, 0, 1)[None]
        if mask is not None:
            bias = (bias + mask[:, None]).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)
        dropout = self.attn_drop if self.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        merged = out.transpose(1, 2)
        if torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling():
            # Exporters trace with and without gradients, which decides where the attention's output lies in memory.
            merged = merged.clone(memory_format=torch.contiguous_format)
        projected: Tensor = self.proj_drop(self.proj(merged.flatten(2)))
        return projected


class SwinBlock(Block):
    """Pre-norm block whose attention sees windows of the map; odd blocks shift them by half a window.

    Args:
        site: place of the block; its `input_size` is the whole map.
        attention: makes the attention from a site whose `input_size` is one window.
        window: side of the square windows, at most the shorter side of the map; None gives the whole map.
        masked: keep tokens from different sides of the map apart in shifted windows: the attention takes `mask`.
    """

    attn_mask: Tensor | None

    def __init__(self, site: Site, attention: AttentionFactory, window: int | None, masked: bool) -> None:
        if window is not None and window < 1:
            raise UserError(f"window size {window}: expected 1 or more tokens, or None for the whole map")
        side = min(window or 1, *site.input_size)
        attn = attention(site if window is None else replace(site, input_size=(side, side)))
        super().__init__(site, attn)
        self.window, self.shifted, self.masked, self.input_size = window, site.block % 2 == 1, masked, site.input_size
        self.register_buffer("attn_mask", self._mask(site.input_size), persistent=False)

    def _windows(self, hw: Size) -> tuple[Size, int, Size]:
        """Window, shift, and size of the map padded so that the windows tile it."""
        if self.window is None:
            return hw, 0, hw
        side = min(self.window, *hw)
        shift = side // 2 if self.shifted and min(hw) > self.window else 0
        return (side, side), shift, (-(-hw[0] // side) * side, -(-hw[1] // side) * side)

    def _mask(self, hw: Size) -> Float[Tensor, "windows tokens tokens"] | None:
        """-100 where query and key of a shifted window come from different sides of the map, else 0."""
        window, shift, padded = self._windows(hw)
        if not (shift and self.masked):
            return None
        like = self.norm1.weight
        places = [torch.arange(length, device=like.device) for length in padded]
        rows, columns = ((p >= len(p) - window[0]).int() + (p >= len(p) - shift).int() for p in places)
        region = partition((rows[:, None] * 3 + columns)[None], window)
        return torch.where(region[:, :, None] == region[:, None], 0.0, -100.0).to(like.dtype)

    def set_input_size(self, hw: Size) -> None:
        """Resample the attention's tables where the window changes, and make the mask anew."""
        resize(self.attn, self._windows(hw)[0])
        self.input_size, self.attn_mask = hw, self._mask(hw)

    def attend(self, x: Tokens, hw: Size) -> Tokens:
        """Attention inside windows; where they do not tile the shifted map, it is padded by zeros right and below."""
        window, shift, padded = self._windows(hw)
        mask = self.attn_mask if hw == self.input_size else self._mask(hw)
        image = to_map(x, hw)
        if shift:
            image = image.roll((-shift, -shift), (1, 2))
        windows = partition(pad_map(image, padded), window)
        windows = self.attn(windows, window) if mask is None else self.attn(windows, window, mask)
        image = merge(windows, window, padded)[:, : hw[0], : hw[1]]
        if shift:
            image = image.roll((shift, shift), (1, 2))
        return image.flatten(1, 2)


class _Merging(PatchMerging):  # type: ignore[misc] # timm's layers are untyped
    def forward(self, x: Tensor) -> Tensor:
        merged: Tensor = super().forward(x.permute(0, 2, 3, 1))
        return merged.flatten(1, 2)


class Swin(Body):
    """Swin Transformer with another attention in the blocks that `attn_type` names.

    Args:
        embed_dim: channels of the first stage; each stage doubles them.
        depths, num_heads, mlp_ratio: see `Body`.
        window_size: side of the windows of the plugged-in attention (shifted in odd blocks, never masked); None lets
            it see the whole map at every size.
        softmax_window: side of the windows of softmax blocks.
        ape: add an absolute position embedding to the patches.
        **options: see `Body`.
    """

    first_conv = "patch_embed.proj"

    def __init__(
        self,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: Number = 4,
        window_size: int | None = None,
        softmax_window: int = 7,
        ape: bool = False,
        **options: Any,
    ) -> None:
        super().__init__([embed_dim << stage for stage in range(4)], depths, num_heads, (mlp_ratio,) * 4, **options)
        self.window_size, self.softmax_window, self.ape = window_size, softmax_window, ape
        self.layers = nn.ModuleList(nn.ModuleDict() for _ in range(4))
        self._assemble()

    def _names(self, stage: int) -> Names:
        embedding = f"layers.{stage - 1}.downsample" if stage else "patch_embed"
        return Names(f"layers.{stage}.blocks", embedding, "absolute_pos_embed" if self.ape and stage == 0 else "")

    def _embedding(self, stage: int, in_dim: int, dim: int) -> nn.Module:
        return _Merging(in_dim, dim) if stage else PatchEmbed(None, 4, in_dim, dim, norm_layer=nn.LayerNorm)

    def _block(self, site: Site) -> Block:
        if site.plugged and self.attention is not None:
            return SwinBlock(site, self.attention, self.window_size, masked=False)
        return SwinBlock(site, WindowAttention, self.softmax_window, masked=True)
