"""FLatten-CSWin: linear attention over the whole map in the first stages, softmax stripes in the others, LePE."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from timm.models import generate_default_cfgs, register_model
from torch import nn

from leap_flatten.models.common import FiniteImages, branch_attention
from leap_shared.errors import UserError
from leap_shared.vision.bodies import CSWin, build, pretrained_config
from leap_shared.vision.bodies.grids import Number

__all__ = ["FlattenCSWin"]


class FlattenCSWin(FiniteImages, CSWin):
    """CSWin Transformer with focused linear attention in the blocks that `attn_type` names.

    Args:
        attn_type: a letter per stage, L linear, S softmax, M mixed (``LLMS2``: the first two blocks of stage 3 are L).
        split_sizes: width of the softmax stripes by stage; the last stage always sees the whole map.
        la_split_size: width of the linear stripes by stage, joined by dashes as in ``56-28-14-7``; one that covers the
            map's shorter side gives one branch, which goes on seeing the whole map at other sizes. None lets every
            linear block see the whole map.
        focusing_factor, kernel_size, denominator: see `leap_flatten.FocusedLinearAttention`.
        **options: see `leap_shared.vision.bodies.CSWin`.
    """

    def __init__(
        self,
        *,
        depths: Sequence[int] = (2, 4, 18, 1),
        attn_type: str = "LLSS",
        split_sizes: Sequence[Number] = (1, 2, 7, 7),
        la_split_size: str | None = None,
        focusing_factor: Number = 3,
        kernel_size: int = 5,
        denominator: str = "mean",
        **options: Any,
    ) -> None:
        if la_split_size is not None and not re.fullmatch(r"[1-9]\d*(-[1-9]\d*){3}", la_split_size):
            raise UserError(f"la_split_size {la_split_size!r}: expected four widths joined by dashes, as in 56-28-14-7")
        widths = (1.0,) * 4 if la_split_size is None else tuple(map(int, la_split_size.split("-")))
        super().__init__(
            depths=depths,
            attn_type=attn_type,
            split_sizes=split_sizes,
            attention_split_sizes=widths,
            branch_attention=branch_attention(focusing_factor, kernel_size, denominator),
            **options,
        )


default_cfgs = generate_default_cfgs(
    {
        "flatten_cswin_tiny": pretrained_config(FlattenCSWin),
        "flatten_cswin_small": pretrained_config(FlattenCSWin),
        "flatten_cswin_base": pretrained_config(FlattenCSWin),
        "flatten_cswin_base_384": pretrained_config(
            FlattenCSWin, input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0
        ),
    }
)


@register_model
def flatten_cswin_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-CSWin-T: 21.2M parameters, 4.3 GMAC, published top-1 83.1."""
    return build(FlattenCSWin, "flatten_cswin_tiny", pretrained, **kwargs)


@register_model
def flatten_cswin_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-CSWin-S: 35.5M parameters, 6.8 GMAC, published top-1 83.8."""
    return build(FlattenCSWin, "flatten_cswin_small", pretrained, **{"depths": (2, 4, 32, 2), **kwargs})


@register_model
def flatten_cswin_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-CSWin-B: 74.9M parameters, 14.9 GMAC, published top-1 84.5."""
    sizes = {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32)}
    return build(FlattenCSWin, "flatten_cswin_base", pretrained, **{**sizes, **kwargs})


@register_model
def flatten_cswin_base_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-CSWin-B at 384: 78.4M parameters, 46.3 GMAC, published top-1 85.5."""
    sizes = {"embed_dim": 96, "depths": (3, 6, 29, 2), "num_heads": (4, 8, 16, 32), "split_sizes": (1, 2, 12, 12)}
    return build(FlattenCSWin, "flatten_cswin_base_384", pretrained, **{**sizes, **kwargs})
