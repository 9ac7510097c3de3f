"""Recipes: the released ones are the scripts', the others keep to what is published, and all of them can be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from leap_efficienttrain import recipes
from leap_efficienttrain.groups import param_groups
from leap_efficienttrain.mae import MaskedAutoencoder
from leap_efficienttrain.models import find
from leap_efficienttrain.released import RECIPES, StageRow, stage_table
from leap_shared.errors import UserError
from leap_shared.vision.optimisation import build_optimiser

IMAGENET, IMAGENET_22K, GPUS = 1_281_167, 14_197_122, 8
SHORT = {
    "deit_tiny_patch16_224": "deit_tiny",
    "deit_small_patch16_224": "deit_small",
    "CSWin_64_12211_tiny_224": "cswin_tiny",
    "CSWin_64_24322_small_224": "cswin_small",
    "CSWin_96_24322_base_224": "cswin_base",
}
CSWIN = [f"cswin_{width}_in22k_{rest}" for width in ("base", "large") for rest in ("2x", "3x")]
FROM_FILES = [
    *(f"{model}_{width}_in22k_iccv" for model in ("convnext", "cswin") for width in ("base", "large")),
    *(f"convnext_{width}_in22k" for width in ("base", "large")),
    *(name + rest for name in CSWIN for rest in ("", "_large_batch")),
    *(
        f"{model}_{width}_finetune_{size}"
        for model in ("convnext", "cswin")
        for width in ("base", "large")
        for size in (224, 384)
    ),
    *("vit_base_mae", "vit_large_mae", "vit_base_mae_hog", "vit_base_mae_finetune", "vit_large_mae_finetune"),
]
RELEASED = [
    (name, release, replay)
    for name, recipe in RECIPES.items()
    for release, replay in (("R2", False), ("R1", False), *([("R2", True)] if recipe.replay else []))
]


def released_name(model: str, release: str, replay: bool) -> str:
    return SHORT.get(model, model) + ("_iccv" if release == "R1" else "_replay" if replay else "")


def test_there_is_a_recipe_for_every_released_script_and_every_file() -> None:
    assert recipes.names() == sorted([*(released_name(*row) for row in RELEASED), *FROM_FILES])


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_planned_on_imagenet_and_configured(name: str) -> None:
    recipe = recipes.get(name)
    plan = recipe.curriculum.plan(IMAGENET_22K if "in22k" in name else IMAGENET, GPUS)
    for leg in plan.legs:
        assert leg.batch == recipe.curriculum.batch * leg.stage.batch_scale
        assert leg.micro_batch * leg.stage.replay % 2 == 0  # Mixup pairs them
    config = recipes.train_config(name, "imagenet/train", "imagenet/val", world=GPUS)
    assert config.batch_size * config.accumulation * GPUS == plan.legs[0].batch
    assert (config.data.image_size, config.data.train) == (recipe.curriculum.base_size, "imagenet/train")
    assert config.model == recipe.timm_name
    assert (config.optimiser.lr, config.optimiser.base_batch) == (recipe.curriculum.lr.base, None)


@pytest.mark.parametrize(("model", "release", "replay"), RELEASED)
def test_a_released_recipe_is_the_script(model: str, release: Any, replay: bool) -> None:
    recipe = recipes.get(released_name(model, release, replay))
    rows: list[StageRow] = stage_table(model, recipe.curriculum.equivalent_epochs, release, replay)
    config = recipes.train_config(recipe, "x", world=GPUS)
    optimiser, plan = config.optimiser, recipe.curriculum.plan(IMAGENET, GPUS)
    for leg, row in zip(plan.legs, rows, strict=True):
        assert (leg.stage.size, leg.micro_batch, leg.accumulate) == (
            *(row["input_size"], row["batch_size"], row["update_freq"]),
        )
        assert (leg.start_epoch, leg.passes, leg.total_epochs) == (row["start_epoch"], row["epochs_run"], row["epochs"])
        assert (leg.stage.replay, leg.stage.buffer) == (row["replay_times"], row["replay_buffer_size"])
        assert (leg.warmup_steps, recipe.curriculum.lr.rule) == (row["warmup_epochs"], "reference")
        assert recipe.drop_path == pytest.approx(row["drop_path"])
        assert (optimiser.name, optimiser.lr, optimiser.eps) == (row["opt"], row["lr"], row["opt_eps"])
        assert (optimiser.weight_decay, optimiser.clip_norm) == (row["weight_decay"], row["clip_grad"])
        assert (optimiser.ema_decay, config.amp) == (row["model_ema_decay"], "fp16" if row["use_amp"] else "no")
        assert recipe.model_options.get("ls_init_value") == row["layer_scale"]
    assert [state.randaug for state in plan.states[:: len(plan.states) - 1]] == [rows[0]["aa"], rows[-1]["aa"]]


def test_augmentation_is_the_released_one() -> None:
    chosen = recipes.train_config("swin_tiny", "x", world=GPUS).augmentation
    assert (chosen.auto_augment, chosen.erasing, chosen.erasing_mode) == ("rand-m9-mstd0.5-inc1", 0.25, "pixel")
    assert (chosen.mixup, chosen.cutmix, chosen.cutmix_share, chosen.label_smoothing) == (0.8, 1.0, 0.5, 0.1)


def test_fine_tuning_after_imagenet_22k_is_the_released_example() -> None:
    recipe = recipes.get("cswin_base_finetune_224")
    config = recipes.train_config(recipe, "x", world=GPUS)
    optimiser = config.optimiser
    assert (recipe.curriculum.equivalent_epochs, recipe.curriculum.stages[0].size) == (30, 224)
    assert (config.batch_size, config.accumulation, config.amp) == (64, 1, "fp16")
    assert (optimiser.lr, optimiser.weight_decay, optimiser.layer_decay) == (5e-5, 1e-8, 0.9)
    assert (optimiser.ema_decay, recipe.drop_path, config.schedule.warmup_epochs) == (0.9998, 0.2, 0)
    assert not config.augmentation.mixes
    assert config.augmentation.label_smoothing == 0.1
    assert recipe.curriculum.plan(IMAGENET, GPUS).lr(0) == 5e-5


def test_pictures_of_384_pixels_are_squashed_as_released() -> None:
    small, large = (recipes.train_config(f"cswin_base_finetune_{size}", "x", world=GPUS).data for size in (224, 384))
    assert (small.crop_fraction, small.squash) == (0.875, False)
    assert (large.crop_fraction, large.squash) == (1.0, True)


@pytest.mark.parametrize("name", [name for name in FROM_FILES if "in22k" in name and "large_batch" not in name])
def test_pre_training_on_imagenet_22k_saves_what_is_published(name: str) -> None:
    """Compute over that of 90 epochs at full size, beside the ratio of GPU-days."""
    recipe, variant = recipes.get(name), find(recipes.get(name).model)
    assert variant is not None
    legs = recipe.curriculum.plan().legs
    spent = sum(float(leg.passes) * variant.gmac[leg.stage.size] for leg in legs)
    published = recipe.figures[1].speedup
    assert published is not None
    assert 90 * variant.gmac[224] / spent == pytest.approx(published, rel=0.04)  # time has overheads


@pytest.mark.parametrize("name", CSWIN)
def test_large_batches_are_early_and_change_nothing_else(name: str) -> None:
    plain, large = recipes.get(name), recipes.get(f"{name}_large_batch")
    batches = {leg.stage.size: leg.batch for leg in large.curriculum.plan(IMAGENET_22K, 64).legs}
    assert batches == {96: 4 * 4096, 160: 2 * 4096, 224: 4096}
    pairs = zip(plain.curriculum.stages, large.curriculum.stages, strict=True)
    assert all((one.share, one.size, one.randaug) == (two.share, two.size, two.randaug) for one, two in pairs)
    assert (plain.train, plain.curriculum.lr, plain.curriculum.equivalent_epochs) == (
        *(large.train, large.curriculum.lr, large.curriculum.equivalent_epochs),
    )


def test_figures_stand_beside_the_recipe() -> None:
    baseline, own = recipes.get("deit_small").figures
    assert (baseline.method, baseline.top1, baseline.epochs) == ("baseline", {224: 80.3}, 300)
    assert (own.method, own.top1, own.speedup) == ("et++", {224: 81.0}, 1.6)
    assert recipes.get("deit_small", epochs=100).figures[1].top1 == {224: 79.8}
    assert [row.top1 for row in recipes.get("cswin_base_in22k_2x").figures] == [
        {224: 86.0, 384: 87.2},
        {224: 86.3, 384: 87.4},
    ]
    assert recipes.get("cswin_base_in22k_3x").figures[1].speedup == pytest.approx(126.9 / 41.9)
    assert recipes.get("vit_base_mae_hog").figures[-1].top1 == {224: 83.7}


def test_what_is_not_released_says_so() -> None:
    for name in FROM_FILES:
        source = recipes.get(name).source
        assert "general knowledge" in source
        assert "ours" in source.lower()


def test_masked_pre_training_crops_and_flips_alone() -> None:
    config = recipes.train_config("vit_base_mae", "x", "y", world=GPUS)
    augmentation = config.augmentation
    assert (augmentation.auto_augment, augmentation.colour_jitter, augmentation.erasing) == (None, 0, 0)
    assert (augmentation.flip, augmentation.scale, augmentation.mixes) == (0.5, (0.2, 1.0), False)
    assert config.data.validation is None
    assert {stage.randaug for stage in recipes.get("vit_base_mae").curriculum.stages} == {0}


@pytest.mark.parametrize(
    ("masked", "preset"), [("vit_base_mae", "et:iccv"), ("vit_large_mae", "et:iccv"), ("vit_base_mae_hog", "et++:deit")]
)
def test_masked_pre_training_follows_the_presets_sizes(masked: str, preset: str) -> None:
    own = recipes.get(masked).curriculum
    known = type(own).preset(preset, epochs=own.equivalent_epochs)
    assert [(leg.stage.size, leg.passes) for leg in own.plan().legs] == [
        (leg.stage.size, leg.passes) for leg in known.plan().legs
    ]
    assert (own.unit, own.downsample) == (known.unit, known.downsample)


def built(name: str, num_classes: int = 10) -> nn.Module:
    with torch.device("meta"):
        return recipes.get(name).build(num_classes)


@pytest.mark.parametrize("name", ["deit_tiny", "swin_tiny", "cswin_tiny", "convnext_tiny", "resnet50"])
def test_a_model_takes_its_recipe(name: str) -> None:
    recipe, model = recipes.get(name), built(name)
    rates = [part.drop_prob for part in model.modules() if type(part).__name__ == "DropPath"]
    assert max(rates, default=0) == pytest.approx(recipe.drop_path)
    assert getattr(model, "num_classes", None) == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in recipes.names() if name not in ("deit_tiny", "swin_tiny", "resnet50")]
)
def test_every_model_takes_its_recipe_and_its_optimiser(name: str) -> None:
    settings, model = recipes.train_config(name, "x", world=GPUS).optimiser, built(name)
    groups = param_groups(model, weight_decay=settings.weight_decay, layer_decay=settings.layer_decay)
    assert build_optimiser(groups, settings, settings.lr).param_groups


@pytest.mark.parametrize("name", ["cswin_base", "vit_base_mae"])
def test_optimisers_of_both_kinds_are_built_with_the_recipes_numbers(name: str) -> None:
    settings = recipes.train_config(name, "x", world=GPUS).optimiser
    optimiser = build_optimiser([{"params": [nn.Parameter(torch.ones(2, 2))]}], settings, settings.lr)
    assert (type(optimiser).__name__, optimiser.defaults["betas"], optimiser.defaults["eps"]) == {
        "cswin_base": ("Lamb", (0.9, 0.999), 1e-6),
        "vit_base_mae": ("AdamW", (0.9, 0.95), 1e-8),
    }[name]


def test_a_masked_model_is_built_with_its_target_and_fits_its_fine_tuning() -> None:
    model, classifier = built("vit_base_mae_hog"), built("vit_base_mae_finetune")
    assert isinstance(model, MaskedAutoencoder)
    assert (model.target, model.mask_ratio, model.decoder.embed.out_features) == ("hog", 0.75, 512)
    own, theirs = (
        {name: value.shape for name, value in each.items()} for each in (model.encoder_state(), classifier.state_dict())
    )
    assert {name: shape for name, shape in theirs.items() if not name.startswith("head.")} == own


def test_recipes_start_from_recipes() -> None:
    starts = {name: recipes.get(name).train.starts_from for name in recipes.names()}
    assert {name for name, start in starts.items() if start} == {name for name in recipes.names() if "finetune" in name}
    for name, start in starts.items():
        assert not start or recipes.get(start).model == recipes.get(name).model


def test_the_drop_path_of_efficienttrain_plus_plus_grows_with_the_epochs_that_of_2023_does_not() -> None:
    assert recipes.get("swin_tiny", epochs=100).drop_path == pytest.approx(0.1)
    assert recipes.get("swin_tiny_iccv", epochs=100).drop_path == pytest.approx(0.2)


def test_another_full_size_and_batch_reach_the_configuration() -> None:
    recipe = recipes.get("deit_small", base_size=112, batch=512, micro_batch=64)
    config = recipes.train_config(recipe, "x")
    assert [stage.size for stage in recipe.curriculum.stages[::3]] == [48, 80, 96, 112]
    assert (config.data.image_size, config.batch_size, config.accumulation) == (112, 128, 4)


def test_what_is_given_takes_the_place_of_the_recipes() -> None:
    given: dict[str, Any] = {"optimiser": {"weight_decay": 0.3}, "model_options": {"num_classes": 7}}
    config = recipes.train_config("swin_tiny", "x", world=GPUS, amp="bf16", seed=3, data={"num_classes": 7}, **given)
    assert (config.amp, config.seed, config.data.num_classes) == ("bf16", 3, 7)
    assert (config.optimiser.weight_decay, config.optimiser.clip_norm) == (0.3, 5.0)
    assert config.model_options == {"drop_path_rate": 0.2, "num_classes": 7}


def test_clipping_ends_with_mixed_precision_and_says_so() -> None:
    with pytest.warns(UserWarning, match=r"swin_tiny are clipped in mixed precision only"):
        config = recipes.train_config("swin_tiny", "x", world=GPUS, amp="no")
    assert config.optimiser.clip_norm is None
    kept = recipes.train_config("swin_tiny", "x", world=GPUS, amp="no", optimiser={"clip_norm": 5.0})
    assert kept.optimiser.clip_norm == 5.0


def written(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


GOOD = """
source: mine
models:
  resnet18: {train: {drop_path: 0.1}}
