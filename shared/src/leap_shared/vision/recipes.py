"""Recipes of published trainings: hyperparameters by a variant's name, and what `Trainer` makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Number
from leap_shared.vision.config import DataConfig, OptimiserConfig, ScheduleConfig, TrainConfig
from leap_shared.vision.optimisation import parameter_groups

__all__ = ["LearningRates", "Protocol", "Recipe"]

Protocol = Literal["reference", "timm"]


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
    labels. The references set each rate after an update, so every update takes the rate of the one before it.

    Attributes:
        name: of the variant.
        batch_size: pictures per GPU, of the authors' 8.
        drop_path_rate: of the last block; those before it rise to it linearly.
        epochs, cooldown_epochs, warmup_epochs: of warm-up and cosine together, behind them, and of the warm-up.
        lr, warmup_lr, min_lr: for 512 pictures per update; all three grow with the batch.
        weight_decay: of all but vectors, biases and the model's `no_weight_decay()`.
        clip_norm: largest norm of the gradient.
        ema_decay: of the moving average, where the authors keep one.
        image_size: side of the pictures in pixels.
        crop_fraction: share of the resized picture's side that the protocol "timm" keeps.
        fine_tunes: the variant whose trained weights the recipe starts from.
        note: what is not the authors'.
        POSITIONS: tables that are no vectors, which `decay_pos` is about; names with wildcards.
        EMA_DECAY: of an average that is asked for where the authors keep none.
    """

    POSITIONS: ClassVar[tuple[str, ...]] = ("pos_embed*",)
    EMA_DECAY: ClassVar[float] = 0.9999
    BASE_BATCH: ClassVar[int] = 512
    GPUS: ClassVar[int] = 8

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
    image_size: int = 224
    crop_fraction: float = 0.9
    fine_tunes: str | None = None
    note: str = ""

    @property
    def batch(self) -> int:
        """Pictures of one update of the authors' training."""
        return self.batch_size * self.GPUS

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
        scale = batch / self.BASE_BATCH
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
            decay_pos: decay the tables of `POSITIONS` too, as the references do since they are no vectors.
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
                ratio, and take the centre; from 384 on, resize to `image_size` itself. "timm" keeps the ratio, and
                cuts by `crop_fraction`.
        """
        size = image_size or self.image_size
        squash = protocol == "reference"
        fraction = self.crop_fraction
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
        model_options: Mapping[str, bool | int | float | str] | None = None,
        **settings: Any,
    ) -> TrainConfig:
        """The recipe as `Trainer` takes it.

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
            ema: keep a moving average of the weights, with `EMA_DECAY` where the authors keep none.
            decay_pos: see `parameter_groups`.
            model_options: more options of the model.
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
            model_options={**options, **(model_options or {})},
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
            base_batch=self.BASE_BATCH,
            weight_decay=self.weight_decay,
            betas=(0.9, 0.999),
            eps=1e-8,
            no_decay=() if decay_pos else self.POSITIONS,
            clip_norm=self.clip_norm,
            ema_decay=(self.ema_decay or self.EMA_DECAY) if ema else None,
        )
