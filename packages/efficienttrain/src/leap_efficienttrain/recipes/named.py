"""The recipes by name: those of the released scripts, and those of the YAML files beside this module."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.models.variants import ALIASES
from leap_efficienttrain.recipes.recipe import Recipe, TrainSettings, read, training_figures
from leap_efficienttrain.released import FINAL_LR, ICCV_MICRO_BATCH, RECIPES, ReleasedRecipe
from leap_efficienttrain.stages import LearningRate
from leap_shared.errors import UserError, did_you_mean
from leap_shared.vision.bodies.grids import Number
from leap_shared.vision.config import OptimiserConfig

__all__ = ["for_model", "get", "names"]

RELEASED = "the released launch scripts, for 8 GPUs"


def names() -> list[str]:
    """Names of all recipes.

    MODEL stands for EfficientTrain++ as released for ImageNet-1K, MODEL_replay for its script with a replay buffer,
    MODEL_iccv for EfficientTrain; the others are read from files: MODEL_in22k... for ImageNet-22K, MODEL_finetune_SIZE
    for ImageNet-1K after that, MODEL_mae... for masked pre-training.
    """
    return sorted(_all())


def get(name: str, epochs: Number | None = None, base_size: int | None = None, **changes: Any) -> Recipe:
    """A recipe, with other values for some fields of its curriculum.

    Args:
        name: one of `names()`, or the path of a YAML file with one model, see `recipe.read`.
        epochs: length of the training, in equivalent epochs where the curriculum counts compute.
        base_size: full size of the pictures; the stages' sizes change in proportion.
        **changes: fields of `Curriculum`, as `batch` or `micro_batch`.

    Raises:
        UserError: there is no such recipe, or a value is impossible.
    """
    if name.endswith((".yaml", ".yml")):
        found = read(Path(name))
        if len(found) != 1:
            raise UserError(f"{name} has {len(found)} models: leave one")
        return next(iter(found.values())).changed(epochs, base_size, **changes)
    known = _all()
    if name not in known:
        raise UserError(f"recipe {name!r} is unknown: {did_you_mean(name, known)}")
    recipe = known[name].changed(epochs, base_size, **changes)
    if epochs is not None and recipe.source == RELEASED:
        method = "et:iccv" if recipe.curriculum.unit == "epochs" else "et++"
        recipe = replace(recipe, figures=training_figures(recipe.model, method, epochs))
    return recipe


def for_model(model: str) -> Recipe:
    """The released recipe of EfficientTrain++ for a model; for any other model its curriculum with AdamW.

    Args:
        model: official name, or one of timm's.
    """
    released = next(
        (recipe for recipe in _all().values() if model in (recipe.name, recipe.model, recipe.timm_name)), None
    )
    if released is not None:
        return released
    settings = TrainSettings(amp="bf16", optimiser=OptimiserConfig("adamw", weight_decay=0.05))
    curriculum = Curriculum.preset("et++", micro_batch=128)
    return Recipe(
        model, model, curriculum, settings, "EfficientTrain++'s curriculum with AdamW; no script was released"
    )


@functools.cache
def _all() -> dict[str, Recipe]:
    recipes: dict[str, Recipe] = {}
    for released in RECIPES.values():
        short = min((released.model, *(key for key, name in ALIASES.items() if name == released.model)), key=len)
        recipes[short] = _second(short, released)
        recipes[f"{short}_iccv"] = _first(short, released)
        if released.replay:
            recipes[f"{short}_replay"] = _second(short, released, replay=True)
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        recipes |= read(path)
    return recipes


def _second(short: str, released: ReleasedRecipe, replay: bool = False) -> Recipe:
    """EfficientTrain++."""
    final = released.micro_batch[max(released.micro_batch)]
    curriculum = Curriculum.preset(
        f"et++:{released.model}", replay=replay, micro_batch=final, lr=_rate(released, released.lr)
    )
    stages = tuple(
        replace(stage, micro_batch_scale=released.micro_batch[stage.size] / final) for stage in curriculum.stages
    )
    settings = _settings(released, released)
    return _recipe(
        f"{short}_replay" if replay else short, released, replace(curriculum, stages=stages), settings, "et++"
    )


def _first(short: str, released: ReleasedRecipe) -> Recipe:
    """EfficientTrain of 2023: AdamW and a warm-up of 20 epochs for all models."""
    rate = replace(_rate(released, ReleasedRecipe.lr), warmup_share=None)
    curriculum = Curriculum.preset("et:iccv", micro_batch=ICCV_MICRO_BATCH, lr=rate)
    settings = _settings(released, ReleasedRecipe(released.model, released.drop_path, released.micro_batch))
    return _recipe(f"{short}_iccv", released, curriculum, settings, "et:iccv")


def _rate(released: ReleasedRecipe, base: float) -> LearningRate:
    return LearningRate("reference", base=base, final=FINAL_LR, warmup_share=released.warmup_share)


def _settings(released: ReleasedRecipe, steps: ReleasedRecipe) -> TrainSettings:
    """All of `released` but its optimiser, which is that of `steps`."""
    return TrainSettings(
        amp="fp16" if released.amp else "no",
        drop_path=released.drop_path,
        optimiser=OptimiserConfig(
            steps.optimiser,
            eps=steps.eps,
            weight_decay=steps.weight_decay,
            clip_norm=released.clip_grad,
            ema_decay=released.ema,
        ),
        model_options={} if released.layer_scale is None else {"ls_init_value": released.layer_scale},
    )


def _recipe(
    name: str, released: ReleasedRecipe, curriculum: Curriculum, settings: TrainSettings, method: str
) -> Recipe:
    figures = training_figures(released.model, method, curriculum.equivalent_epochs)
    return Recipe(name, released.model, curriculum, settings, RELEASED, figures)
