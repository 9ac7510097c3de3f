"""How the families take slide attention: their first stages, with the options that all of them share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from leap_shared.errors import UserError
from leap_shared.vision.bodies import Body, Site
from leap_slide.attention import SlideAttention

__all__ = ["SlideBody", "slide_attention", "stages"]


class SlideBody(Body):
    """A body with slide attention in some of its stages."""

    reparameterized = False
    """Whether there is one path in place of two, see `leap_slide.reparameterize`."""


def _attention(options: dict[str, Any], site: Site) -> nn.Module:
    projected = {"qkv_bias": site.qkv_bias, "attn_drop": site.attn_drop, "proj_drop": site.proj_drop}
    return SlideAttention(site.dim, site.num_heads, **{**projected, **options})


def slide_attention(**options: Any) -> Callable[[Site], nn.Module]:
    """Makes the layer of one place; `options` are those of `SlideAttention`. It can be pickled with its model."""
    return partial(_attention, options)


def stages(num_slide_stages: object) -> str:
    """The bodies' `attn_type`: slide attention in the first stages, softmax attention in the others."""
    if not isinstance(num_slide_stages, int) or not 0 <= num_slide_stages <= 4:
        raise UserError(f"num_slide_stages {num_slide_stages!r}: expected 0 to 4, there are four stages")
    return "L" * num_slide_stages + "S" * (4 - num_slide_stages)
