"""One process for all stages: the core's trainer, driven by a curriculum; killed, it goes on anywhere."""

from __future__ import annotations

import copy
import hashlib
import math
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from leap_efficienttrain.cache import open_pictures
from leap_efficienttrain.checkpoints import load_checkpoint
from leap_efficienttrain.cost import gmac
from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.groups import param_groups
from leap_efficienttrain.loader import CurriculumLoader
from leap_efficienttrain.models import create_model
from leap_efficienttrain.sizes import flexible
from leap_efficienttrain.stages import any_last_size
from leap_efficienttrain.transforms import LiveTransform
from leap_shared import files
from leap_shared.checkpoints import CheckpointFolder
from leap_shared.devices import resolve_device
from leap_shared.errors import UserError
from leap_shared.vision import Source, TrainConfig, Trainer
from leap_shared.vision.data import derive, isolated
from leap_shared.vision.learner import LossFunction
from leap_shared.vision.sources import class_names

__all__ = ["CurriculumTrainer", "SearchTraining", "StageReport"]

CURRICULUM, STAGES = "curriculum.yaml", "stages.json"


@dataclass(frozen=True)
class StageReport:
    """What a stage took.

    Attributes:
        stage, size, magnitude: of the curriculum.
        updates: of the weights.
        seconds: of training, without validation; None where no two updates of a pass could be timed.
        images_per_second: that were trained on, replayed ones too; None as above.
        speedup: seconds per picture at the base size over those of this stage; None as above, or where no stage has the
            base size.
        compute_speedup: the same in operations.
    """

    stage: int
    size: int
    magnitude: int | float
    updates: int
    seconds: float | None
    images_per_second: float | None
    speedup: float | None
    compute_speedup: float


