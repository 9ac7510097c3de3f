"""How the families take focused linear attention: the options that all of them share, and the layer of one place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from leap_flatten.attention import CSWinFocusedLinearAttention, FocusedLinearAttention, PVTFocusedLinearAttention
from leap_flatten.functional import check_finite
from leap_shared.vision.bodies import Body, Site
from leap_shared.vision.bodies.grids import Number, Size

__all__ = ["FiniteImages", "branch_attention", "pvt_attention", "swin_attention"]

Factory = Callable[[Site], nn.Module]  # partials of functions of this module, which can be pickled with their models


class FiniteImages(Body):
    """A body that refuses images with NaN or infinity, see `leap_flatten.functional.check_finite`."""

    def _size_of(self, image: Tensor) -> Size:
        size = super()._size_of(image)
        check_finite("image", image)
        return size


def _projected(site: Site) -> dict[str, Any]:
    return {"qkv_bias": site.qkv_bias, "attn_drop": site.attn_drop, "proj_drop": site.proj_drop}


def _swin(numbers: tuple[Number, int, str], prefix_tokens: int, site: Site) -> nn.Module:
    place = (site.dim, site.num_heads, site.input_size)
    return FocusedLinearAttention(*place, *numbers, prefix_tokens=prefix_tokens, **_projected(site))


def _pvt(numbers: tuple[Number, int, str], site: Site) -> nn.Module:
    place = (site.dim, site.num_heads, site.input_size, site.sr_ratio)
    return PVTFocusedLinearAttention(*place, *numbers, **_projected(site))


def _branch(numbers: tuple[Number, int, str], site: Site) -> nn.Module:
    return CSWinFocusedLinearAttention(site.dim, site.num_heads, site.input_size, *numbers)


def swin_attention(
    focusing_factor: Number = 3, kernel_size: int = 5, denominator: str = "mean", prefix_tokens: int = 0
) -> Factory:
    """Makes the layer with a packed projection, over the map or a window of it."""
    return partial(_swin, (focusing_factor, kernel_size, denominator), prefix_tokens)


def pvt_attention(focusing_factor: Number = 3, kernel_size: int = 5, denominator: str = "mean") -> Factory:
    """Makes the layer with spatial reduction."""
    return partial(_pvt, (focusing_factor, kernel_size, denominator))


def branch_attention(focusing_factor: Number = 3, kernel_size: int = 5, denominator: str = "mean") -> Factory:
    """Makes the layer of a CSWin branch."""
    return partial(_branch, (focusing_factor, kernel_size, denominator))
