"""CSWin body (Dong et al. 2022): attention in stripes of columns and of rows at once, with LePE."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from leap_shared.errors import UserError
from leap_shared.vision.bodies.common import Body, Names
from leap_shared.vision.bodies.grids import Number, Size, Tokens, merge, pad_map, partition, to_image, to_map, to_tokens
from leap_shared.vision.bodies.parts import AttentionFactory, Block, Site, conv_embed, resize

__all__ = ["CSWin", "CSWinBlock", "LePEAttention"]


class LePEAttention(nn.Module):
    """Softmax attention inside stripes, plus LePE: a 3x3 depthwise convolution of the values, zero-padded there."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.head_dim, self.attn_drop = site.dim // site.num_heads, site.attn_drop
        self.get_v = nn.Conv2d(site.dim, site.dim, 3, padding=1, groups=site.dim)

    def forward(
        self, qkv: Float[Tensor, "three stripes tokens channels"], hw: Size, first_channel: int = 0
    ) -> Float[Tensor, "stripes tokens channels"]:
        """Attend inside each stripe of `hw` tokens; the channels may be some of the module's, from `first_channel`."""
        channels = qkv.shape[3]
        query, key, value = qkv.reshape(*qkv.shape[:3], channels // self.head_dim, self.head_dim).transpose(2, 3)
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=self.attn_drop if self.training else 0.0)
        weight, bias = (p[first_channel : first_channel + channels] for p in self.get_v.parameters())
        local = F.conv2d(to_image(qkv[2], hw), weight, bias, padding=1, groups=channels)
        return out.transpose(1, 2).flatten(2) + to_tokens(local)


class CSWinBlock(Block):
    """Pre-norm block with one attention over the whole map, or two: half the channels in columns, half in rows.

    Args:
        site: place of the block; its `input_size` is the whole map.
        attention: makes a branch's attention from a site with its channels and heads and one stripe as `input_size`:
            a module called with ``(qkv, hw)``, qkv stacked as (3, stripes, tokens, channels).
        split: width of the stripes, an int in tokens (at most the shorter side of the map) or a float as a share of
            the map; 1.0 is the whole map in one branch.
    """

    def __init__(self, site: Site, attention: AttentionFactory | None, split: Number) -> None:
        if split < 1 if isinstance(split, int) else not 0 < split <= 1:
            raise UserError(f"split size {split}: expected an int >= 1, or a share of the map in (0, 1] as a float")
        super().__init__(site, None)
        self.split, self.plugged, self.attns = split, attention is not None, nn.ModuleList()
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=site.qkv_bias)
        self.proj = nn.Linear(site.dim, site.dim)
        stripes, _ = self._stripes(site.input_size)
        if site.num_heads % len(stripes):
            raise UserError(f"stage {site.stage + 1} has {site.num_heads} heads: its two branches need an even number")
        part = replace(site, dim=site.dim // len(stripes), num_heads=site.num_heads // len(stripes))
        for branch, stripe in enumerate(stripes):
            self.attns.append((attention or LePEAttention)(replace(part, input_size=stripe, branch=branch)))

    def _stripes(self, hw: Size) -> tuple[list[Size], Size]:
        """Height and width of each branch's stripes, and of the map padded so that they tile it."""
        share, built = self.split, len(self.attns)
        rows, columns = (min(share, *hw) if isinstance(share, int) else max(1, int(side * share)) for side in hw)
        covers = (rows, columns) == hw or (self.plugged and (built == 1 or min(rows, columns) == min(hw)))
        if built != 2 and covers:
            return [hw], hw
        height, width = -(-hw[0] // rows) * rows, -(-hw[1] // columns) * columns
        return [(height, columns), (rows, width)], (height, width)

    def set_input_size(self, hw: Size) -> None:
        """Resample what the branches hold; a plugged-in attention over the whole map goes on covering it."""
        for attn, stripe in zip(self.attns, self._stripes(hw)[0], strict=False):
            resize(attn, stripe)

    def attend(self, x: Tokens, hw: Size) -> Tokens:
        """Attention in stripes; where they do not tile the map, it is padded by zeros right and below."""
        stripes, padded = self._stripes(hw)
        image = pad_map(to_map(x, hw), padded)
        parts = self.qkv(image).reshape(*image.shape[:3], 3, image.shape[3]).chunk(len(stripes), -1)
        outputs = []
        for branch, (part, stripe) in enumerate(zip(parts, stripes, strict=True)):
            stacked = partition(part, stripe).movedim(2, 0)
            if len(self.attns) == len(stripes):
                out = self.attns[branch](stacked, stripe)
            else:  # built where one branch covered the map: its kernels serve both halves of the channels
                out = self.attns[0](stacked, stripe, branch * part.shape[-1])
            outputs.append(merge(out, stripe, padded))
        projected: Tensor = self.proj(torch.cat(outputs, -1)[:, : hw[0], : hw[1]].flatten(1, 2))
        return projected


class CSWin(Body):
    """CSWin Transformer with another attention in the blocks that `attn_type` names.

    Args:
        embed_dim: channels of the first stage; each stage doubles them.
        depths, num_heads, mlp_ratio: see `Body`.
        split_sizes: width of the stripes of softmax blocks by stage, see `CSWinBlock`; the last stage always has one
            branch. (1, 2, 0.5, 1.0) follows the image: its size / 32 in stage 3.
        attention_split_sizes: the same for `branch_attention`.
        attention: makes an attention that takes the place of the block's projections and branches.
        branch_attention: makes the attention of a branch, see `CSWinBlock`.
        **options: see `Body`.
    """

    first_conv = "stage1_conv_embed.0"

    def __init__(
        self,
        *,
        embed_dim: int = 64,
        depths: Sequence[int] = (1, 2, 21, 1),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: Number = 4,
        split_sizes: Sequence[Number] = (1, 2, 7, 7),
        attention_split_sizes: Sequence[Number] = (1.0, 1.0, 1.0, 1.0),
        attention: AttentionFactory | None = None,
        branch_attention: AttentionFactory | None = None,
        **options: Any,
    ) -> None:
        if attention is not None and branch_attention is not None:
            raise UserError("give attention, which replaces whole branches, or branch_attention, not both")
        if not len(split_sizes) == len(attention_split_sizes) == 4:
            raise UserError(f"split sizes {split_sizes} and {attention_split_sizes}: expected four numbers each")
        dims = [embed_dim << stage for stage in range(4)]
        super().__init__(dims, depths, num_heads, (mlp_ratio,) * 4, attention=attention or branch_attention, **options)
        self.attention, self.branch_attention = attention, branch_attention
        self.split_sizes, self.attention_split_sizes = split_sizes, attention_split_sizes
        self._assemble()

    def _names(self, stage: int) -> Names:
        return Names(f"stage{stage + 1}", f"merge{stage}" if stage else "stage1_conv_embed")

    def _embedding(self, stage: int, in_dim: int, dim: int) -> nn.Module:
        if stage == 0:
            return conv_embed(in_dim, dim, 7, 4, 2, ("0", "1", "2"))
        return conv_embed(in_dim, dim, 3, 2, 1, ("conv", "tokens", "norm"))

    def _block(self, site: Site) -> Block:
        if site.plugged and self.attention is not None:
            return Block(site, self.attention(site))
        splits = self.attention_split_sizes if site.plugged else self.split_sizes
        split = splits[site.stage] if site.stage < 3 else 1.0
        return CSWinBlock(site, self.branch_attention if site.plugged else None, split)
