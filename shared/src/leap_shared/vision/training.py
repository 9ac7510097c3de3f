"""The training loop: one process or many, and the same bits after any interruption."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor, nn

from leap_shared import files
from leap_shared.checkpoints import CheckpointFolder, check_finite, write_safetensors
from leap_shared.devices import resolve_device
from leap_shared.errors import UserError
from leap_shared.vision import data, optimisation
from leap_shared.vision.config import TrainConfig
from leap_shared.vision.evaluation import Predict, evaluate
from leap_shared.vision.learner import Learner, LossFunction
from leap_shared.vision.logs import MetricLog, Row
from leap_shared.vision.sources import Source, class_names, open_source

__all__ = ["Trainer"]

FREE = {"batch_size", "accumulation", "workers", "log_updates", "save_updates", "keep_checkpoints", "tensorboard"}


class Trainer:
    """Trains an image classifier as its configuration says and writes everything into a folder.

    The folder gets checkpoints/ (from which `train` goes on by itself), metrics.jsonl, metrics.csv, tensorboard/, and
    in the end weights.safetensors, ema.safetensors and best.safetensors (the weights that validated best).

    The order of pictures and their augmentation depend on (seed, epoch, index), dropout and mixup on (seed, update,
    process): a run that was killed anywhere goes on to the same bits on a CPU, whatever the number of workers. Under
    ``torchrun`` or ``accelerate launch`` the processes share each update's global batch, and other numbers of processes
    may go on with a run.

    `on_epoch_start` may change `batch_size`, `accumulation`, `train_transform`, and model and optimiser in place. It is
    called at each epoch's start and, where a run goes on in an epoch, before the weights are restored: what it does
    must depend on the epoch alone.

    Args:
        config: the run.
        out: its folder.
        model: trained in place of timm's `config.model`.
        train_data: read in place of `config.data.train`.
        validation_data: read in place of `config.data.validation`.
        device: as `resolve_device` takes it; several processes take one GPU each.
        loss_fn: from model, images and targets (labels, or probabilities under mixup) to the mean loss, or to a mapping
            with `loss` and what else is to be logged.
        predict: see `evaluate`.
        groups: parameter groups of a model; timm's unless given.
        learning_rate: rate of this trainer's next update, as it is used; timm's schedule unless given.
        augment: takes the place of timm's training transform.
        on_epoch_start: called with the epoch and this trainer.
        lengths: updates of each epoch, in place of `config.epochs` epochs of as many updates as the pictures fill.
        stream: gives the micro-batches of this trainer's `epoch`, from its update `done` on, in place of its loader.
        for_validation: gives what validates in place of one of the models, as a copy for another size of pictures.
        parts: more that has `state_dict` and `load_state_dict`, by name, and is kept with the checkpoints.
        reporter: shows progress: a `leap_shared.cli.Context`, or what has such `progress` and `log`.

    Raises:
        UserError: the configuration does not fit the data, the model or this machine.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        *,
        model: nn.Module | None = None,
        train_data: Source | None = None,
        validation_data: Source | None = None,
        device: str = "auto",
        loss_fn: LossFunction | None = None,
        predict: Predict | None = None,
        groups: Callable[[nn.Module], list[dict[str, Any]]] | None = None,
        learning_rate: Callable[[Trainer], float] | None = None,
        augment: data.Transform | None = None,
        on_epoch_start: Callable[[int, Trainer], None] | None = None,
        lengths: Sequence[int] | None = None,
        stream: Callable[[Trainer], Iterator[data.Batch]] | None = None,
        for_validation: Callable[[nn.Module], nn.Module] | None = None,
        parts: Mapping[str, Any] | None = None,
        reporter: Any = None,
    ) -> None:
        self.config, self.out = config, files.ensure_folder(out)
        self.batch_size, self.accumulation = config.batch_size, config.accumulation
        self.accelerator, self.device = _accelerator(resolve_device(device))
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        where, columns = config.data, (config.data.image_column, config.data.label_column)
        self.train_data = train_data or open_source(where.train, where.train_split, *columns)
        self.validation_data = validation_data
        if validation_data is None and where.validation is not None:
            self.validation_data = open_source(where.validation, where.validation_split, *columns)
        names = class_names(self.train_data)
        if self.validation_data is not None:
            data.check_classes(names, class_names(self.validation_data))
        classes = where.num_classes or len(names or ())
        if model is None:
            with data.isolated(data.derive(config.seed)):
                model = optimisation.build_model(config.model, {"num_classes": classes, **config.model_options})
        outputs = getattr(model, "num_classes", classes)
        if not 1 < len(names or "ab") <= classes <= outputs:
            given = f"num_classes {classes}, and the model {outputs} outputs"
            raise UserError(f"the pictures have {len(names or ())} classes, {given}: set num_classes to fit")
        self.model, self.num_classes = model.to(self.device), outputs
        self.train_transform = augment or data.build_transform(where, config.augmentation)
        self.epoch = self.done = self.update = 0
        self.lengths, self.stream, self.for_validation, self.more = lengths, stream, for_validation, dict(parts or {})
        self.updates = self._updates()
        parameters = groups(self.model) if groups else optimisation.parameter_groups(self.model, config.optimiser)
        self.learner = Learner(self.model, config, self.accelerator, outputs, parameters, loss_fn)
        self.schedule = optimisation.Schedule(self.learner.optimiser, config, self.updates, self.learner.scale)
        self.epochs = self.schedule.epochs if lengths is None else len(lengths)
        self.predict, self.learning_rate, self.on_epoch_start = predict, learning_rate, on_epoch_start
        self.checkpoints = CheckpointFolder(self.out / "checkpoints", config.keep_checkpoints)
        self.reporter = reporter if self.is_main else None
        self.metrics: dict[str, dict[str, float]] = {}
        self.best, self._entered = -1.0, -1
        self._pending: list[dict[str, Tensor]] = []
        self._log: MetricLog | None = None

    def train(self) -> dict[str, dict[str, float]]:
        """Train from the newest checkpoint, or from the beginning, to the end.

        Returns:
            The last validation: what `evaluate` says of the `weights` and, where there is one, of their average `ema`.

        Raises:
            UserError: loss or weights are not finite (the last good checkpoint stays), a picture cannot be read, or the
                checkpoints are those of a run with other settings.
        """
        step = self.checkpoints.restore({"trainer": self}) or 0
        total = self.config.updates or sum(self.lengths or [self.epochs * self.updates])
        bar = self.reporter.progress(description="train", total=total) if self.reporter else None
        if bar is not None:
            bar.advance(step)
        with contextlib.ExitStack() as stack:
            stack.callback(self.checkpoints.close)
            if self.is_main:
                self._log = MetricLog(self.out, step, tensorboard=self.config.tensorboard)
                stack.callback(self._log.close)
            for epoch in range(self.epoch, self.epochs):
                if epoch != self._entered:
                    self._enter(epoch, 0)
                if self.done < self.updates and not self._is_over():
                    self._train_epoch(bar)
                    self._end_epoch()
        for name, model in self.learner.models.items() if self.is_main else ():
            write_safetensors(self.out / f"{name}.safetensors", model.state_dict())
        return self.metrics

    def validate(self) -> dict[str, dict[str, float]]:
        """Scores on the validation pictures, as `train` returns them."""
        if self.validation_data is None:
            raise UserError("there are no validation pictures: set validation")
        loader = data.evaluation_loader(
            self.validation_data,
            data.build_transform(self.config.data),
            batch_size=self.config.batch_size,
            num_classes=self.num_classes,
            share=(self.rank, self.world),
            **self._loading(),
        )
        for model in self.learner.models.values() if self.world > 1 else ():
            distribute_bn(model, self.world)
        options: dict[str, Any] = {"amp": self.learner.dtype, "predict": self.predict}
        models, chosen = self.learner.models, self.for_validation or (lambda model: model)
        return {name: evaluate(chosen(model), loader, **options) for name, model in models.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that the next update depends on."""
        own = {name: getattr(self, name) for name in ("epoch", "done", "update", "metrics", "best")}
        return own | {"run": self._run()} | {name: part.state_dict() for name, part in self._parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken."""
        self.update, self.metrics, self.best, self._pending = state["update"], state["metrics"], state["best"], []
        self._enter(state["epoch"], state["done"])
        run, saved = self._run(), state["run"]
        odd = [f"{name} is {run[name]}, was {saved.get(name)}" for name in run if run[name] != saved.get(name)]
        if odd:
            raise UserError(f"{'; '.join(odd)}: take the former settings or another folder")
        for name, part in self._parts.items():
            part.load_state_dict(state[name])

    @property
    def _parts(self) -> dict[str, Any]:
        return {**self.learner.parts, **self.more}

    def _run(self) -> dict[str, Any]:
        """What must not change while a run goes on; where the pictures lie may."""
        settings = {name: value for name, value in asdict(self.config).items() if name not in FREE}
        settings["data"] = {**settings["data"], "train": len(self.train_data), "validation": ""}
        return settings | {"global batch": self.batch_size * self.accumulation * self.world}

    def _loading(self) -> dict[str, Any]:
        return {"workers": self.config.workers, "pin": self.device.type == "cuda"}

    def _order(self) -> data.TrainOrder:
        shape, position = (self.accumulation, self.world, self.batch_size), {"epoch": self.epoch, "start": self.done}
        return data.TrainOrder(len(self.train_data), shape, seed=self.config.seed, rank=self.rank, **position)

    def _enter(self, epoch: int, done: int) -> None:
        self.epoch, self.done, self._entered = epoch, done, epoch
        if self.on_epoch_start is not None:
            self.on_epoch_start(epoch, self)
        self.updates = self._updates()

    def _updates(self) -> int:
        """Updates of this epoch."""
        return self._order().updates if self.lengths is None else self.lengths[self.epoch]

    def _is_over(self) -> bool:
        return self.config.updates is not None and self.update >= self.config.updates

    def _train_epoch(self, bar: Any) -> None:
        self.model.train()
        stream = self.stream(self) if self.stream is not None else self._loaded()
        self._since = time.perf_counter()
        while self.done < self.updates and not self._is_over():
            if self.learning_rate is None:
                self.schedule.set(self.epoch, self.done, self.updates)
            else:
                rate = self.learning_rate(self)
                for group in self.learner.optimiser.param_groups:
                    group["lr"] = rate * group.get("lr_scale", 1.0)
            self._pending.append(self.learner.step(stream, self.accumulation, self.update))
            self.done, self.update = self.done + 1, self.update + 1
            text = None if self.update % self.config.log_updates else self._flush()
            if bar is not None:
                bar.advance(1, text=text)
            if self.config.save_updates and not self.update % self.config.save_updates and self.done < self.updates:
                self._save()

    def _loaded(self) -> Iterator[data.Batch]:
        pictures = data.Pictures(self.train_data, self.train_transform, self.num_classes, self.config.seed)
        return data.batches(data.train_loader(pictures, self._order(), **self._loading()))

    def _end_epoch(self) -> None:
        self._flush()
        over = self._is_over() or self.epoch + 1 == self.epochs
        if self.validation_data is not None and (over or (self.epoch + 1) % self.config.validation_epochs == 0):
            self.metrics = self.validate()
            for name, scores in self.metrics.items():
                self._write({"phase": "validation", "weights": name, **scores})
                top1 = {key: value for key, value in scores.items() if key.endswith("top1")}
                if max(top1.values()) > self.best and self.is_main:
                    state = self.learner.models[name].state_dict()
                    write_safetensors(self.out / "best.safetensors", state, {"step": str(self.update)})
                self.best = max(self.best, *top1.values())
                if self.reporter is not None:
                    self.reporter.log(f"epoch {self.epoch + 1}, {name}: {top1}")
        self._save()

    def _flush(self) -> str | None:
        """Log the means since the last flush; stop where a loss is not finite."""
        if not self._pending:
            return None
        names = list(self._pending[0])
        values = torch.stack([torch.stack([means[name] for name in names]) for means in self._pending])
        if self.world > 1:
            values = self.accelerator.reduce(values, "mean")
        first = self.update - len(self._pending) + 1
        for offset, loss in enumerate(values[:, names.index("loss")].tolist()):
            check_finite(loss, first + offset, self.checkpoints)
        rate = max(group["lr"] for group in self.learner.optimiser.param_groups)
        batch = self.batch_size * self.accumulation * self.world
        speed = len(self._pending) * batch / (time.perf_counter() - self._since)
        means = dict(zip(names, values.mean(0).tolist(), strict=True))
        self._write({"phase": "train", **means, "lr": float(rate), "images_per_second": speed})
        self._pending, self._since = [], time.perf_counter()
        return f"epoch {self.epoch + 1} loss {means['loss']:.4g}"

    def _write(self, row: Row) -> None:
        if self._log is not None:
            self._log.write({"step": self.update, "epoch": self.epoch + 1, **row})

    def _save(self) -> None:
        self._flush()
        if self.is_main:
            self.checkpoints.save(self.update, {"trainer": self})
        self.accelerator.wait_for_everyone()


def _accelerator(device: torch.device) -> tuple[Any, torch.device]:
    """Accelerate's view of the processes, and this one's device."""
    try:
        from accelerate import Accelerator
    except ModuleNotFoundError as error:
        raise UserError('training needs accelerate: pip install "leap-shared[vision]"') from error
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    accelerator = Accelerator(mixed_precision="no", cpu=many and device.type == "cpu", device_placement=False)
    return accelerator, accelerator.device if many else device
