"""Hierarchical backbones that take another attention: Swin, PVT, PVTv2 and CSWin, with timm's interface.

A package gives `attn_type` (which blocks take its attention) and a factory that makes the attention; the body brings
embeddings, softmax attention, any input size, feature pyramids and the state-dict names of the official checkpoints.
`leap_shared.vision.bodies.grids` has what an attention needs for windows and for tables that depend on the size.
"""

from __future__ import annotations

from leap_shared.vision.bodies.common import Body, build, drop_computed, pretrained_config
from leap_shared.vision.bodies.cswin import CSWin, CSWinBlock, LePEAttention
from leap_shared.vision.bodies.parts import AttentionFactory, Block, Site
from leap_shared.vision.bodies.pvt import PVT, PVTv2, PVTv2Block, SpatialReductionAttention
from leap_shared.vision.bodies.swin import Swin, SwinBlock, WindowAttention

__all__ = [
    "PVT",
    "AttentionFactory",
    "Block",
    "Body",
    "CSWin",
    "CSWinBlock",
    "LePEAttention",
    "PVTv2",
    "PVTv2Block",
    "Site",
    "SpatialReductionAttention",
    "Swin",
    "SwinBlock",
    "WindowAttention",
    "build",
    "drop_computed",
    "pretrained_config",
]
