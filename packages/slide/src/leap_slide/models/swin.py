"""Slide-Swin: slide attention over the whole map in the first stages, window attention in the others."""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from leap_shared.vision.bodies import Swin, build, pretrained_config
from leap_slide.models.common import SlideBody, slide_attention, stages

__all__ = ["SlideSwin"]


class SlideSwin(SlideBody, Swin):
    """Swin Transformer with slide attention in its first stages.

    Args:
        window_size: side of the softmax windows of the other stages, at most that of the map. With the 56 of the
            authors' configurations they see the whole map; the paper's operation counts are those of 7.
        kernel_size: k, odd.
        num_slide_stages: how many stages have slide attention.
        slide_options: more options of `leap_slide.SlideAttention`.
        **options: see `leap_shared.vision.bodies.Swin`.
    """

    def __init__(
        self,
        *,
        window_size: int = 56,
        kernel_size: int = 3,
        num_slide_stages: int = 2,
        slide_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            attn_type=stages(num_slide_stages),
            softmax_window=window_size,
            attention=slide_attention(kernel_size=kernel_size, **(slide_options or {})),
            **options,
        )


SIZES = ("tiny", "small", "base")
default_cfgs = generate_default_cfgs(
    {f"slide_swin_{size}{form}": pretrained_config(SlideSwin) for size in SIZES for form in ("", "_w7")}
)
SMALL: dict[str, Any] = {"depths": (2, 2, 18, 2)}
BASE: dict[str, Any] = {**SMALL, "embed_dim": 128, "num_heads": (4, 8, 16, 32)}


@register_model
def slide_swin_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-Swin-T as released, stages 3 and 4 global: 28.3M parameters, 4.68 GMAC."""
    return build(SlideSwin, "slide_swin_tiny", pretrained, **kwargs)


@register_model
def slide_swin_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-Swin-S as released, stages 3 and 4 global: 49.7M parameters, 9.20 GMAC."""
    return build(SlideSwin, "slide_swin_small", pretrained, **{**SMALL, **kwargs})


@register_model
def slide_swin_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-Swin-B as released, stages 3 and 4 global: 87.9M parameters, 16.04 GMAC."""
    return build(SlideSwin, "slide_swin_base", pretrained, **{**BASE, **kwargs})


@register_model
def slide_swin_tiny_w7(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-Swin-T with the paper's operation count, 7x7 windows: 28.3M parameters, 4.55 GMAC, published top-1 82.3."""
    return build(SlideSwin, "slide_swin_tiny_w7", pretrained, **{"window_size": 7, **kwargs})


@register_model
def slide_swin_small_w7(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-Swin-S with the paper's operation count, 7x7 windows: 49.6M parameters, 8.80 GMAC, published top-1 83.7."""
    return build(SlideSwin, "slide_swin_small_w7", pretrained, **{"window_size": 7, **SMALL, **kwargs})


@register_model
def slide_swin_base_w7(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-Swin-B with the paper's operation count, 7x7 windows: 87.8M parameters, 15.5 GMAC, published top-1 84.2."""
    return build(SlideSwin, "slide_swin_base_w7", pretrained, **{"window_size": 7, **BASE, **kwargs})
