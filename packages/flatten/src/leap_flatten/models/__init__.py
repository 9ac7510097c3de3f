"""The backbone families, registered with timm when this module is imported, and the parts that they are built of."""

from __future__ import annotations

from leap_flatten.models.common import branch_attention, pvt_attention, swin_attention
from leap_flatten.models.cswin import FlattenCSWin
from leap_flatten.models.deit import FlattenDeiT
from leap_flatten.models.pvt import FlattenPVT, FlattenPVTv2
from leap_flatten.models.swin import FlattenSwin
from leap_shared.vision.bodies import Block, CSWinBlock, LePEAttention, PVTv2Block, Site, SwinBlock
from leap_shared.vision.bodies.grids import merge, partition

__all__ = [
    "Block",
    "CSWinBlock",
    "FlattenCSWin",
    "FlattenDeiT",
    "FlattenPVT",
    "FlattenPVTv2",
    "FlattenSwin",
    "LePEAttention",
    "PVTv2Block",
    "Site",
    "SwinBlock",
    "branch_attention",
    "merge",
    "partition",
    "pvt_attention",
    "swin_attention",
]
