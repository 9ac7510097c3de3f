"""The recipes are those of the release, and of the bodies where it has none: numbers, rates, parameter groups."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import numpy as np
import pytest
import timm
import tiny
import torch
from torch import nn

from leap_shared.errors import UserError
from leap_shared.vision.optimisation import build_model
from leap_slide import recipes
from leap_slide.models.variants import VARIANTS

COLUMNS = "epochs cooldown_epochs warmup_epochs warmup_lr lr min_lr weight_decay clip_norm batch_size drop_path_rate"
SWIN = (300, 0, 20, 5e-7, 5e-4, 5e-6, 0.05, 5.0)
PVT = (300, 10, 5, 1e-6, 5e-4, 1e-5, 0.05, None)
LARGE_PVT = (*PVT[:-1], 1.0)
CSWIN = (300, 10, 20, 1e-6, 5e-4, 1e-5, 0.05, None)
TABLE = {
    "slide_swin_tiny": (*SWIN, 128, 0.2),
    "slide_swin_tiny_w7": (*SWIN, 128, 0.2),
    "slide_swin_small": (*SWIN, 128, 0.3),
    "slide_swin_small_w7": (*SWIN, 128, 0.3),
    "slide_swin_base": (*SWIN, 64, 0.5),
    "slide_swin_base_w7": (*SWIN, 64, 0.5),
    "slide_pvt_tiny": (*PVT, 128, 0.1),
    "slide_pvt_small": (*PVT, 64, 0.1),
    "slide_pvt_medium": (*LARGE_PVT, 64, 0.3),
    "slide_pvt_v2_b1": (*PVT, 128, 0.1),
    "slide_pvt_v2_b2": (*PVT, 128, 0.1),
    "slide_pvt_v2_b3": (*LARGE_PVT, 128, 0.3),
    "slide_pvt_v2_b4": (*LARGE_PVT, 64, 0.3),
    "slide_cswin_tiny": (*CSWIN, 256, 0.2),
    "slide_cswin_small": (*CSWIN, 128, 0.4),
    "slide_cswin_base": (*CSWIN[:6], 0.1, None, 64, 0.5),
    "slide_nat_mini": (*SWIN, 128, 0.2),
    "slide_nat_tiny": (*SWIN, 128, 0.2),
    "slide_nat_small": (*SWIN, 128, 0.3),
}
OF_ALL = ("*relative_position_bias_table", "*.bias", "*norm*.weight")
DECAYED = ("*.qkv.weight", "*.dep_conv1.weight", "*.fc1.weight", "head.weight")


def test_every_variant_has_a_recipe_under_its_name() -> None:
    assert [(name, recipe.name) for name, recipe in recipes.RECIPES.items()] == [(name, name) for name in TABLE]
    assert TABLE.keys() == VARIANTS.keys()


@pytest.mark.parametrize("name", TABLE)
def test_the_numbers_are_the_published_ones(name: str) -> None:
    recipe = recipes.get(name)
    assert tuple(getattr(recipe, column) for column in COLUMNS.split()) == TABLE[name]


@pytest.mark.parametrize("name", TABLE)
def test_pictures_have_the_size_and_share_that_timm_knows(name: str) -> None:
    recipe, known = recipes.get(name), timm.get_pretrained_cfg(name)
    assert (recipe.image_size, recipe.crop_fraction) == (known.input_size[-1], known.crop_pct)


def test_only_swins_recipes_are_the_releases_own() -> None:
    noted = {name for name, recipe in recipes.RECIPES.items() if "no recipe is published" in recipe.note}
    assert noted == {name for name in TABLE if "swin_" not in name.replace("cswin", "")}


def test_rates_are_the_releases_by_hand() -> None:
    """Base 5e-4 for 512 pictures and 1024 of them: 1e-3, from 1e-6 within 20 epochs, to 1e-5 at the end of 300."""
    rates = recipes.get("slide_swin_tiny").learning_rates(steps_per_epoch=10)
    assert len(rates) == 3001
    assert rates[:2] == pytest.approx([1e-6, 1e-6])
    assert rates[101] == pytest.approx(1e-6 + (1e-3 - 1e-6) / 2)
    cosine = 1e-5 + (1e-3 - 1e-5) * (1 + np.cos(np.pi * np.array([200, 1500, 2999]) / 3000)) / 2
    assert [rates[step + 1] for step in (200, 1500, 2999)] == pytest.approx(cosine.tolist())


def test_augmentation_optimiser_and_pictures_are_the_releases() -> None:
    config = recipes.get("slide_swin_tiny_w7").train_config("x")
    chosen, pictures = config.augmentation, config.data
    assert (chosen.auto_augment, chosen.erasing, chosen.erasing_mode) == ("rand-m9-mstd0.5-inc1", 0.25, "pixel")
    assert (chosen.mixup, chosen.cutmix, chosen.label_smoothing, chosen.colour_jitter) == (0.8, 1.0, 0.1, 0.4)
    optimiser = config.optimiser
    assert (optimiser.name, optimiser.betas, optimiser.eps, optimiser.base_batch) == ("adamw", (0.9, 0.999), 1e-8, 512)
    assert (pictures.image_size, pictures.squash, pictures.interpolation) == (224, True, "bicubic")
    assert int(224 / pictures.crop_fraction) == 256


def test_an_average_is_kept_on_demand_with_the_releases_decay() -> None:
    decays = {recipe.train_config("x", ema=True).optimiser.ema_decay for recipe in recipes.RECIPES.values()}
    assert decays == {0.9999}
    assert recipes.get("slide_swin_tiny").train_config("x").optimiser.ema_decay is None


@pytest.mark.parametrize(
    "name", ["slide_swin_base", "slide_pvt_tiny", "slide_pvt_v2_b3", "slide_cswin_tiny", "slide_nat_mini"]
)
def test_stochastic_depth_reaches_the_model_with_its_full_rate_in_the_last_block(name: str) -> None:
    config = recipes.get(name).train_config("x", model_options={"num_classes": 2})
    with torch.device("meta"):
        model = build_model(config.model, config.model_options)
    rates = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    assert max(rates) == rates[-1] == pytest.approx(recipes.get(name).drop_path_rate)


def grouped(model: nn.Module, **options: Any) -> dict[str, float | None]:
    """Weight decay of each parameter, None for those in no group."""
    groups = recipes.get("slide_swin_tiny").parameter_groups(model, **options)
    decays = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decays)
    return {name: decays.get(id(parameter)) for name, parameter in model.named_parameters()}


def chosen(decays: dict[str, float | None], *patterns: str) -> list[float | None]:
    return [decay for name, decay in decays.items() if any(fnmatch(name, pattern) for pattern in patterns)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tables_of_both_kinds_biases_and_norms_are_not_decayed_and_kernels_are(family: str) -> None:
    decays = grouped(tiny.model(family))
    frozen = "norm.weight", "norm.bias"
    trained = {name: decay for name, decay in decays.items() if family != "pvt" or name not in frozen}
    assert set(chosen(trained, *OF_ALL)) == {0.0}
    assert set(chosen(trained, *DECAYED)) == {0.05}


def test_swin_has_tables_of_both_kinds() -> None:
    shapes = {len(p.shape) for n, p in tiny.model("swin").named_parameters() if n.endswith("position_bias_table")}
    assert shapes == {2, 6}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_frozen_is_in_no_group_and_all_else_in_one(family: str) -> None:
    model = tiny.model(family)
    decays = grouped(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {name for name, decay in decays.items() if decay is None} == frozen
    assert {name.partition(".attn.")[2] or name for name in frozen} - {"norm.weight", "norm.bias"} == {
        "dep_conv.weight"
    }


def test_positions_of_pvt_can_be_left_out_of_the_decay() -> None:
    decays = [chosen(grouped(tiny.model("pvt"), decay_pos=decay), "pos_embed?") for decay in (True, False)]
    assert decays == [[0.05] * 4, [0.0] * 4]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_trained_parameter_gets_a_gradient_from_two_paths(family: str) -> None:
    """Else DistributedDataParallel would need find_unused_parameters."""
    model = tiny.model(family).train()
    model(tiny.images()).square().sum().backward()
    without = {
        name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None
    }
    assert not without


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(UserError, match=r"slide_swim_tiny.*did you mean slide_swin_tiny"):
        recipes.get("slide_swim_tiny")
