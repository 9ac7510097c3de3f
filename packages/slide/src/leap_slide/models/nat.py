"""Slide-NAT, experimental: slide attention in the first stages, neighbourhood attention in the others."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from leap_shared.errors import UserError
from leap_shared.vision.bodies import Block, Site, build, pretrained_config
from leap_shared.vision.bodies.common import Names
from leap_shared.vision.bodies.grids import Number, Size, Tokens, to_tokens
from leap_slide.functional import check_kernel_size
from leap_slide.models.common import SlideBody, slide_attention, stages

__all__ = ["NeighborhoodAttention", "SlideNAT"]

KERNEL_SIZE = 7  # of neighbourhood attention


class NeighborhoodAttention(nn.Module):
    """Softmax attention to the k x k pixels around each, moved inwards at borders (Hassani et al. 2023).

    Written for maps as small as the last stages': a strip of k rows at a time attends to the rows around it, masked.

    Args:
        site: place of the block.
        kernel_size: k, odd; smaller maps are seen whole.
        rel_pos_bias: add a bias for each relative position to the logits.
        implementation: "auto", "masked" or "natten" (CUDA; the package natten, which knows no bias).

    Raises:
        UserError: natten is asked for and is missing, or there is a bias.
    """

    def __init__(
        self, site: Site, kernel_size: int = KERNEL_SIZE, rel_pos_bias: bool = True, implementation: str = "auto"
    ) -> None:
        super().__init__()
        check_kernel_size(kernel_size)
        if implementation not in ("auto", "masked", "natten"):
            raise UserError(f"implementation {implementation!r}: expected 'auto', 'masked' or 'natten'")
        if implementation == "natten" and importlib.util.find_spec("natten") is None:
            raise UserError("neighbourhood attention by natten needs natten: pip install natten, or take 'masked'")
        if implementation == "natten" and rel_pos_bias:
            raise UserError("natten has no relative position bias any more: pass rel_pos_bias=False, or take 'masked'")
        self.num_heads, self.kernel_size, self.implementation = site.num_heads, kernel_size, implementation
        self.attn_drop = site.attn_drop
        self.qkv = nn.Linear(site.dim, 3 * site.dim, bias=site.qkv_bias)
        self.register_parameter("rpb", None)
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(site.num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
            trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(site.dim, site.dim)
        self.proj_drop = nn.Dropout(site.proj_drop)

    def forward(self, x: Tokens, hw: Size) -> Tokens:
        """Tokens of a map of `hw` to tokens of the same shape."""
        shape = (-1, *hw, self.num_heads, x.shape[2] // self.num_heads)
        query, key, value = (part.reshape(shape) for part in self.qkv(x).chunk(3, 2))
        if self._by_natten(x, hw):
            from natten import na2d  # type: ignore[import-not-found, unused-ignore] # it is optional

            out = na2d(query, key, value, kernel_size=self.kernel_size).flatten(1, 2)
        else:
            out = torch.cat([self._strip(query, key, value, row) for row in range(0, hw[0], self.kernel_size)], 1)
        projected: Tensor = self.proj_drop(self.proj(out.flatten(2)))
        return projected

    def _by_natten(self, x: Tensor, hw: Size) -> bool:
        if min(hw) < self.kernel_size or (self.attn_drop and self.training):
            return False
        biased: Tensor | None = self.rpb
        fits = biased is None and x.is_cuda and importlib.util.find_spec("natten") is not None
        return self.implementation == "natten" or (self.implementation == "auto" and fits)

    def _strip(self, query: Tensor, key: Tensor, value: Tensor, first: int) -> Tensor:
        """The tokens of rows from `first` on, as many as the kernel has."""
        (height, width), side = (query.shape[1], query.shape[2]), self.kernel_size
        last = min(first + side, height)
        start, stop = _start(first, height, side), _start(last - 1, height, side) + min(side, height)
        rows, place = torch.arange(start, stop, device=query.device), torch.arange(width, device=query.device)
        within = [_within(rows, range(first, last), height, side), _within(place, range(width), width, side)]
        mask: Tensor = (within[0][:, None, :, None] & within[1][None, :, None, :]).flatten(2).flatten(0, 1)
        if self.rpb is not None:
            own = torch.arange(first, last, device=query.device)
            down, right = (
                (keys - queries[:, None]).clamp(1 - side, side - 1) + side - 1
                for keys, queries in ((rows, own), (place, place))
            )
            bias = self.rpb[:, down[:, None, :, None], right[None, :, None, :]]
            mask = bias.flatten(3).flatten(1, 2).masked_fill(~mask, -math.inf)[None]
        queries, keys, values = (
            part.flatten(1, 2).transpose(1, 2)
            for part in (query[:, first:last], key[:, start:stop], value[:, start:stop])
        )
        dropout = self.attn_drop if self.training else 0.0
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout).transpose(1, 2)


def _start(place: int, length: int, side: int) -> int:
    """First neighbour of a place: `side` // 2 before it, moved inwards at borders."""
    return min(max(place - side // 2, 0), max(length - side, 0))


def _within(keys: Tensor, places: range, length: int, side: int) -> Tensor:
    """Whether keys are neighbours of places: (places, keys)."""
    starts = torch.tensor([_start(place, length, side) for place in places], device=keys.device)[:, None]
    return (keys >= starts) & (keys < starts + side)


class _Tokenizer(nn.Module):
    """Two overlapping convolutions of stride 2, and a norm."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1), nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tokens:
        """Image to tokens at a quarter of its size."""
        tokens: Tensor = self.norm(to_tokens(self.proj(image)))
        return tokens


class _Downsample(nn.Module):
    """An overlapping convolution of stride 2, and a norm."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tokens:
        """Map to tokens at half its size."""
        tokens: Tensor = self.norm(to_tokens(self.reduction(image)))
        return tokens


class SlideNAT(SlideBody):
    """Neighborhood Attention Transformer with slide attention in its first stages.

    No code was published, and the paper's counts are all that it can be checked against.

    Args:
        embed_dim: channels of the first stage; each stage doubles them.
        depths, num_heads, mlp_ratio: see `leap_shared.vision.bodies.Body`.
        kernel_size: k of slide attention, odd.
        num_slide_stages: how many stages have slide attention.
        slide_options: more options of `leap_slide.SlideAttention`.
        neighborhood_options: options of `NeighborhoodAttention`.
        **options: see `leap_shared.vision.bodies.Body`.
    """

    first_conv = "patch_embed.proj.0"

    def __init__(
        self,
        *,
        embed_dim: int = 64,
        depths: Sequence[int] = (3, 4, 18, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratio: Number = 3,
        kernel_size: int = 3,
        num_slide_stages: int = 2,
        slide_options: dict[str, Any] | None = None,
        neighborhood_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        dims = [embed_dim << stage for stage in range(4)]
        attention = slide_attention(kernel_size=kernel_size, **(slide_options or {}))
        types = stages(num_slide_stages)
        super().__init__(dims, depths, num_heads, (mlp_ratio,) * 4, attn_type=types, attention=attention, **options)
        self.neighborhood_options = neighborhood_options or {}
        self.levels = nn.ModuleList(nn.ModuleDict() for _ in range(4))
        self._assemble()

    def _names(self, stage: int) -> Names:
        return Names(f"levels.{stage}.blocks", f"levels.{stage - 1}.downsample" if stage else "patch_embed")

    def _embedding(self, stage: int, in_dim: int, dim: int) -> nn.Module:
        return _Downsample(in_dim, dim) if stage else _Tokenizer(in_dim, dim)

    def _block(self, site: Site) -> Block:
        if site.plugged and self.attention is not None:
            return Block(site, self.attention(site))
        return Block(site, NeighborhoodAttention(site, **self.neighborhood_options))


default_cfgs = generate_default_cfgs(
    {f"slide_nat_{size}": pretrained_config(SlideNAT) for size in ("mini", "tiny", "small")}
)


@register_model
def slide_nat_mini(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-NAT-Mini, experimental: top-1 about 82.4 in the paper's plot."""
    return build(SlideNAT, "slide_nat_mini", pretrained, **{"depths": (3, 4, 6, 5), **kwargs})


@register_model
def slide_nat_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-NAT-T, experimental: published as 28M parameters, 4.3 GMAC, top-1 83.6."""
    return build(SlideNAT, "slide_nat_tiny", pretrained, **kwargs)


@register_model
def slide_nat_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-NAT-S, experimental: published as 51M parameters, 7.8 GMAC, top-1 84.3."""
    sizes = {"embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2}
    return build(SlideNAT, "slide_nat_small", pretrained, **{**sizes, **kwargs})
