"""The smallest models of each family, with parameters that tell their parts from each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import leap_flatten as lf

FAMILIES = ("swin", "pvt", "pvt_v2", "cswin", "deit")
STAGES: dict[str, Any] = {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
WIDTHS: dict[str, Any] = {"embed_dims": (8, 8, 16, 16), "mlp_ratios": (2, 2, 2, 2), "la_sr_ratios": "2111"}
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "swin": (lf.FlattenSwin, {**STAGES, "embed_dim": 8, "depths": (1, 1, 2, 1), "softmax_window": 2}),
    "pvt": (lf.FlattenPVT, {"attn_type": "LSLL", **WIDTHS, **STAGES}),
    "pvt_v2": (lf.FlattenPVTv2, {"qkv_bias": False, **WIDTHS, **STAGES}),
    "cswin": (lf.FlattenCSWin, {**STAGES, "embed_dim": 8, "num_heads": (2, 2, 2, 2), "la_split_size": "4-16-2-1"}),
    "deit": (lf.FlattenDeiT, {"embed_dim": 16, "depth": 2, "num_heads": 2}),
}


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with every parameter drawn at random: no scale, table or norm is left at its first value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            spread = 0.3 if parameter.ndim < 2 else max(parameter[0].numel(), 4) ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            if parameter.ndim == 1:
                parameter.add_(1)
    return module


def model(family: str, img_size: Any = (64, 64), **options: Any) -> Any:
    """A model of the family in eval mode, of a few thousand parameters."""
    kind, sizes = KINDS[family]
    return drawn(kind(img_size=img_size, num_classes=7, **{**sizes, **options})).eval()


def images(hw: tuple[int, int] = (64, 64), batch: int = 2, seed: int = 1) -> torch.Tensor:
    """Random pictures."""
    return torch.randn(batch, 3, *hw, generator=torch.Generator().manual_seed(seed))