class Clock:
    """Updates of each stage that were timed, and their seconds; kept with the checkpoints."""

    def __init__(self) -> None:
        self.timed: dict[int, list[float]] = {}
        self._since: tuple[int, float] | None = None

    def tick(self, stage: int) -> None:
        """An update of a stage begins."""
        now = time.perf_counter()
        if self._since is not None and self._since[0] == stage:
            updates, seconds = self.timed.get(stage, (0, 0.0))
            self.timed[stage] = [updates + 1, seconds + now - self._since[1]]
        self._since = (stage, now)

    def seconds_per_update(self, stage: int) -> float:
        """Mean of the timed updates of a stage."""
        updates, seconds = self.timed[stage]
        return seconds / updates

    def pause(self) -> None:
        """What comes now is no training."""
        self._since = None

    def state_dict(self) -> dict[str, Any]:
        """What was timed."""
        return {"timed": {str(stage): list(values) for stage, values in self.timed.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was timed."""
        self.timed = {int(stage): list(values) for stage, values in state["timed"].items()}
        self._since = None


def _read(path: Path) -> Curriculum:
    """A curriculum that was accepted before, so that it needs no warning again."""
    with any_last_size():
        return Curriculum.from_yaml(path)


class _Held:
    """Keeps the state that a checkpoint has."""

    state: Mapping[str, Any]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.state = state


class CurriculumTrainer:
    """Trains an image classifier, or what `loss_fn` makes of a model, through the stages of a curriculum.

    It is `leap_shared.vision.Trainer` with another batch, size, magnitude and learning rate in each stage: its folder,
    checkpoints, logs, mixed precision, moving average and processes are those. The model is transferred between sizes
    in place, moments and moving average with it. Validation is at the base size, on a copy that is transferred there,
    so that all its scores compare; `validate_at="stage"` leaves the model at the stage's size, as the authors do.

    The folder also gets curriculum.yaml, and in the end stages.json with what each stage took.

    Args:
        curriculum: what is trained when. Its batch, learning rate and base size count, not those of `config`.
        config: the run.
        out: its folder.
        model: trained in place of `config.model`, which may have an official name or one of timm's.
        train_data: read in place of `config.data.train`.
        validation_data: read in place of `config.data.validation`.
        device: as `resolve_device` takes it.
        loss_fn: see the core's trainer.
        augment_at: base, or low: see `LiveTransform`.
        validate_at: base or stage.
        compile: compile the model, once for each size.
        allow_resample: see `flexible`.
        reporter: see the core's trainer.

    Raises:
        UserError: curriculum, data, model and machine do not fit together, or the folder holds the run of another
            curriculum.
    """

    def __init__(
        self,
        curriculum: Curriculum,
        config: TrainConfig,
        out: Path,
        *,
        model: nn.Module | None = None,
        train_data: Source | None = None,
        validation_data: Source | None = None,
        device: str = "auto",
        loss_fn: LossFunction | None = None,
        augment_at: Literal["base", "low"] = "base",
        validate_at: Literal["base", "stage"] = "base",
        compile: bool = False,  # noqa: A002 - the usual name of this flag
        allow_resample: bool = False,
        reporter: Any = None,
    ) -> None:
        self.curriculum, self.out, self.validate_at = curriculum, files.ensure_folder(out), validate_at
        self._check_folder()
        world, where = int(os.environ.get("WORLD_SIZE", "1")), config.data
        columns = (where.image_column, where.label_column)
        source = train_data or open_pictures(where.train, where.train_split, *columns)
        if validation_data is None and where.validation is not None:
            validation_data = open_pictures(where.validation, where.validation_split, *columns)
        self.plan = curriculum.plan(len(source), world)
        self.states = self.plan.states
        first, self._allow = self.states[0], allow_resample
        config = replace(
            config,
            data=replace(where, image_size=curriculum.base_size),
            batch_size=first.micro_batch * first.replay,
            accumulation=first.accumulate,
            epochs=len(self.states),
            optimiser=replace(config.optimiser, lr=curriculum.lr.base, base_batch=None),
        )
        if config.augmentation.mixes:
            self._check_even()
        if model is None:
            classes = where.num_classes or len(class_names(source) or ())
            with isolated(derive(config.seed)):
                model = create_model(
                    config.model, size=curriculum.base_size, num_classes=classes, **config.model_options
                )
        if compile:
            model.compile(dynamic=False)
        transform = LiveTransform(
            curriculum.base_size,
            augmentation=config.augmentation,
            downsample=curriculum.downsample,
            augment_at=augment_at,
            mean=where.mean,
            std=where.std,
        )
        self.loader = CurriculumLoader(
            source,
            transform,
            num_classes=getattr(model, "num_classes", None),
            seed=config.seed,
            workers=config.workers,
            rank=int(os.environ.get("RANK", "0")),
            world=world,
            device=resolve_device(device),
            split=math.gcd(32, *(leg.micro_batch for leg in self.plan.legs if leg.stage.replay > 1)),
        )
        self.clock = Clock()
        decay, layers = config.optimiser.weight_decay, config.optimiser.layer_decay
        self.trainer = Trainer(
            config,
            out,
            model=model,
            train_data=source,
            validation_data=validation_data,
            device=device,
            loss_fn=loss_fn,
            groups=lambda model: param_groups(model, weight_decay=decay, layer_decay=layers),
            learning_rate=self._rate,
            on_epoch_start=self._enter,
            lengths=[state.steps or 0 for state in self.states],
            stream=self._stream,
            for_validation=self._for_validation,
            parts={"replay": self.loader, "clock": self.clock},
            reporter=reporter,
        )
        self.loader.device = self.trainer.device
        learner = self.trainer.learner
        self.flexible = flexible(model, learner.optimiser, learner.ema, allow_resample=allow_resample)
        if self.trainer.is_main:
            curriculum.to_yaml(self.out / CURRICULUM)

    def train(self) -> dict[str, dict[str, float]]:
        """Train from the newest checkpoint, or from the beginning, to the end; see the core's trainer."""
        metrics = self.trainer.train()
        if self.trainer.is_main:
            files.write_json(self.out / STAGES, [vars(row) for row in self.report()])
        return metrics

    def start_from(self, folder: Path) -> None:
        """Take weights, moments and moving average of an ended training, at whatever size that had, and its folder.

        Raises:
            UserError: the folder holds no training of such a model.
        """
        held = _Held()
        if CheckpointFolder(folder / "checkpoints").restore({"trainer": held}) is None:
            raise UserError(f"{folder} has no checkpoints: give the folder of a training")
        self.flexible.set_size(_read(folder / CURRICULUM).stages[-1].size)
        for name, part in self.trainer.learner.parts.items():
            part.load_state_dict(held.state[name])

    def load(self, checkpoint: Path) -> None:
        """Take the weights of a file of any size, with a new head where it has other classes."""
        load_checkpoint(checkpoint, self.trainer.model, new_head=True)
        if self.trainer.learner.ema is not None:
            self.trainer.learner.ema.set(self.trainer.model)

    def report(self) -> list[StageReport]:
        """What each stage took until now, beside what its operations promise."""
        costs = {size: gmac(self.trainer.model, size) for size in {leg.stage.size for leg in self.plan.legs}}
        base, legs = self.curriculum.base_size, self.plan.legs
        full_cost = costs.get(base) or gmac(self.trainer.model, base)
        timed = [leg for leg in legs if leg.index in self.clock.timed]
        seconds = {leg.index: self.clock.seconds_per_update(leg.index) / leg.batch for leg in timed}
        full = [seconds[leg.index] for leg in timed if leg.stage.size == base]
        return [
            StageReport(
                stage=leg.index + 1,
                size=leg.stage.size,
                magnitude=leg.stage.randaug,
                updates=leg.updates or 0,
                seconds=seconds[leg.index] * leg.batch * (leg.updates or 0) if leg.index in seconds else None,
                images_per_second=1 / seconds[leg.index] if leg.index in seconds else None,
                speedup=statistics.fmean(full) / seconds[leg.index] if full and leg.index in seconds else None,
                compute_speedup=full_cost / costs[leg.stage.size],
            )
            for leg in legs
        ]

    def _check_folder(self) -> None:
        former = self.out / CURRICULUM
        if former.exists() and (odd := self.curriculum.differences(_read(former))):
            raise UserError(
                f"{self.out} holds the run of another curriculum ({'; '.join(odd[:5])}): take that one, "
                f"{former}, or another folder"
            )

    def _check_even(self) -> None:
        for leg in self.plan.legs:
            if leg.micro_batch * leg.stage.replay % 2:
                given = f"stage {leg.index + 1} has forward passes of {leg.micro_batch * leg.stage.replay} pictures"
                raise UserError(f"{given}, and Mixup pairs them: give an even number")

    def _enter(self, epoch: int, trainer: Trainer) -> None:
        state = self.states[epoch]
        trainer.batch_size, trainer.accumulation = state.micro_batch * state.replay, state.accumulate
        if self.flexible.set_size(state.size):
            trainer.learner.wrap()
        self.clock.pause()

    def _rate(self, trainer: Trainer) -> float:
        state = self.states[trainer.epoch]
        self.clock.tick(state.stage)
        return state.lr(trainer.done)

    def _stream(self, trainer: Trainer) -> Iterator[tuple[Tensor, Tensor]]:
        self.loader.set_state(self.states[trainer.epoch], start=trainer.done)
        return iter(self.loader)

    def _for_validation(self, model: nn.Module) -> nn.Module:
        if self.validate_at == "stage" or self.flexible.size == self.curriculum.base_size:
            return model
        twin = copy.deepcopy(model)
        flexible(twin, allow_resample=self._allow, size=self.flexible.size).set_size(self.curriculum.base_size)
        return twin


@dataclass(frozen=True)
class SearchTraining:
    """The train function of a search on pictures: `(curriculum, from_checkpoint, seed) -> (accuracy, folder)`.

    Attributes:
        config: of every training; its seed is replaced.
        folder: for all of them, each in one of its own, where a killed one goes on.
        device: as `resolve_device` takes it.
        augment_at: see `LiveTransform`.
    """

    config: TrainConfig
    folder: Path
    device: str = "auto"
    augment_at: Literal["base", "low"] = "base"

    def __call__(self, curriculum: Curriculum, from_checkpoint: str | None = None, seed: int = 0) -> tuple[float, str]:
        """Train, and score the weights, or their moving average where there is one, in percent."""
        text = f"{curriculum.to_yaml()}{from_checkpoint}{seed}"
        out = self.folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        config = replace(self.config, seed=seed)
        trainer = CurriculumTrainer(curriculum, config, out, device=self.device, augment_at=self.augment_at)
        if from_checkpoint is not None:
            trainer.start_from(Path(from_checkpoint))
        scores = trainer.train()
        return scores.get("ema", scores["weights"])["top1"], str(out)
