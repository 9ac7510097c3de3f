"""The backbone families, registered with timm when this module is imported, and the parts that they are built of."""

from __future__ import annotations

from leap_slide.models.common import slide_attention
from leap_slide.models.cswin import SlideCSWin
from leap_slide.models.nat import NeighborhoodAttention, SlideNAT
from leap_slide.models.pvt import SlidePVT, SlidePVTv2
from leap_slide.models.swin import SlideSwin

__all__ = [
    "NeighborhoodAttention",
    "SlideCSWin",
    "SlideNAT",
    "SlidePVT",
    "SlidePVTv2",
    "SlideSwin",
    "slide_attention",
]
