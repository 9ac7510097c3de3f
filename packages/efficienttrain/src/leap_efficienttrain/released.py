"""What the released launch scripts ask for: stages, batches, optimiser and moving average of each model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from leap_efficienttrain.models import variants
from leap_efficienttrain.schedule import resume_epoch, stage_boundary, stage_epochs
from leap_shared.errors import UserError, did_you_mean
from leap_shared.vision.bodies.grids import Number

__all__ = ["BASE_SIZE", "GPUS", "RECIPES", "ReleasedRecipe", "StageRow", "randaug_policy", "recipe_of", "stage_table"]

BASE_SIZE, GPUS, BATCH, FINAL_LR = 224, 8, 4096, 1e-6
ICCV_SIZES, ICCV_MAGNITUDES, ICCV_MICRO_BATCH = (160, 160, 160, 192, 224), (1, 3, 5, 7, 9), 256
LARGE: tuple[int, ...] = (96,) * 2 + (160,) * 4 + (224,) * 4
DEIT: tuple[int, ...] = (96,) * 2 + (160,) * 4 + (192,) * 2 + (224,) * 2
CONVNEXT: tuple[int, ...] = (160,) * 6 + (224,) * 4


@dataclass(frozen=True)
class ReleasedRecipe:
    """One model's settings, for 8 GPUs (spec of the launch scripts; EfficientTrain++ unless said)."""

    model: str
    drop_path: float
    micro_batch: dict[int, int]
    """Pictures per GPU and forward pass, by input size."""
    sizes: tuple[int, ...] = LARGE
    amp: bool = True
    clip_grad: float | None = None
    ema: float | None = None
    warmup_share: float | None = None
    """Warm-up as a share of all epochs; 20 epochs of the stage's own where there is none."""
    optimiser: str = "adamw"
    lr: float = 4e-3
    eps: float = 1e-8
    weight_decay: float = 0.05
    layer_scale: float | None = None
    replay: tuple[tuple[int, int], ...] = ()
    """Replay times and buffer in batches of each stage, where a script with a replay buffer was released."""


def _per_size(small: int, middle: int, full: int) -> dict[int, int]:
    return {96: small, 160: middle, 192: full, 224: full}


DEIT_REPLAY = ((4, 1920),) * 2 + ((2, 256),) * 4 + ((1, 0),) * 4
SWIN_REPLAY = ((2, 1024),) * 2 + ((1, 0),) * 8
SMALL, BASE = _per_size(512, 512, 256), _per_size(512, 256, 128)
SWIN: dict[str, Any] = {"clip_grad": 5.0}
CNN: dict[str, Any] = {"amp": False, "sizes": CONVNEXT, "ema": 0.9999, "layer_scale": 1e-6}
LAMB: dict[str, Any] = {"optimiser": "lamb", "lr": 8e-3, "eps": 1e-6, "weight_decay": 0.10}

RECIPES = {
    recipe.model: recipe
    for recipe in (
        *(
            ReleasedRecipe(f"deit_{width}_patch16_224", 0.1, SMALL, DEIT, replay=DEIT_REPLAY, warmup_share=0.2, **SWIN)
            for width in ("tiny", "small")
        ),
        ReleasedRecipe("swin_tiny", 0.2, SMALL, replay=SWIN_REPLAY, **SWIN),
        ReleasedRecipe("swin_small", 0.3, BASE, **SWIN),
        ReleasedRecipe("swin_base", 0.5, BASE, **SWIN),
        ReleasedRecipe("CSWin_64_12211_tiny_224", 0.2, SMALL, ema=0.9999, replay=SWIN_REPLAY),
        ReleasedRecipe("CSWin_64_24322_small_224", 0.4, BASE, ema=0.9999),
        ReleasedRecipe("CSWin_96_24322_base_224", 0.5, BASE, ema=0.9998, **LAMB),
        ReleasedRecipe("convnext_tiny", 0.1, _per_size(256, 256, 128), **CNN),
        ReleasedRecipe("convnext_small", 0.4, _per_size(128, 128, 64), **CNN),
        ReleasedRecipe("convnext_base", 0.5, _per_size(128, 128, 64), **CNN),
        ReleasedRecipe("resnet50", 0.0, _per_size(512, 512, 512), amp=False, replay=DEIT_REPLAY),
    )
}
ALIASES = {alias: name for alias, name in variants.ALIASES.items() if name in RECIPES and alias != name}


class StageRow(TypedDict):
    """One stage of a released script; `batch_size` is per GPU of 8, epochs count in the stage's own unit."""

    model: str
    input_size: int
    aa: str
    epochs: int
    start_epoch: int
    end_epoch: int
    epochs_run: int
    warmup_epochs: int
    batch_size: int
    update_freq: int
    lr: float
    drop_path: float
    replay_times: int
    replay_buffer_size: int
    use_amp: bool
    clip_grad: float | None
    model_ema: bool
    model_ema_decay: float | None
    opt: str
    opt_eps: float
    weight_decay: float
    layer_scale: float | None


