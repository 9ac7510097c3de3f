"""The smallest models of each family, with parameters that tell their parts from each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import leap_slide as ls

FAMILIES = ("swin", "pvt", "pvt_v2", "cswin", "nat")
STAGES: dict[str, Any] = {"depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)}
WIDTHS: dict[str, Any] = {"embed_dims": (8, 8, 16, 16), "mlp_ratios": (2, 2, 2, 2)}
KINDS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "swin": (ls.SlideSwin, {**STAGES, "embed_dim": 8, "depths": (1, 1, 2, 1), "window_size": 2}),
    "pvt": (ls.SlidePVT, {**WIDTHS, **STAGES}),
    "pvt_v2": (ls.SlidePVTv2, {**WIDTHS, **STAGES}),
    "cswin": (ls.SlideCSWin, {**STAGES, "embed_dim": 8, "num_heads": (2, 2, 2, 2), "split_sizes": (1, 2, 2, 1)}),
    "nat": (ls.SlideNAT, {**STAGES, "embed_dim": 8}),
}


def drawn(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with every trained parameter drawn at random: no table or norm is left at its first value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
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
