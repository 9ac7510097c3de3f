"""PVT and PVTv2 bodies (Wang et al. 2021, 2022): spatial-reduction attention, or another one, on the whole map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from timm.layers import PatchEmbed
from torch import Tensor, nn

from leap_shared.errors import UserError
from leap_shared.vision.bodies.common import Body, Names
from leap_shared.vision.bodies.grids import Number, Size, Tokens, check_reduction, to_image, to_tokens
from leap_shared.vision.bodies.parts import Block, Site, TokenMlp, conv_embed

__all__ = ["PVT", "PVTv2", "PVTv2Block", "SpatialReductionAttention"]


class SpatialReductionAttention(nn.Module):
    """Softmax attention whose keys and values come from the map shrunk by a strided convolution."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        check_reduction(site.input_size, site.sr_ratio)
        self.num_heads, self.sr_ratio, self.attn_drop = site.num_heads, site.sr_ratio, site.attn_drop
        self.q = nn.Linear(site.dim, site.dim, bias=site.qkv_bias)
        self.kv = nn.Linear(site.dim, 2 * site.dim, bias=site.qkv_bias)
        if site.sr_ratio > 1:
            self.sr = nn.Conv2d(site.dim, site.dim, site.sr_ratio, site.sr_ratio)
            self.norm = nn.LayerNorm(site.dim)
        self.proj = nn.Linear(site.dim, site.dim)
        self.proj_drop = nn.Dropout(site.proj_drop)

    def set_input_size(self, hw: Size) -> None:
        """Nothing to resample; a map that the reduction does not divide is refused."""
        check_reduction(hw, self.sr_ratio)

    def forward(self, x: Tokens, hw: Size) -> Tokens:
        """Attend from every token of the map to every token of the shrunken map."""
        check_reduction(hw, self.sr_ratio)
        dim = x.shape[2] // self.num_heads
        query = self.q(x).reshape(*x.shape[:2], self.num_heads, dim).transpose(1, 2)
        if self.sr_ratio > 1:
            x = self.norm(to_tokens(self.sr(to_image(x, hw))))
        key, value = self.kv(x).reshape(*x.shape[:2], 2, self.num_heads, dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=self.attn_drop if self.training else 0.0)
        projected: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))
        return projected


class ConvMlp(TokenMlp):
    """MLP with a 3x3 depthwise convolution over the map before its activation."""

    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__(dim, hidden, drop=drop)
        self.dwconv = nn.ModuleDict({"dwconv": nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)})

    def forward(self, x: Tokens, hw: Size) -> Tokens:
        """Tokens to tokens of the same shape."""
        x = to_tokens(self.dwconv["dwconv"](to_image(self.fc1(x), hw)))
        out: Tensor = self.drop2(self.fc2(self.drop1(self.act(x))))
        return out


class PVTv2Block(Block):
    """Pre-norm block whose MLP has a convolution."""

    mlp_class = ConvMlp


class PVTv2(Body):
    """PVTv2: overlapping embeddings, convolutional MLPs, a norm behind each stage, no position embeddings.

    Args:
        embed_dims: channels of each stage.
        depths, num_heads, mlp_ratios: see `Body`.
        sr_ratios: spatial reduction of softmax blocks, by stage.
        attention_sr_ratios: spatial reduction that the plugged-in attention is told, by stage.
        **options: see `Body`.
    """

    first_conv = "patch_embed1.proj"
    norm_eps = 1e-6
    block_class: type[Block] = PVTv2Block

    def __init__(
        self,
        *,
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        mlp_ratios: Sequence[Number] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        attention_sr_ratios: Sequence[int] = (1, 1, 1, 1),
        **options: Any,
    ) -> None:
        super().__init__(embed_dims, depths, num_heads, mlp_ratios, **options)
        if not len(sr_ratios) == len(attention_sr_ratios) == 4:
            raise UserError(f"reduction ratios {sr_ratios} and {attention_sr_ratios}: expected four numbers each")
        self.sr_ratios, self.attention_sr_ratios = sr_ratios, attention_sr_ratios
        self._assemble()

    def _names(self, stage: int) -> Names:
        return Names(f"block{stage + 1}", f"patch_embed{stage + 1}", norm=f"norm{stage + 1}")

    def _embedding(self, stage: int, in_dim: int, dim: int) -> nn.Module:
        kernel, stride, padding = (3, 2, 1) if stage else (7, 4, 3)
        return conv_embed(in_dim, dim, kernel, stride, padding, ("proj", "tokens", "norm"))

    def _block(self, site: Site) -> Block:
        ratios = self.attention_sr_ratios if site.plugged else self.sr_ratios
        site = replace(site, sr_ratio=ratios[site.stage])
        attention = self.attention if site.plugged and self.attention is not None else SpatialReductionAttention
        return self.block_class(site, attention(site))

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d) and module.weight.requires_grad:
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class PVT(PVTv2):
    """PVT without class token: patch and position embeddings, plain MLPs. Arguments as for `PVTv2`.

    Official checkpoints hold a final `norm` that is never applied: it is kept, and frozen.
    """

    block_class = Block
    position_mode = "bilinear"
    applies_norm = False

    def _names(self, stage: int) -> Names:
        return Names(f"block{stage + 1}", f"patch_embed{stage + 1}", f"pos_embed{stage + 1}")

    def _embedding(self, stage: int, in_dim: int, dim: int) -> nn.Module:
        embedding: nn.Module = PatchEmbed(None, 2 if stage else 4, in_dim, dim, norm_layer=nn.LayerNorm)
        return embedding

    def _init_weights(self, module: nn.Module) -> None:
        Body._init_weights(self, module)