def recipe_of(model: str) -> ReleasedRecipe:
    """The recipe of a model by its official name, its short one, or timm's.

    Raises:
        UserError: no script for it was released.
    """
    name = ALIASES.get(model, model)
    if name not in RECIPES:
        raise UserError(f"no launch script was released for {model!r}: {did_you_mean(model, [*RECIPES, *ALIASES])}")
    return RECIPES[name]


def randaug_policy(magnitude: Number) -> str:
    """RandAugment as the scripts name it in timm's terms: two operations, deviation 0.5, increasing severities."""
    return f"rand-m{magnitude:g}-mstd0.5-inc1"


def stage_table(
    model: str, epochs: Number, release: Literal["R1", "R2"] = "R2", replay: bool = False
) -> list[StageRow]:
    """What the released scripts train in each stage, with the epoch counters that their resume arithmetic gives.

    Args:
        model: official name of a model, such as swin_tiny.
        epochs: equivalent epochs T of R2, epochs of R1.
        release: R1 (EfficientTrain, ICCV 2023) or R2 (EfficientTrain++, TPAMI 2024).
        replay: the scripts with a replay buffer.

    Raises:
        UserError: there is no such script, or `epochs` is not positive.
    """
    recipe = recipe_of(model)
    if epochs <= 0:
        raise UserError(f"epochs {epochs}: expected a positive number")
    if replay and (release == "R1" or not recipe.replay):
        able = ", ".join(name for name, other in RECIPES.items() if other.replay)
        raise UserError(f"no {release} script with a replay buffer for {model}: R2 has them for {able}")
    return _first_release(recipe, epochs) if release == "R1" else _second_release(recipe, epochs, replay)


def _row(recipe: ReleasedRecipe, size: int, magnitude: int, first_release: bool = False, **given: Any) -> StageRow:
    """A row; the first release trains every model by AdamW with the same rate."""
    own = ReleasedRecipe(recipe.model, 0.0, {}) if first_release else recipe
    row: Any = {
        "model": recipe.model,
        "input_size": size,
        "aa": randaug_policy(magnitude),
        "use_amp": recipe.amp,
        "clip_grad": recipe.clip_grad,
        "model_ema": recipe.ema is not None,
        "model_ema_decay": recipe.ema,
        "layer_scale": recipe.layer_scale,
        "lr": own.lr,
        "opt": own.optimiser,
        "opt_eps": own.eps,
        "weight_decay": own.weight_decay,
        **given,
    }
    checked: StageRow = row
    return checked


def _first_release(recipe: ReleasedRecipe, epochs: Number) -> list[StageRow]:
    rows: list[StageRow] = []
    shares = (1,) * len(ICCV_SIZES)
    for index, (size, magnitude) in enumerate(zip(ICCV_SIZES, ICCV_MAGNITUDES, strict=True)):
        start = rows[-1]["end_epoch"] if rows else 0
        end = stage_boundary(epochs, shares, index)
        micro = ICCV_MICRO_BATCH if index == len(ICCV_SIZES) - 1 else 2 * ICCV_MICRO_BATCH
        row = _row(
            recipe,
            size,
            magnitude,
            first_release=True,
            epochs=int(epochs),
            start_epoch=start,
            end_epoch=end,
            epochs_run=end - start,
            warmup_epochs=20,
            batch_size=micro,
            update_freq=BATCH // (GPUS * micro),
            drop_path=recipe.drop_path,
            replay_times=1,
            replay_buffer_size=0,
        )
        rows.append(row)
    return rows


def _second_release(recipe: ReleasedRecipe, epochs: Number, replay: bool) -> list[StageRow]:
    rows: list[StageRow] = []
    shares = (1,) * len(recipe.sizes)
    last: StageRow | None = None  # the newest stage that left a checkpoint
    for index, size in enumerate(recipe.sizes):
        times, buffer = recipe.replay[index] if replay else (1, 0)
        own = stage_epochs(epochs, BASE_SIZE, size, times)
        end = stage_boundary(own, shares, index)
        start = 0
        if last is not None:
            start = resume_epoch(last["end_epoch"], last["input_size"], size, last["replay_times"], times)
        warmup = 20 / times
        if recipe.warmup_share is not None:
            warmup = recipe.warmup_share * epochs * (BASE_SIZE * BASE_SIZE / (size * size)) / times
        micro = recipe.micro_batch[size]
        row = _row(
            recipe,
            size,
            index,
            epochs=own,
            start_epoch=start,
            end_epoch=end,
            epochs_run=max(end - start, 0),
            warmup_epochs=int(warmup),
            batch_size=int(micro / times),
            update_freq=BATCH // (GPUS * micro),
            drop_path=recipe.drop_path * epochs / 200,
            replay_times=times,
            replay_buffer_size=buffer,
        )
        rows.append(row)
        last = row if row["epochs_run"] else last
    return rows
