"""Everything that a training run depends on, as frozen dataclasses that YAML and command lines can hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from leap_shared.errors import UserError

__all__ = ["AugmentationConfig", "DataConfig", "OptimiserConfig", "ScheduleConfig", "TrainConfig"]


def _require(config: object, expected: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raise a UserError for the first of these fields that is neither None nor as expected."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not holds(value):
            raise UserError(f"{name}={value!r}: expected {expected}")


@dataclass(frozen=True)
class DataConfig:
    """Pictures to learn from, to validate with, and how they become tensors.

    A source is one of: a folder with a folder of pictures per class; webdataset shards (``shards/{000..012}.tar`` or
    ``shards/*.tar``); an ``.npz`` file with `images` (uint8, N x H x W x 3 or N x H x W) and `labels`; a folder written
    by ``datasets.save_to_disk``; ``hf:NAME`` or, pinned, ``hf:NAME@REVISION`` for a data set of the Hugging Face hub.
    """

    train: str
    validation: str | None = None
    train_split: str = "train"  # of a Hugging Face data set, as the next three
    validation_split: str = "validation"
    image_column: str | None = None  # found by its type unless named
    label_column: str | None = None
    num_classes: int | None = None  # found in the data unless given
    image_size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bicubic"
    crop_fraction: float = 0.875  # validation resizes to image_size / crop_fraction and takes the centre
    squash: bool = False  # validation resizes to a square, whatever the ratio of height and width

    def __post_init__(self) -> None:
        _require(self, "a folder, .tar shards, an .npz file or hf:NAME", bool, "train", "validation")
        _require(self, "2 or more", lambda value: value >= 2, "num_classes")
        _require(self, "a positive number of pixels", lambda value: value > 0, "image_size")
        _require(self, "a number above 0, at most 1", lambda value: 0 < value <= 1, "crop_fraction")
        _require(self, "positive numbers", lambda value: min(value) > 0, "std")


@dataclass(frozen=True)
class AugmentationConfig:
    """What happens to training pictures; the defaults are the usual ones of ImageNet recipes."""

    scale: tuple[float, float] = (0.08, 1.0)  # share of the picture's area that the random crop keeps
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    crop_padding: int | None = None  # for small pictures: pad by this and crop, in place of the resized crop
    flip: float = 0.5
    colour_jitter: float = 0.4  # inactive beside auto_augment, as in timm
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    erasing: float = 0.25
    erasing_mode: Literal["const", "rand", "pixel"] = "pixel"
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_probability: float = 1.0
    cutmix_share: float = 0.5  # probability of CutMix where mixup is on too
    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        shares = ("flip", "erasing", "mix_probability", "cutmix_share")
        _require(self, "a probability", lambda value: 0 <= value <= 1, *shares)
        _require(self, "0 or more", lambda value: value >= 0, "mixup", "cutmix", "colour_jitter", "crop_padding")
        _require(self, "two positive numbers in order", lambda value: 0 < value[0] <= value[1], "scale", "ratio")
        _require(self, "0 or more, below 1", lambda value: 0 <= value < 1, "label_smoothing")

    @property
    def mixes(self) -> bool:
        """Whether pictures of one batch are mixed with each other."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True)
class OptimiserConfig:
    """timm's optimiser of that name, its parameter groups, and what is done to gradients and averages."""

    name: str = "adamw"
    lr: float = 5e-4
    base_batch: int | None = 512  # learning rates are for this batch and grow with the global one; None: as given
    weight_decay: float = 0.05
    momentum: float = 0.9
    betas: tuple[float, float] | None = None
    eps: float | None = None
    layer_decay: float | None = None  # learning rate of each layer over that of the next
    no_decay: tuple[str, ...] = ()  # names with wildcards, beside 1-D tensors and the model's no_weight_decay()
    clip_norm: float | None = None
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        _require(self, "a positive number", lambda value: 0 < value < float("inf"), "lr", "base_batch", "clip_norm")
        _require(self, "0 or more", lambda value: value >= 0, "weight_decay", "momentum", "eps")
        _require(self, "a number above 0, at most 1", lambda value: 0 < value <= 1, "layer_decay")
        _require(self, "0 or more, below 1", lambda value: 0 <= value < 1, "ema_decay")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over time; `warmup_lr` and `min_lr` scale with the batch as `lr` does."""

    kind: Literal["cosine", "linear", "step", "multistep", "constant"] = "cosine"
    per: Literal["update", "epoch"] = "update"
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    warmup_prefix: bool = False  # warm-up comes before the schedule and lengthens training; else it is its first part
    min_lr: float = 0.0
    cooldown_epochs: int = 0  # at min_lr after the schedule
    decay_epochs: tuple[int, ...] = (30, 60, 90)  # where multistep multiplies by decay_rate; step: every first of them
    decay_rate: float = 0.1
    lag_updates: int = 0  # 1: each update takes the rate of the one before it

    def __post_init__(self) -> None:
        numbers = ("warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs", "decay_rate", "lag_updates")
        _require(self, "0 or more", lambda value: value >= 0, *numbers)
        _require(self, "positive numbers of epochs", lambda value: value and min(value) > 0, "decay_epochs")


@dataclass(frozen=True)
class TrainConfig:
    """One training run; its global batch is batch_size * accumulation * number of processes."""

    data: DataConfig
    model: str = ""  # timm's name; unused where a model is passed
    model_options: dict[str, bool | int | float | str] = field(default_factory=dict)
    epochs: int = 300
    updates: int | None = None  # train for so many updates, which the schedule spans, in place of epochs
    batch_size: int = 128  # pictures per process and forward pass
    accumulation: int = 1
    amp: Literal["no", "bf16", "fp16"] = "no"
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    seed: int = 0
    workers: int = 4
    log_updates: int = 50
    save_updates: int | None = None  # a checkpoint every so many updates, beside the one after each epoch
    keep_checkpoints: int = 2
    validation_epochs: int = 1
    tensorboard: bool = True

    def __post_init__(self) -> None:
        numbers = ("epochs", "updates", "batch_size", "accumulation", "log_updates", "save_updates")
        _require(self, "a positive number", lambda value: value > 0, *numbers, "keep_checkpoints", "validation_epochs")
        _require(self, "0 or more", lambda value: value >= 0, "seed", "workers")
        if self.updates and (self.schedule.warmup_prefix or self.schedule.cooldown_epochs):
            raise UserError("updates goes with neither warmup_prefix nor cooldown_epochs: set epochs instead")
        if self.augmentation.mixes and self.batch_size % 2:
            raise UserError(f"batch_size={self.batch_size}: mixup and CutMix pair the pictures, so give an even number")