curriculum:
  preset: et++
  epochs: 50
  batch: 256
  lr: {base: 1.0e-3}
train:
  amp: bf16
  optimiser: {name: lamb, betas: [0.9, 0.99]}
"""


def test_a_file_of_ones_own_is_a_recipe(tmp_path: Path) -> None:
    recipe = recipes.get(written(tmp_path, GOOD), batch=128)
    assert (recipe.name, recipe.model, recipe.source) == ("resnet18_mine", "resnet18", "mine")
    assert (recipe.curriculum.batch, recipe.curriculum.equivalent_epochs, len(recipe.curriculum.stages)) == (
        128,
        50,
        10,
    )
    assert (recipe.train.optimiser.betas, recipe.train.drop_path) == ((0.9, 0.99), 0.1)
    assert recipe.drop_path == pytest.approx(0.1 * 50 / 200)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [", "cannot read the recipe"),
        ("source: x", "expected the keys source, models"),
        (GOOD.replace("source", "sauce"), "unknown key 'sauce': did you mean source"),
        (GOOD.replace("amp", "amq"), "train: unknown key 'amq': did you mean amp"),
        (GOOD.replace("betas", "beta"), "optimiser: unknown key 'beta': did you mean betas"),
        (GOOD.replace("preset: et++", "preset: et+++"), r"preset 'et\+\+\+' is unknown"),
        (GOOD.replace("batch: 256", "batches: 256"), "unknown key 'batches'"),
        (GOOD.replace("1.0e-3", "fast"), "curriculum: .*lr: base"),
        (GOOD.replace("resnet18: {train: {drop_path: 0.1}}", "{a: {}, b: {}}"), "has 2 models: leave one"),
        (GOOD + "published: {method: et++, row: 0}", "resnet18 has no published row 0"),
        (GOOD + "published: {method: et++, line: 0}", "expected method and row, or a list"),
        (GOOD + "published: [{method: et++}]", "published: .*top1"),
        (GOOD.replace("[0.9, 0.99]}", "[0.9, 0.99]}\n  decay: 1"), "unknown key 'decay'"),
        (GOOD.replace("[0.9, 0.99]", "[0.9, 0.99]}\n  augmentation: {flip: 3"), "flip=3: expected a probability"),
    ],
)
def test_a_file_that_is_wrong_is_told_where(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        recipes.get(written(tmp_path, text))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recipes.get("swim_tiny"), r"recipe 'swim_tiny' is unknown: did you mean .*swin_tiny"),
        (lambda: recipes.get("swin_tiny", batches=8), "unknown field 'batches': did you mean batch"),
        (lambda: recipes.get("swin_tiny", base_size=200), "not a multiple of 32"),
        (lambda: recipes.train_config("swin_tiny", "x", world=GPUS, ampere=1), "TrainConfig has no field 'ampere'"),
        (lambda: recipes.train_config("swin_tiny", "x", optimiser={"rate": 1}), "OptimiserConfig has no field 'rate'"),
        (lambda: recipes.train_config("swin_tiny", "x", world=7), "does not divide by 7 processes"),
    ],
)
def test_a_wrong_name_or_number_is_told(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
