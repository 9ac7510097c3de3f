"""How the variants are trained and evaluated on ImageNet-1K: the settings of the release, by the variant's name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import numpy as np
import timm
from numpy.typing import ArrayLike, NDArray
from torch import nn

from leap_flatten.models.variants import find
from leap_shared.errors import UserError
from leap_shared.vision import DataConfig, OptimiserConfig, ScheduleConfig, TrainConfig
from leap_shared.vision.bodies.grids import Number
from leap_shared.vision.optimisation import parameter_groups

__all__ = ["RECIPES", "LearningRates", "Protocol", "Recipe", "get"]

Protocol = Literal["reference", "timm"]
BASE_BATCH = 512
GPUS = 8
POSITIONS = ("*.scale", "*.positional_encoding", "pos_embed*")
EMA_DECAY = 0.99984


@dataclass(frozen=True)
class LearningRates(Sequence[float]):
    """The rate at construction, then the rate after each update, which is the one that the next update takes.

    Computed where they are asked for; ``numpy.asarray`` gives all.

    Args:
        lr, warmup_lr, min_lr: rates of the cosine's beginning, of the warm-up's beginning, and of the cosine's end.
        warmup_steps: updates of the linear warm-up; they are the first ones of the cosine, not before it.
        cosine_steps: updates of warm-up and cosine.
        steps: all updates, those at `min_lr` behind the cosine with them.
    """

    lr: float
    warmup_lr: float
    min_lr: float
    warmup_steps: int
    cosine_steps: int
    steps: int

    def at(self, steps: ArrayLike | Number) -> NDArray[np.float64]:
        """Rates after the updates `steps`, counted from 0 over all epochs, in an array of the same shape.

        Raises:
            UserError: they are no whole numbers, or some are negative.
        """
        time = np.asarray(steps)
        if time.size and (time.dtype.kind not in "iu" or time.min() < 0):
            raise UserError(f"steps {steps!r}: expected whole numbers, 0 or more")
        warming = self.warmup_lr + time * ((self.lr - self.warmup_lr) / max(self.warmup_steps, 1))
        phase = np.minimum(time / self.cosine_steps, 1)
        falling = self.min_lr + 0.5 * (self.lr - self.min_lr) * (1 + np.cos(np.pi * phase))
        return np.where(time < self.warmup_steps, warming, falling)

    def __len__(self) -> int:
        return self.steps + 1

    @overload
    def __getitem__(self, index: int) -> float: ...

    @overload
    def __getitem__(self, index: slice) -> list[float]: ...

    def __getitem__(self, index: int | slice) -> float | list[float]:
        chosen = np.maximum(np.asarray(range(len(self))[index], dtype=np.int64) - 1, 0)
        found: float | list[float] = self.at(chosen).tolist()
        return found

    def __iter__(self) -> Iterator[float]:
        return iter(self[:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype=dtype)


@dataclass(frozen=True)
class Recipe:
    """How one variant is trained, per iteration: warm-up inside a cosine, then a cool-down at its end.

    AdamW with the augmentation that `AugmentationConfig` has by default; the loss is cross-entropy with the mixed
    labels. The reference sets each rate after an update, so every update takes the rate of the one before it.

    Attributes:
        name: of the variant.
        batch_size: pictures per GPU, of the authors' 8.
        drop_path_rate: of the last block; those before it rise to it linearly.
        epochs, cooldown_epochs, warmup_epochs: of warm-up and cosine together, behind them, and of the warm-up.
        lr, warmup_lr, min_lr: for 512 pictures per update; all three grow with the batch.
        weight_decay: of all but vectors, biases and the model's `no_weight_decay()`.
        clip_norm: largest norm of the gradient.
        ema_decay: of the moving average, where the authors keep one.
        fine_tunes: the variant whose trained weights the recipe starts from.
        note: what is not the authors'.
    """

    name: str
    batch_size: int
    drop_path_rate: float
    epochs: int = 300
    cooldown_epochs: int = 10
    warmup_epochs: int = 20
    lr: float = 5e-4
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    clip_norm: float | None = None
    ema_decay: float | None = None
    fine_tunes: str | None = None
    note: str = ""

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return find(self.name).image_size

    @property
    def batch(self) -> int:
        """Pictures of one update of the authors' training."""
        return self.batch_size * GPUS

    def with_lr(self, lr: float) -> Recipe:
        """The recipe with another `lr`; the rates where warm-up begins and the cosine ends keep their ratio to it."""
        factor = lr / self.lr
        return replace(self, lr=lr, warmup_lr=self.warmup_lr * factor, min_lr=self.min_lr * factor)

    def learning_rates(self, batch: int | None = None, steps_per_epoch: int = 1251) -> LearningRates:
        """The rates of a training.

        Args:
            batch: pictures of one update, over all GPUs; the authors' where it is not given.
            steps_per_epoch: updates of an epoch; ImageNet-1K has 1251 of 1024 pictures.

        Raises:
            UserError: a number is not positive.
        """
        batch = self.batch if batch is None else batch
        if batch < 1 or steps_per_epoch < 1:
            raise UserError(f"batch {batch}, steps_per_epoch {steps_per_epoch}: expected positive numbers")
        scale = batch / BASE_BATCH
        return LearningRates(
            self.lr * scale,
            self.warmup_lr * scale,
            self.min_lr * scale,
            self.warmup_epochs * steps_per_epoch,
            self.epochs * steps_per_epoch,
            (self.epochs + self.cooldown_epochs) * steps_per_epoch,
        )

    def parameter_groups(self, model: nn.Module, decay_pos: bool = True) -> list[dict[str, Any]]:
        """Groups for an optimiser, without and with weight decay; frozen parameters are in none.

        Args:
            model: of any head and size.
            decay_pos: decay `scale`, `positional_encoding` and PVT's `pos_embed` too, as the reference does since they
                are no vectors.
        """
        return parameter_groups(model, self._optimiser(decay_pos, ema=False))

    def data_config(
        self,
        train: str,
        validation: str | None = None,
        *,
        image_size: int | None = None,
        protocol: Protocol = "reference",
    ) -> DataConfig:
        """Where the pictures are, and how those for validation become tensors.

        Args:
            train: source of training pictures, as `DataConfig` takes it.
            validation: source of validation pictures.
            image_size: side in pixels; the variant's where it is not given.
            protocol: "reference" for the published figures: resize to a square of int(256 / 224 * size), whatever the
                ratio, and take the centre; from 384 on, resize to `image_size` itself. "timm" keeps the ratio, and cuts
                by the variant's `crop_pct`.
        """
        size = image_size or self.image_size
        squash = protocol == "reference"
        fraction = timm.get_pretrained_cfg(self.name).crop_pct
        if squash:
            fraction = 224 / 256 if size < 384 else 1.0
        return DataConfig(train, validation, image_size=size, crop_fraction=fraction, squash=squash)

    def train_config(
        self,
        train: str,
        validation: str | None = None,
        *,
        gpus: int = 1,
        batch_size: int | None = None,
        accumulation: int | None = None,
        epochs: int | None = None,
        image_size: int | None = None,
        protocol: Protocol = "reference",
        ema: bool = False,
        decay_pos: bool = True,
        denominator: str = "mean",
        **settings: Any,
    ) -> TrainConfig:
        """The recipe as `leap_shared.vision.Trainer` takes it.

        Args:
            train: see `data_config`.
            validation: see there.
            gpus: processes that share the work.
            batch_size: pictures per process and forward pass; the authors' number per GPU where it is not given.
            accumulation: forward passes per update; where it is not given, as many as come nearest from below to the
                authors' batch. The learning rates follow the batch that results.
            epochs: another number of them; warm-up and cool-down change in proportion.
            image_size: see `data_config`.
            protocol: see there.
            ema: keep a moving average of the weights, with the authors' decay for CSWin also where they keep none.
            decay_pos: see `parameter_groups`.
            denominator: see `leap_flatten.FocusedLinearAttention`.
            **settings: of `TrainConfig`, as `amp`, `seed` or `workers`.

        Raises:
            UserError: a number is impossible.
        """
        size = batch_size or self.batch_size
        if gpus < 1:
            raise UserError(f"gpus {gpus}: expected 1 or more")
        share = (epochs or self.epochs) / self.epochs
        options = {"drop_path_rate": self.drop_path_rate, "img_size": image_size or self.image_size}
        return TrainConfig(
            self.data_config(train, validation, image_size=image_size, protocol=protocol),
            model=self.name,
            model_options={**options, "denominator": denominator},
            epochs=epochs or self.epochs,
            batch_size=size,
            accumulation=max(self.batch // (size * gpus), 1) if accumulation is None else accumulation,
            optimiser=self._optimiser(decay_pos, ema),
            schedule=ScheduleConfig(
                warmup_epochs=self.warmup_epochs * share,
                warmup_lr=self.warmup_lr,
                min_lr=self.min_lr,
                cooldown_epochs=round(self.cooldown_epochs * share),
                lag_updates=1,
            ),
            **settings,
        )

    def _optimiser(self, decay_pos: bool, ema: bool) -> OptimiserConfig:
        return OptimiserConfig(
            lr=self.lr,
            base_batch=BASE_BATCH,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.999),
            eps=1e-8,
            no_decay=() if decay_pos else POSITIONS,
            clip_norm=self.clip_norm,
            ema_decay=(self.ema_decay or EMA_DECAY) if ema else None,
        )


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
}
PVT: dict[str, Any] = {"warmup_epochs": 5}
LARGE_PVT: dict[str, Any] = {**PVT, "clip_norm": 1.0}
CSWIN: dict[str, Any] = {"ema_decay": EMA_DECAY}
CSWIN_384: dict[str, Any] = {
    "epochs": 20,
    "warmup_epochs": 0,
    "lr": 5e-6,
    "warmup_lr": 5e-6,
    "min_lr": 5e-7,
    "weight_decay": 1e-8,
    "ema_decay": 0.99982,
    "fine_tunes": "flatten_cswin_base",
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
