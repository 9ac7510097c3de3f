"""Recipes as plain numbers, and what they make of them; the packages test theirs against the published ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from leap_shared.errors import UserError
from leap_shared.vision.optimisation import Schedule, build_optimiser
from leap_shared.vision.recipes import LearningRates, Recipe

RECIPE = Recipe("net", 64, 0.2, epochs=10, cooldown_epochs=2, warmup_epochs=3)
ROUNDING = 1e-12  # both formulas are in float64


@given(
    epochs=st.tuples(st.integers(1, 6), st.integers(0, 3)),
    warmup=st.integers(0, 3),
    steps=st.integers(1, 9),
    data=st.data(),
)
def test_the_trainers_schedule_uses_the_recipes_rates(
    epochs: tuple[int, int], warmup: int, steps: int, data: st.DataObject
) -> None:
    recipe = replace(RECIPE, epochs=epochs[0], cooldown_epochs=epochs[1], warmup_epochs=min(warmup, epochs[0]))
    rates, config = recipe.learning_rates(256, steps), recipe.train_config("x")
    update = data.draw(st.integers(0, len(rates) - 2))
    optimiser = build_optimiser([{"params": [torch.zeros(1)]}], config.optimiser, config.optimiser.lr / 2)
    Schedule(optimiser, config, steps, 0.5).set(*divmod(update, steps), steps)
    assert optimiser.param_groups[0]["lr"] == pytest.approx(rates[update], rel=ROUNDING)


def test_rates_rise_inside_the_cosine_and_rest_at_its_end() -> None:
    rates = LearningRates(1.0, 0.0, 0.2, warmup_steps=2, cosine_steps=4, steps=6)
    falling = [0.6, 0.2 + 0.4 * (1 - np.sqrt(0.5))]
    assert rates[:] == pytest.approx([0.0, 0.0, 0.5, *falling, 0.2, 0.2])


def test_options_of_the_model_come_beside_the_recipes() -> None:
    config = RECIPE.train_config("x", image_size=64, model_options={"window_size": 7, "drop_path_rate": 0.0})
    assert config.model_options == {"drop_path_rate": 0.0, "img_size": 64, "window_size": 7}


@pytest.mark.parametrize(
    ("options", "fraction", "squash"),
    [
        ({}, 0.875, True),
        ({"image_size": 384}, 1.0, True),
        ({"protocol": "timm"}, 0.9, False),
        ({"protocol": "timm", "image_size": 384}, 0.9, False),
    ],
)
def test_pictures_are_cut_as_the_protocol_says(options: dict[str, Any], fraction: float, squash: bool) -> None:
    config = RECIPE.data_config("x", "y", **options)
    assert (config.crop_fraction, config.squash) == (fraction, squash)
    assert config.image_size == options.get("image_size", 224)


def test_tables_are_spared_by_the_names_that_the_kind_of_recipe_gives() -> None:
    @dataclass(frozen=True)
    class Own(Recipe):
        POSITIONS: ClassVar[tuple[str, ...]] = ("*.weight",)

    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    net[1].weight.requires_grad_(False)
    groups = [(recipe("net", 64, 0.2), spare) for recipe in (Recipe, Own) for spare in (False, True)]
    decayed = [
        {
            p
            for group in recipe.parameter_groups(net, decay_pos=not spare)
            if group["weight_decay"]
            for p in group["params"]
        }
        for recipe, spare in groups
    ]
    assert decayed == [{net[0].weight}, {net[0].weight}, {net[0].weight}, set()]


def test_an_average_has_the_recipes_decay_and_else_that_of_its_kind() -> None:
    decays = [replace(RECIPE, ema_decay=decay).train_config("x", ema=True).optimiser.ema_decay for decay in (None, 0.5)]
    assert decays == [0.9999, 0.5]
    assert replace(RECIPE, ema_decay=0.5).train_config("x").optimiser.ema_decay is None


@given(gpus=st.integers(1, 64), batch_size=st.integers(1, 256).map(lambda half: 2 * half))
def test_a_batch_that_does_not_divide_comes_near_from_below(gpus: int, batch_size: int) -> None:
    config = RECIPE.train_config("x", gpus=gpus, batch_size=batch_size)
    total = config.batch_size * config.accumulation * gpus
    assert total <= max(RECIPE.batch, batch_size * gpus)
    assert total + batch_size * gpus > RECIPE.batch == 512


@pytest.mark.parametrize("numbers", [{"gpus": 0}, {"epochs": -1}, {"batch_size": -2}, {"accumulation": 0}])
def test_impossible_numbers_are_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected"):
        RECIPE.train_config("x", **numbers)


@pytest.mark.parametrize("numbers", [{"batch": 0}, {"steps_per_epoch": -1}])
def test_a_batch_or_an_epoch_of_nothing_is_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected positive numbers"):
        RECIPE.learning_rates(**numbers)


@pytest.mark.parametrize("steps", [-1, [0, -3], 1.5])
def test_steps_that_are_none_are_refused(steps: Any) -> None:
    with pytest.raises(UserError, match="expected whole numbers, 0 or more"):
        RECIPE.learning_rates().at(steps)
