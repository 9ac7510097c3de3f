"""FLatten-Swin: linear attention over the whole map in the first stages, shifted softmax windows in the others."""

from __future__ import annotations

from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from leap_flatten.models.common import FiniteImages, swin_attention
from leap_shared.vision.bodies import Swin, build, pretrained_config
from leap_shared.vision.bodies.grids import Number

__all__ = ["FlattenSwin"]


class FlattenSwin(FiniteImages, Swin):
    """Swin Transformer with focused linear attention in the blocks that `attn_type` names.

    Args:
        attn_type: a letter per stage, L linear, S softmax, M mixed (``LLMS2``: the first two blocks of stage 3 are L).
        window_size: side of the windows of linear blocks, as in Table 6 (shifted in odd blocks, never masked); None
            lets them see the whole map at every size.
        softmax_window: side of the windows of softmax blocks; None gives 7, or 12 where `window_size` is over 56.
        focusing_factor, kernel_size, denominator: see `leap_flatten.FocusedLinearAttention`.
        **options: see `leap_shared.vision.bodies.Swin`.
    """

    def __init__(
        self,
        *,
        attn_type: str = "LLSS",
        window_size: int | None = None,
        softmax_window: int | None = None,
        focusing_factor: Number = 3,
        kernel_size: int = 5,
        denominator: str = "mean",
        **options: Any,
    ) -> None:
        super().__init__(
            attn_type=attn_type,
            window_size=window_size,
            softmax_window=softmax_window or (12 if (window_size or 0) > 56 else 7),
            attention=swin_attention(focusing_factor, kernel_size, denominator),
            **options,
        )


default_cfgs = generate_default_cfgs(
    {
        "flatten_swin_tiny": pretrained_config(FlattenSwin),
        "flatten_swin_small": pretrained_config(FlattenSwin),
        "flatten_swin_base": pretrained_config(FlattenSwin),
        "flatten_swin_base_384": pretrained_config(
            FlattenSwin, input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0
        ),
    }
)


@register_model
def flatten_swin_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-Swin-T: 29.2M parameters, 4.5 GMAC, published top-1 82.1."""
    return build(FlattenSwin, "flatten_swin_tiny", pretrained, **kwargs)


@register_model
def flatten_swin_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-Swin-S: 50.5M parameters, 8.7 GMAC, published top-1 83.5."""
    return build(FlattenSwin, "flatten_swin_small", pretrained, **{"depths": (2, 2, 18, 2), **kwargs})


@register_model
def flatten_swin_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-Swin-B: 89.0M parameters, 15.4 GMAC, published top-1 83.8."""
    sizes = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
    return build(FlattenSwin, "flatten_swin_base", pretrained, **{**sizes, **kwargs})


@register_model
def flatten_swin_base_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-Swin-B at 384: 91.4M parameters, 46.4 GMAC, published top-1 85.0."""
    sizes = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "softmax_window": 12}
    return build(FlattenSwin, "flatten_swin_base_384", pretrained, **{**sizes, **kwargs})
