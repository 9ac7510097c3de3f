"""Whole trainings by name: a curriculum, and the optimiser, augmentation and model options that go with it."""

from __future__ import annotations

from leap_efficienttrain.recipes.building import train_config
from leap_efficienttrain.recipes.named import for_model, get, names
from leap_efficienttrain.recipes.recipe import Figure, Recipe, TrainSettings

__all__ = ["Figure", "Recipe", "TrainSettings", "for_model", "get", "names", "train_config"]
