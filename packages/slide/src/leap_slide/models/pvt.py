"""Slide-PVT and Slide-PVTv2, derived from the paper: slide attention without spatial reduction in the first stages."""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from leap_shared.vision.bodies import PVT, PVTv2, build, pretrained_config
from leap_slide.models.common import SlideBody, slide_attention, stages

__all__ = ["SlidePVT", "SlidePVTv2"]


class SlidePVT(SlideBody, PVT):
    """PVT without class token, with slide attention in its first stages.

    Args:
        kernel_size: k, odd.
        num_slide_stages: how many stages have slide attention.
        slide_options: more options of `leap_slide.SlideAttention`.
        **options: see `leap_shared.vision.bodies.PVT`.
    """

    def __init__(
        self,
        *,
        kernel_size: int = 3,
        num_slide_stages: int = 2,
        slide_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        attention = slide_attention(kernel_size=kernel_size, **(slide_options or {}))
        super().__init__(attn_type=stages(num_slide_stages), attention=attention, **options)


class SlidePVTv2(SlideBody, PVTv2):
    """PVTv2 with slide attention in its first stages; arguments as for `SlidePVT`."""

    def __init__(
        self,
        *,
        kernel_size: int = 3,
        num_slide_stages: int = 2,
        slide_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        attention = slide_attention(kernel_size=kernel_size, **(slide_options or {}))
        super().__init__(attn_type=stages(num_slide_stages), attention=attention, **options)


default_cfgs = generate_default_cfgs(
    {
        **{f"slide_pvt_{size}": pretrained_config(SlidePVT) for size in ("tiny", "small", "medium")},
        **{f"slide_pvt_v2_b{size}": pretrained_config(SlidePVTv2) for size in range(1, 5)},
    }
)


@register_model
def slide_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-PVT-T: 12.2M parameters, 2.01 GMAC, published top-1 78.0."""
    return build(SlidePVT, "slide_pvt_tiny", pretrained, **kwargs)


@register_model
def slide_pvt_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-PVT-S: 22.7M parameters, 3.95 GMAC, published top-1 81.7."""
    return build(SlidePVT, "slide_pvt_small", pretrained, **{"depths": (3, 4, 6, 3), **kwargs})


@register_model
def slide_pvt_medium(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-PVT-M: 42.5M parameters, 6.80 GMAC, top-1 about 82.9 in the paper's plot."""
    return build(SlidePVT, "slide_pvt_medium", pretrained, **{"depths": (3, 4, 18, 3), **kwargs})


@register_model
def slide_pvt_v2_b1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-PVTv2-B1: 13.0M parameters, 2.19 GMAC, published top-1 79.5."""
    return build(SlidePVTv2, "slide_pvt_v2_b1", pretrained, **kwargs)


@register_model
def slide_pvt_v2_b2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-PVTv2-B2: 23.6M parameters (22.8M published), 4.17 GMAC, published top-1 82.7."""
    return build(SlidePVTv2, "slide_pvt_v2_b2", pretrained, **{"depths": (3, 4, 6, 3), **kwargs})


@register_model
def slide_pvt_v2_b3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-PVTv2-B3: top-1 about 83.8 in the paper's plot."""
    return build(SlidePVTv2, "slide_pvt_v2_b3", pretrained, **{"depths": (3, 4, 18, 3), **kwargs})


@register_model
def slide_pvt_v2_b4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-PVTv2-B4: top-1 about 84.1 in the paper's plot."""
    return build(SlidePVTv2, "slide_pvt_v2_b4", pretrained, **{"depths": (3, 8, 27, 3), **kwargs})
