"""Slide-CSWin, experimental: slide attention in the first stages, cross-shaped softmax stripes in the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from leap_shared.vision.bodies import CSWin, build, pretrained_config
from leap_shared.vision.bodies.grids import Number
from leap_slide.models.common import SlideBody, slide_attention, stages

__all__ = ["SlideCSWin"]


class SlideCSWin(SlideBody, CSWin):
    """CSWin Transformer with slide attention (of all channels, without LePE) in its first stages.

    No code was published, and the paper's counts are all that it can be checked against.

    Args:
        kernel_size: k, odd.
        num_slide_stages: how many stages have slide attention.
        slide_options: more options of `leap_slide.SlideAttention`.
        **options: see `leap_shared.vision.bodies.CSWin`.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 4, 18, 1),
        split_sizes: Sequence[Number] = (1, 2, 7, 7),
        kernel_size: int = 3,
        num_slide_stages: int = 2,
        slide_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            depths=depths,
            split_sizes=split_sizes,
            attn_type=stages(num_slide_stages),
            attention=slide_attention(kernel_size=kernel_size, **(slide_options or {})),
            **options,
        )


default_cfgs = generate_default_cfgs(
    {f"slide_cswin_{size}": pretrained_config(SlideCSWin) for size in ("tiny", "small", "base")}
)


@register_model
def slide_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-CSWin-T, experimental: top-1 about 83.2 in the paper's plot."""
    return build(SlideCSWin, "slide_cswin_tiny", pretrained, **kwargs)


@register_model
def slide_cswin_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-CSWin-S, experimental: published as 35M parameters, 6.9 GMAC, top-1 84.0."""
    return build(SlideCSWin, "slide_cswin_small", pretrained, **{"depths": (2, 4, 32, 2), **kwargs})


@register_model
def slide_cswin_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Slide-CSWin-B, experimental: published as 78M parameters, 15.0 GMAC, top-1 84.7."""
    sizes = {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)}
    return build(SlideCSWin, "slide_cswin_base", pretrained, **{**sizes, **kwargs})
