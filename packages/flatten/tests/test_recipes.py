"""The recipes are those of the release: numbers, learning rates, parameter groups, pictures."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from leap_flatten import VARIANTS, recipes
from leap_shared.errors import UserError
from leap_shared.testing import golden
from leap_shared.vision import build_transform
from leap_shared.vision.optimisation import Schedule, build_model, build_optimiser

CASES = golden.cases(Path(__file__).parent / "golden", "lr_")
COLUMNS = "epochs cooldown_epochs warmup_epochs warmup_lr lr min_lr weight_decay clip_norm batch_size ema_decay"
SWIN = (300, 0, 20, 5e-7, 5e-4, 5e-6, 0.05, 5.0)
PVT = (300, 10, 5, 1e-6, 5e-4, 1e-5, 0.05, None)
LARGE_PVT = (*PVT[:-1], 1.0)
CSWIN = (300, 10, 20, 1e-6, 5e-4, 1e-5, 0.05, None)
TABLE = {
    "flatten_pvt_tiny": (*PVT, 128, None, 0.1),
    "flatten_pvt_small": (*PVT, 64, None, 0.1),
    "flatten_pvt_medium": (*LARGE_PVT, 64, None, 0.3),
    "flatten_pvt_large": (*LARGE_PVT, 32, None, 0.3),
    "flatten_pvt_v2_b0": (*PVT, 128, None, 0.1),
    "flatten_pvt_v2_b1": (*PVT, 128, None, 0.1),
    "flatten_pvt_v2_b2": (*PVT, 128, None, 0.1),
    "flatten_pvt_v2_b3": (*LARGE_PVT, 128, None, 0.3),
    "flatten_pvt_v2_b4": (*LARGE_PVT, 64, None, 0.3),
    "flatten_pvt_v2_b5": (*LARGE_PVT, 64, None, 0.3),
    "flatten_swin_tiny": (*SWIN, 128, None, 0.2),
    "flatten_swin_small": (*SWIN, 128, None, 0.3),
    "flatten_swin_base": (*SWIN, 64, None, 0.5),
    "flatten_swin_base_384": (30, 0, 5, 2e-8, 2e-5, 2e-7, 1e-8, 5.0, 32, None, 0.5),
    "flatten_cswin_tiny": (*CSWIN, 256, 0.99984, 0.2),
    "flatten_cswin_small": (*CSWIN, 128, 0.99984, 0.4),
    "flatten_cswin_base": (*CSWIN[:6], 0.1, None, 64, 0.99982, 0.5),
    "flatten_cswin_base_384": (20, 10, 0, 5e-6, 5e-6, 5e-7, 1e-8, None, 32, 0.99982, 0.7),
    "flatten_deit_tiny": (*SWIN, 128, None, 0.1),
}
COUNTS = next(case["optimiser_groups"] for case in CASES if "optimiser_groups" in case.facts)
NAMES = st.sampled_from(sorted(TABLE))
ROUNDING = 1e-12  # both formulas are in float64


def test_every_variant_has_a_recipe_under_its_name() -> None:
    assert {name: recipe.name for name, recipe in recipes.RECIPES.items()} == dict(zip(VARIANTS, VARIANTS, strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_numbers_are_those_of_the_release(name: str) -> None:
    recipe = recipes.get(name)
    assert tuple(getattr(recipe, column) for column in (*COLUMNS.split(), "drop_path_rate")) == TABLE[name]


@pytest.mark.parametrize("name", VARIANTS)
def test_pictures_have_the_size_and_share_that_timm_knows(name: str) -> None:
    recipe, known = recipes.get(name), timm.get_pretrained_cfg(name)
    assert (recipe.image_size, recipe.crop_fraction) == (known.input_size[-1], known.crop_pct)


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_learning_rates_are_the_golden_ones(case: golden.Case) -> None:
    rates = recipes.get(case.name.replace("lr_", "flatten_")).learning_rates(batch=1024, steps_per_epoch=1251)
    want = case.arrays["lr"]
    np.testing.assert_allclose([rates[0], *rates.at(case["steps"])], want, rtol=0, atol=case.tolerance * want.max())


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_trainers_schedule_uses_the_golden_rates_one_update_later(case: golden.Case) -> None:
    config = recipes.get(case.name.replace("lr_", "flatten_")).train_config("x")
    optimiser = build_optimiser([{"params": [torch.zeros(1)]}], config.optimiser, 2 * config.optimiser.lr)
    schedule, want, used = Schedule(optimiser, config, 1251, 2.0), case.arrays["lr"], []
    for update in (0, *(step + 1 for step in case["steps"])):
        schedule.set(*divmod(update, 1251), 1251)
        used.append(optimiser.param_groups[0]["lr"])
    np.testing.assert_allclose(used, want, rtol=0, atol=case.tolerance * want.max())


@given(name=NAMES, batch=st.integers(1, 4096), steps=st.integers(1, 30), data=st.data())
def test_the_trainers_schedule_uses_these_rates_in_every_epoch(name: str, batch: int, steps: int, data: Any) -> None:
    recipe = recipes.get(name)
    rates, config = recipe.learning_rates(batch, steps), recipe.train_config("x")
    update = data.draw(st.integers(0, len(rates) - 2))
    optimiser = build_optimiser([{"params": [torch.zeros(1)]}], config.optimiser, config.optimiser.lr * batch / 512)
    Schedule(optimiser, config, steps, batch / 512).set(*divmod(update, steps), steps)
    assert optimiser.param_groups[0]["lr"] == pytest.approx(rates[update], rel=ROUNDING)


@given(name=NAMES, steps=st.integers(1, 4), data=st.data())
def test_rates_are_a_sequence_of_what_is_at_its_steps(name: str, steps: int, data: Any) -> None:
    rates = recipes.get(name).learning_rates(steps_per_epoch=steps)
    whole = [float(rates.at(0)), *rates.at(np.arange(rates.steps)).tolist()]
    assert list(rates) == np.asarray(rates).tolist() == whole
    index, part = data.draw(st.integers(-len(rates), len(rates) - 1)), data.draw(st.slices(len(rates)))
    assert rates[index] == whole[index]
    assert rates[part] == whole[part]


def test_rates_stay_at_the_minimum_behind_the_end() -> None:
    rates = recipes.get("flatten_pvt_tiny").learning_rates(512, 2)
    assert rates.at([[600, 10**6]]).tolist() == [[1e-5, 1e-5]]
    with pytest.raises(IndexError):
        rates[len(rates)]


@pytest.mark.parametrize("steps", [-1, [0, -3], 1.5])
def test_steps_that_are_none_are_refused(steps: Any) -> None:
    with pytest.raises(UserError, match="expected whole numbers, 0 or more"):
        recipes.get("flatten_pvt_tiny").learning_rates().at(steps)


@pytest.mark.parametrize("numbers", [{"batch": 0}, {"steps_per_epoch": -1}])
def test_a_batch_or_an_epoch_of_nothing_is_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected positive numbers"):
        recipes.get("flatten_pvt_tiny").learning_rates(**numbers)


def test_an_unknown_name_is_told_the_nearest() -> None:
    with pytest.raises(UserError, match=r"flatten_swim_tiny.*did you mean flatten_swin_tiny"):
        recipes.get("flatten_swim_tiny")


def build(name: str) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name)


def spared(name: str, **options: Any) -> set[str]:
    """Names of the trained tensors that are not decayed."""
    model = build(name)
    groups = recipes.get(name).parameter_groups(model, **options)
    own = {id(parameter) for group in groups if not group["weight_decay"] for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


@pytest.mark.golden
@pytest.mark.parametrize("name", COUNTS)
def test_groups_count_as_in_the_release_but_for_the_norm_that_is_frozen(name: str) -> None:
    model = build(name)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert len(frozen) == (2 if name == "flatten_pvt_tiny" else 0)
    groups = recipes.get(name).parameter_groups(model)
    free = [parameter for group in groups if not group["weight_decay"] for parameter in group["params"]]
    assert COUNTS[name] == {
        "no_decay": len(free) + len(frozen),
        "total": sum(len(group["params"]) for group in groups) + len(frozen),
        "no_decay_numel": sum(parameter.numel() for parameter in [*free, *frozen]),
    }


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("flatten_swin_tiny", ("*.scale", "*.positional_encoding")),
        ("flatten_pvt_tiny", ("*.scale", "*.positional_encoding", "pos_embed?")),
        ("flatten_pvt_v2_b0", ("*.scale", "*.positional_encoding")),
        ("flatten_cswin_tiny", ("*.scale", "*.positional_encoding")),
        ("flatten_deit_tiny", ("*.scale", "*.positional_encoding")),
    ],
)
def test_decay_of_scales_and_positions_can_be_left_out(name: str, tables: tuple[str, ...]) -> None:
    more = spared(name, decay_pos=False) - spared(name)
    names = build(name).state_dict()
    assert more == {own for own in names if any(fnmatch(own, pattern) for pattern in tables)}


def test_deit_spares_its_position_and_class_token() -> None:
    assert {"pos_embed", "cls_token"} < spared("flatten_deit_tiny")


def test_augmentation_optimiser_and_loss_are_the_releases() -> None:
    config = recipes.get("flatten_swin_tiny").train_config("x")
    assert vars(config.augmentation) == {
        "scale": (0.08, 1.0),
        "ratio": (3 / 4, 4 / 3),
        "crop_padding": None,
        "flip": 0.5,
        "colour_jitter": 0.4,
        "auto_augment": "rand-m9-mstd0.5-inc1",
        "erasing": 0.25,
        "erasing_mode": "pixel",
        "mixup": 0.8,
        "cutmix": 1.0,
        "mix_probability": 1.0,
        "cutmix_share": 0.5,
        "mix_mode": "batch",
        "label_smoothing": 0.1,
    }
    chosen = config.optimiser
    assert (chosen.name, chosen.betas, chosen.eps, chosen.base_batch) == ("adamw", (0.9, 0.999), 1e-8, 512)
    assert config.data.interpolation == "bicubic"


@pytest.mark.parametrize("name", ["flatten_swin_tiny", "flatten_pvt_v2_b0", "flatten_cswin_tiny", "flatten_deit_tiny"])
def test_stochastic_depth_reaches_the_model_with_its_full_rate_in_the_last_block(name: str) -> None:
    config = recipes.get(name).train_config("x")
    with torch.device("meta"):
        model = build_model(config.model, config.model_options)
    rates = [module.drop_prob for module in model.modules() if type(module).__name__ == "DropPath"]
    assert max(rates) == rates[-1] == pytest.approx(recipes.get(name).drop_path_rate)


@given(name=NAMES, gpus=st.sampled_from([1, 2, 4, 8]))
def test_fewer_gpus_accumulate_to_the_batch_of_the_release(name: str, gpus: int) -> None:
    config = recipes.get(name).train_config("x", gpus=gpus)
    assert config.batch_size == recipes.get(name).batch_size
    assert config.batch_size * config.accumulation * gpus == recipes.get(name).batch


@given(name=NAMES, gpus=st.integers(1, 64), batch_size=st.integers(1, 256).map(lambda half: 2 * half))
def test_a_batch_that_does_not_divide_comes_near_from_below(name: str, gpus: int, batch_size: int) -> None:
    config = recipes.get(name).train_config("x", gpus=gpus, batch_size=batch_size)
    total, wanted = config.batch_size * config.accumulation * gpus, recipes.get(name).batch
    assert total <= max(wanted, batch_size * gpus)
    assert total + batch_size * gpus > wanted


def test_other_epochs_shrink_warm_up_and_cool_down() -> None:
    config = recipes.get("flatten_cswin_tiny").train_config("x", epochs=30)
    assert (config.epochs, config.schedule.warmup_epochs, config.schedule.cooldown_epochs) == (30, 2.0, 1)


def test_an_average_is_kept_on_demand_with_the_releases_decay() -> None:
    assert recipes.get("flatten_cswin_base").train_config("x").optimiser.ema_decay is None
    assert recipes.get("flatten_cswin_base").train_config("x", ema=True).optimiser.ema_decay == 0.99982
    assert recipes.get("flatten_swin_tiny").train_config("x", ema=True).optimiser.ema_decay == 0.99984


def test_a_changed_recipe_is_a_training_of_its_own() -> None:
    recipe = replace(recipes.get("flatten_swin_tiny"), lr=1e-3, clip_norm=None)
    config = recipe.train_config("x", amp="bf16", seed=3, workers=0)
    assert (config.optimiser.lr, config.optimiser.clip_norm, config.amp, config.seed) == (1e-3, None, "bf16", 3)


def test_another_rate_takes_the_others_with_it() -> None:
    rates = recipes.get("flatten_swin_tiny").with_lr(1e-3).learning_rates(512, 10)
    assert (rates.lr, rates.warmup_lr, rates.min_lr) == pytest.approx((1e-3, 1e-6, 1e-5))


@pytest.mark.parametrize("numbers", [{"gpus": 0}, {"epochs": -1}, {"batch_size": -2}, {"accumulation": 0}])
def test_impossible_numbers_are_refused(numbers: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected"):
        recipes.get("flatten_swin_tiny").train_config("x", **numbers)


def photograph() -> Image.Image:
    """Noise, wider than high."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8))


