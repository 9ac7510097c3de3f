"""How the variants are trained and evaluated on ImageNet-1K: the settings of the release, by the variant's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from leap_flatten.models.variants import find
from leap_shared.vision import TrainConfig, recipes
from leap_shared.vision.recipes import LearningRates, Protocol

__all__ = ["RECIPES", "LearningRates", "Protocol", "Recipe", "get"]


@dataclass(frozen=True)
class Recipe(recipes.Recipe):
    """How one variant is trained, see `leap_shared.vision.recipes.Recipe`."""

    POSITIONS: ClassVar[tuple[str, ...]] = ("*.scale", "*.positional_encoding", "pos_embed*")
    EMA_DECAY: ClassVar[float] = 0.99984  # the authors' for CSWin

    def train_config(
        self, train: str, validation: str | None = None, *, denominator: str = "mean", **settings: Any
    ) -> TrainConfig:
        """As in `leap_shared.vision.recipes.Recipe`, with a `denominator` of `leap_flatten.FocusedLinearAttention`."""
        options = {"denominator": denominator, **(settings.pop("model_options", None) or {})}
        return super().train_config(train, validation, model_options=options, **settings)


LARGE: dict[str, Any] = {"image_size": 384, "crop_fraction": 1.0}
SWIN: dict[str, Any] = {"cooldown_epochs": 0, "warmup_lr": 5e-7, "min_lr": 5e-6, "clip_norm": 5.0}
SWIN_384: dict[str, Any] = {
    **SWIN,
    "epochs": 30,
    "warmup_epochs": 5,
    "lr": 2e-5,
    "warmup_lr": 2e-8,
    "min_lr": 2e-7,
    "weight_decay": 1e-8,
    "fine_tunes": "flatten_swin_base",
    **LARGE,
}
PVT: dict[str, Any] = {"warmup_epochs": 5}
LARGE_PVT: dict[str, Any] = {**PVT, "clip_norm": 1.0}
CSWIN: dict[str, Any] = {"ema_decay": 0.99984}
CSWIN_384: dict[str, Any] = {
    "epochs": 20,
    "warmup_epochs": 0,
    "lr": 5e-6,
    "warmup_lr": 5e-6,
    "min_lr": 5e-7,
    "weight_decay": 1e-8,
    "ema_decay": 0.99982,
    "fine_tunes": "flatten_cswin_base",
    **LARGE,
}
RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("flatten_pvt_tiny", 128, 0.1, **PVT),
        Recipe("flatten_pvt_small", 64, 0.1, **PVT),
        Recipe("flatten_pvt_medium", 64, 0.3, **LARGE_PVT),
        Recipe("flatten_pvt_large", 32, 0.3, **LARGE_PVT),
        Recipe("flatten_pvt_v2_b0", 128, 0.1, **PVT),
        Recipe("flatten_pvt_v2_b1", 128, 0.1, **PVT),
        Recipe("flatten_pvt_v2_b2", 128, 0.1, **PVT),
        Recipe("flatten_pvt_v2_b3", 128, 0.3, **LARGE_PVT),
        Recipe("flatten_pvt_v2_b4", 64, 0.3, **LARGE_PVT),
        Recipe(
            "flatten_pvt_v2_b5", 64, 0.3, **LARGE_PVT, note="no recipe is published, this is that of flatten_pvt_v2_b4"
        ),
        Recipe("flatten_swin_tiny", 128, 0.2, **SWIN),
        Recipe("flatten_swin_small", 128, 0.3, **SWIN),
        Recipe("flatten_swin_base", 64, 0.5, **SWIN),
        Recipe("flatten_swin_base_384", 32, 0.5, **SWIN_384),
        Recipe("flatten_cswin_tiny", 256, 0.2, **CSWIN),
        Recipe("flatten_cswin_small", 128, 0.4, **CSWIN),
        Recipe("flatten_cswin_base", 64, 0.5, weight_decay=0.1, ema_decay=0.99982),
        Recipe("flatten_cswin_base_384", 32, 0.7, **CSWIN_384),
        Recipe("flatten_deit_tiny", 128, 0.1, **SWIN, note="no recipe is published, this is that of flatten_swin_tiny"),
    )
}


def get(name: str) -> Recipe:
    """The recipe of the variant of that name.

    Raises:
        UserError: there is none; the nearest names are given.
    """
    return RECIPES[find(name).name]
