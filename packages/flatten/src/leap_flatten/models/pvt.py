"""FLatten-PVT and FLatten-PVTv2: linear attention in every stage, without spatial reduction."""

from __future__ import annotations

import re
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from leap_flatten.models.common import FiniteImages, pvt_attention
from leap_shared.errors import UserError
from leap_shared.vision.bodies import PVT, PVTv2, build, pretrained_config
from leap_shared.vision.bodies.grids import Number

__all__ = ["FlattenPVT", "FlattenPVTv2"]


def _options(
    attn_type: str, la_sr_ratios: object, focusing_factor: Number, kernel_size: int, denominator: str
) -> dict[str, Any]:
    if not isinstance(la_sr_ratios, str) or not re.fullmatch("[1-9]{4}", la_sr_ratios):
        raise UserError(f"la_sr_ratios {la_sr_ratios!r}: expected four digits above 0, one per stage, as in '2111'")
    attention = pvt_attention(focusing_factor, kernel_size, denominator)
    return {"attn_type": attn_type, "attention_sr_ratios": tuple(map(int, la_sr_ratios)), "attention": attention}


class FlattenPVT(FiniteImages, PVT):
    """PVT with focused linear attention in the blocks that `attn_type` names, and no class token.

    Args:
        attn_type: a letter per stage, L linear, S softmax, M mixed (``LLMS2``: the first two blocks of stage 3 are L).
        la_sr_ratios: spatial reduction of the keys of linear blocks, a digit per stage.
        focusing_factor, kernel_size, denominator: see `leap_flatten.FocusedLinearAttention`.
        **options: see `leap_shared.vision.bodies.PVT`.
    """

    def __init__(
        self,
        *,
        attn_type: str = "LLLL",
        la_sr_ratios: str = "1111",
        focusing_factor: Number = 3,
        kernel_size: int = 5,
        denominator: str = "mean",
        **options: Any,
    ) -> None:
        super().__init__(**_options(attn_type, la_sr_ratios, focusing_factor, kernel_size, denominator), **options)


class FlattenPVTv2(FiniteImages, PVTv2):
    """PVTv2 with focused linear attention; arguments as for `FlattenPVT`."""

    def __init__(
        self,
        *,
        attn_type: str = "LLLL",
        la_sr_ratios: str = "1111",
        focusing_factor: Number = 3,
        kernel_size: int = 5,
        denominator: str = "mean",
        **options: Any,
    ) -> None:
        super().__init__(**_options(attn_type, la_sr_ratios, focusing_factor, kernel_size, denominator), **options)


default_cfgs = generate_default_cfgs(
    {
        **{f"flatten_pvt_{size}": pretrained_config(FlattenPVT) for size in ("tiny", "small", "medium", "large")},
        **{f"flatten_pvt_v2_b{size}": pretrained_config(FlattenPVTv2) for size in range(6)},
    }
)


@register_model
def flatten_pvt_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-PVT-T: 12.2M parameters, 2.0 GMAC, published top-1 77.8."""
    return build(FlattenPVT, "flatten_pvt_tiny", pretrained, **kwargs)


@register_model
def flatten_pvt_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-PVT-S: 21.7M parameters, 4.0 GMAC, published top-1 81.7."""
    return build(FlattenPVT, "flatten_pvt_small", pretrained, **{"depths": (3, 4, 6, 3), **kwargs})


@register_model
def flatten_pvt_medium(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-PVT-M: 37.2M parameters, 7.0 GMAC, top-1 83.0 in the paper's plot."""
    return build(FlattenPVT, "flatten_pvt_medium", pretrained, **{"depths": (3, 4, 18, 3), **kwargs})


@register_model
def flatten_pvt_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-PVT-L, configuration B of the authors: 50.6M parameters, 10.4 GMAC, top-1 about 83.45 in the plot."""
    return build(FlattenPVT, "flatten_pvt_large", pretrained, **{"depths": (3, 8, 27, 3), **kwargs})


@register_model
def flatten_pvt_v2_b0(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-PVTv2-B0: 3.6M parameters, 0.6 GMAC, published top-1 71.1."""
    return build(FlattenPVTv2, "flatten_pvt_v2_b0", pretrained, **{"embed_dims": (32, 64, 160, 256), **kwargs})


@register_model
def flatten_pvt_v2_b1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-PVTv2-B1: 12.9M parameters, 2.2 GMAC, published top-1 79.5."""
    return build(FlattenPVTv2, "flatten_pvt_v2_b1", pretrained, **kwargs)


@register_model
def flatten_pvt_v2_b2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-PVTv2-B2: 22.5M parameters, 4.3 GMAC, published top-1 82.5."""
    return build(FlattenPVTv2, "flatten_pvt_v2_b2", pretrained, **{"depths": (3, 4, 6, 3), **kwargs})


@register_model
def flatten_pvt_v2_b3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-PVTv2-B3: 38.3M parameters, 7.3 GMAC, top-1 about 83.7 in the paper's plot."""
    return build(FlattenPVTv2, "flatten_pvt_v2_b3", pretrained, **{"depths": (3, 4, 18, 3), **kwargs})


@register_model
def flatten_pvt_v2_b4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-PVTv2-B4: 51.8M parameters, 10.7 GMAC, top-1 about 84.0 in the paper's plot."""
    return build(FlattenPVTv2, "flatten_pvt_v2_b4", pretrained, **{"depths": (3, 8, 27, 3), **kwargs})


@register_model
def flatten_pvt_v2_b5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-PVTv2-B5: 67.1M parameters, 12.4 GMAC; the authors publish no configuration and no accuracy."""
    sizes = {"depths": (3, 6, 40, 3), "mlp_ratios": (4, 4, 4, 4)}
    return build(FlattenPVTv2, "flatten_pvt_v2_b5", pretrained, **{**sizes, **kwargs})
