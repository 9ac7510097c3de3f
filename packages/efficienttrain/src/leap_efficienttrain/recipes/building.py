"""A recipe as the core's trainer takes it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from leap_efficienttrain.recipes.named import get
from leap_efficienttrain.recipes.recipe import Recipe
from leap_shared.errors import UserError, did_you_mean
from leap_shared.vision.config import DataConfig, ScheduleConfig, TrainConfig

__all__ = ["train_config"]


def train_config(
    recipe: Recipe | str, train: str, validation: str | None = None, *, world: int = 1, **overrides: Any
) -> TrainConfig:
    """The settings of a recipe, as `leap_shared.vision.Trainer` takes them.

    Its batch is the first stage's: that, the size, the magnitude and the learning rate of each later update are the
    curriculum's, as `Curriculum.plan` tells them. Pictures are tested as the released code does: resized to 8/7 of the
    size and cut in their middle, or squashed from 384 pixels on; masked pre-training tests none.

    Args:
        recipe: or its name.
        train: source of training pictures, as `DataConfig` takes it.
        validation: source of pictures for validation.
        world: processes that share each update.
        **overrides: fields of `TrainConfig`, such as `amp="bf16"`, `seed` or `workers`; for `data`, `optimiser`,
            `augmentation`, `schedule` and `model_options` a dictionary of what is other than in the recipe.

    Raises:
        UserError: a name is unknown, or a value is impossible.

    Warns:
        UserWarning: the recipe clips gradients, which its authors do in mixed precision only, and that is switched off.
    """
    recipe = get(recipe) if isinstance(recipe, str) else recipe
    settings, curriculum, size = recipe.train, recipe.curriculum, recipe.curriculum.base_size
    first = curriculum.plan(world=world).legs[0]
    warmup = curriculum.lr.warmup_epochs
    if curriculum.lr.warmup_share is not None:
        warmup = curriculum.lr.warmup_share * curriculum.equivalent_epochs
    config = TrainConfig(
        DataConfig(
            train,
            validation if settings.masked is None else None,
            image_size=size,
            crop_fraction=0.875 if size < 384 else 1.0,
            squash=size >= 384,
        ),
        model=recipe.timm_name,
        model_options=recipe.model_options,
        epochs=max(math.ceil(curriculum.equivalent_epochs), 1),
        batch_size=first.micro_batch * first.stage.replay,
        accumulation=first.accumulate,
        amp=settings.amp,
        augmentation=settings.augmentation,
        optimiser=replace(settings.optimiser, lr=curriculum.lr.base, base_batch=None),
        schedule=ScheduleConfig(curriculum.lr.kind, warmup_epochs=float(warmup), min_lr=curriculum.lr.final),
    )
    return _clipped(replace(config, **_changes(config, overrides)), recipe, overrides)


def _changes(config: object, overrides: Mapping[str, Any]) -> dict[str, Any]:
    known = {entry.name for entry in fields(type(config))}  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    for name, value in overrides.items():
        if name not in known:
            raise UserError(f"{type(config).__name__} has no field {name!r}: {did_you_mean(name, known)}")
        present = getattr(config, name)
        if isinstance(value, Mapping):
            changes[name] = (
                {**present, **value} if isinstance(present, dict) else replace(present, **_changes(present, value))
            )
        else:
            changes[name] = value
    return changes


def _clipped(config: TrainConfig, recipe: Recipe, overrides: Mapping[str, Any]) -> TrainConfig:
    clip = recipe.train.optimiser.clip_norm
    if config.amp != "no" or clip is None or "optimiser" in overrides:
        return config
    advice = f"give optimiser={{'clip_norm': {clip:g}}} to clip all the same"
    warnings.warn(
        f"gradients of {recipe.name} are clipped in mixed precision only, as released: {advice}", stacklevel=3
    )
    return replace(config, optimiser=replace(config.optimiser, clip_norm=None))
