"""How the families take focused linear attention: the options that all of them share, and the layer of one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from leap_flatten.attention import CSWinFocusedLinearAttention, FocusedLinearAttention, PVTFocusedLinearAttention
from leap_shared.vision.bodies import Site
from leap_shared.vision.bodies.grids import Number

__all__ = ["branch_attention", "pvt_attention", "swin_attention"]

Factory = Callable[[Site], nn.Module]


def _projected(site: Site) -> dict[str, Any]:
    return {"qkv_bias": site.qkv_bias, "attn_drop": site.attn_drop, "proj_drop": site.proj_drop}


def swin_attention(
    focusing_factor: Number = 3, kernel_size: int = 5, denominator: str = "mean", prefix_tokens: int = 0
) -> Factory:
    """Makes the layer with a packed projection, over the map or a window of it."""

    def make(site: Site) -> nn.Module:
        numbers = (site.dim, site.num_heads, site.input_size, focusing_factor, kernel_size, denominator)
        return FocusedLinearAttention(*numbers, prefix_tokens=prefix_tokens, **_projected(site))

    return make


def pvt_attention(focusing_factor: Number = 3, kernel_size: int = 5, denominator: str = "mean") -> Factory:
    """Makes the layer with spatial reduction."""

    def make(site: Site) -> nn.Module:
        numbers = (site.dim, site.num_heads, site.input_size, site.sr_ratio, focusing_factor, kernel_size, denominator)
        return PVTFocusedLinearAttention(*numbers, **_projected(site))

    return make


def branch_attention(focusing_factor: Number = 3, kernel_size: int = 5, denominator: str = "mean") -> Factory:
    """Makes the layer of a CSWin branch."""

    def make(site: Site) -> nn.Module:
        return CSWinFocusedLinearAttention(
            site.dim, site.num_heads, site.input_size, focusing_factor, kernel_size, denominator
        )

    return make
