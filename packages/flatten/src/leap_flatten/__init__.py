"""FLatten Transformer: vision transformers with focused linear attention (Han et al., ICCV 2023)."""

from __future__ import annotations

from leap_flatten import convert, functional, recipes, visualize
from leap_flatten.attention import CSWinFocusedLinearAttention, FocusedLinearAttention, PVTFocusedLinearAttention
from leap_flatten.checkpoints import create_model, load_official, save_safetensors
from leap_flatten.models import FlattenCSWin, FlattenDeiT, FlattenPVT, FlattenPVTv2, FlattenSwin
from leap_flatten.models.variants import VARIANTS

__version__ = "0.0.1"

__all__ = [
    "VARIANTS",
    "CSWinFocusedLinearAttention",
    "FlattenCSWin",
    "FlattenDeiT",
    "FlattenPVT",
    "FlattenPVTv2",
    "FlattenSwin",
    "FocusedLinearAttention",
    "PVTFocusedLinearAttention",
    "__version__",
    "convert",
    "create_model",
    "functional",
    "load_official",
    "recipes",
    "save_safetensors",
    "visualize",
]
