"""Slide-Transformer: local self-attention by shifts and depthwise convolutions (Pan et al., CVPR 2023)."""

from __future__ import annotations

from leap_slide import convert, functional, recipes, visualize
from leap_slide.attention import SlideAttention
from leap_slide.checkpoints import create_model, load_official, save_safetensors
from leap_slide.convert import reparameterize
from leap_slide.export import export_coreml, export_onnx
from leap_slide.functional import merge_weights
from leap_slide.models import SlideCSWin, SlideNAT, SlidePVT, SlidePVTv2, SlideSwin
from leap_slide.models.variants import VARIANTS

__version__ = "0.0.1"

__all__ = [
    "VARIANTS",
    "SlideAttention",
    "SlideCSWin",
    "SlideNAT",
    "SlidePVT",
    "SlidePVTv2",
    "SlideSwin",
    "__version__",
    "convert",
    "create_model",
    "export_coreml",
    "export_onnx",
    "functional",
    "load_official",
    "merge_weights",
    "recipes",
    "reparameterize",
    "save_safetensors",
    "visualize",
]
