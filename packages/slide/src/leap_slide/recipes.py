"""How the variants are trained and evaluated on ImageNet-1K, by the variant's name: Slide-Swin as in the release."""

from __future__ import annotations

from typing import Any

from leap_shared.vision.recipes import LearningRates, Protocol, Recipe
from leap_slide.models.variants import find

__all__ = ["RECIPES", "LearningRates", "Protocol", "Recipe", "get"]

SWIN: dict[str, Any] = {"cooldown_epochs": 0, "warmup_lr": 5e-7, "min_lr": 5e-6, "clip_norm": 5.0}
BODY: dict[str, Any] = {"note": "no recipe is published, this is the one of its body in the authors' FLatten release"}
PVT: dict[str, Any] = {**BODY, "warmup_epochs": 5}
LARGE_PVT: dict[str, Any] = {**PVT, "clip_norm": 1.0}
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *(Recipe(f"slide_swin_tiny{form}", 128, 0.2, **SWIN) for form in ("", "_w7")),
        *(Recipe(f"slide_swin_small{form}", 128, 0.3, **SWIN) for form in ("", "_w7")),
        *(Recipe(f"slide_swin_base{form}", 64, 0.5, **SWIN) for form in ("", "_w7")),
        Recipe("slide_pvt_tiny", 128, 0.1, **PVT),
        Recipe("slide_pvt_small", 64, 0.1, **PVT),
        Recipe("slide_pvt_medium", 64, 0.3, **LARGE_PVT),
        Recipe("slide_pvt_v2_b1", 128, 0.1, **PVT),
        Recipe("slide_pvt_v2_b2", 128, 0.1, **PVT),
        Recipe("slide_pvt_v2_b3", 128, 0.3, **LARGE_PVT),
        Recipe("slide_pvt_v2_b4", 64, 0.3, **LARGE_PVT),
        Recipe("slide_cswin_tiny", 256, 0.2, **BODY),
        Recipe("slide_cswin_small", 128, 0.4, **BODY),
        Recipe("slide_cswin_base", 64, 0.5, weight_decay=0.1, **BODY),
        Recipe("slide_nat_mini", 128, 0.2, **SWIN, note="no recipe is published, this is that of slide_swin_tiny"),
        Recipe("slide_nat_tiny", 128, 0.2, **SWIN, note="no recipe is published, this is that of slide_swin_tiny"),
        Recipe("slide_nat_small", 128, 0.3, **SWIN, note="no recipe is published, this is that of slide_swin_small"),
    )
}


def get(name: str) -> Recipe:
    """The recipe of the variant of that name.

    Raises:
        UserError: there is none; the nearest names are given.
    """
    return RECIPES[find(name).name]