def normalised(image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
    return (pixels - mean) / std


@pytest.mark.parametrize(
    ("name", "options", "resized", "box"),
    [
        ("flatten_swin_tiny", {}, (256, 256), (16, 16, 240, 240)),
        ("flatten_swin_tiny", {"image_size": 64}, (73, 73), (4, 4, 68, 68)),
        ("flatten_swin_base_384", {}, (384, 384), (0, 0, 384, 384)),
        ("flatten_swin_tiny", {"protocol": "timm", "image_size": 45}, (88, 50), (22, 2, 67, 47)),
        ("flatten_cswin_base_384", {"protocol": "timm"}, (682, 384), (149, 0, 533, 384)),
    ],
)
def test_pictures_are_resized_and_cut_as_the_protocol_says(
    name: str, options: dict[str, Any], resized: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    transform = build_transform(recipes.get(name).data_config("x", **options))
    expected = normalised(photograph().resize(resized, Image.Resampling.BICUBIC).crop(box))
    torch.testing.assert_close(transform(photograph()), expected, rtol=0, atol=1e-6)


def test_the_squares_side_is_the_releases_at_every_size() -> None:
    for size in range(32, 384):
        config = recipes.get("flatten_swin_tiny").data_config("x", image_size=size)
        assert int(size / config.crop_fraction) == int(256 / 224 * size)


def test_published_figures_are_the_logged_ones_where_there_is_a_log() -> None:
    assert VARIANTS["flatten_swin_tiny"].published == (82.106, 95.900)
    assert VARIANTS["flatten_swin_small"].published == (83.5, None)
    assert VARIANTS["flatten_pvt_v2_b5"].published == (None, None)
