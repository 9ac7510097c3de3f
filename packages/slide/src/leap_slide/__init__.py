"""Slide-Transformer: local self-attention by shifts and depthwise convolutions (Pan et al., CVPR 2023)."""

from __future__ import annotations

from leap_slide import functional
from leap_slide.attention import SlideAttention
from leap_slide.functional import merge_weights
from leap_slide.models import SlideCSWin, SlideNAT, SlidePVT, SlidePVTv2, SlideSwin

__version__ = "0.0.1"

__all__ = [
    "SlideAttention",
    "SlideCSWin",
    "SlideNAT",
    "SlidePVT",
    "SlidePVTv2",
    "SlideSwin",
    "__version__",
    "functional",
    "merge_weights",
]
