"""Curricula for Lightning."""
# ruff: noqa: ARG002 - callbacks have one interface

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from leap_efficienttrain import curriculum as curricula
from leap_efficienttrain.adapters import Session
from leap_efficienttrain.loops import accumulations, batch_size, dataset_length, updates_ahead
from leap_shared.errors import UserError

try:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
except ImportError as error:
    raise UserError('Lightning is not installed: pip install "leap-efficienttrain[lightning]"') from error

__all__ = ["Curriculum", "trainer_arguments"]

NAMES = ("model", "net", "network", "backbone")


class Curriculum(Callback):
    """Drives size, augmentation, learning rate and accumulation of a LightningModule by a curriculum, in one `fit()`.

    Pictures at the base size become smaller before the model; with `transform` the loader makes them small already.
    Validation is at the base size. `fit(ckpt_path=...)` goes on from a checkpoint of any update; in the middle of an
    epoch, Lightning begins the loader anew unless that has `state_dict` and `load_state_dict`. Strategies: one device,
    and DDP. Micro-batches have one size, without replay.

    Args:
        curriculum: what is trained when.
        transform: the `LiveTransform`, with output "float", of the training data set.
        samples: pictures of the training set; the data set's unless given.
        model: name of the LightningModule's part that takes pictures; model, net, network, backbone, or the only
            part unless given.
        ema: name of the part, if any, that is a moving average of it.
        ahead: see `Session`; worked out from the loader's workers unless given.
        evaluate_at: see `Session`.
        **options: of `flexible`.

    Raises:
        UserError: in `fit`, where curriculum, data, model and Trainer do not fit together.
    """

    def __init__(
        self,
        curriculum: curricula.Curriculum,
        transform: Any = None,
        samples: int | None = None,
        *,
        model: str | None = None,
        ema: str | None = None,
        ahead: int | None = None,
        evaluate_at: Literal["base", "stage"] = "base",
        **options: Any,
    ) -> None:
        self.curriculum, self.transform, self.samples, self.model, self.ema = curriculum, transform, samples, model, ema
        self.ahead, self.evaluate_at, self.options = ahead, evaluate_at, options
        self.session: Session | None = None
        self._saved: Mapping[str, Any] | None = None
        self._accumulate: list[int] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the model before a checkpoint is loaded into it."""
        if stage != "fit":
            return
        model = _part(pl_module, self.model)
        ema = None if self.ema is None else _part(pl_module, self.ema)
        self.session = Session(
            self.curriculum,
            model,
            ema=ema,
            transform=self.transform,
            evaluate_at=self.evaluate_at,
            **self.options,
        )
        plain = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        if not plain and self.session.flexible.how != "any size":
            name = type(trainer.strategy).__name__
            raise UserError(f"under {name} parameters cannot change their shapes: use DDP, or a model of any size")
        self.session.attach()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what was set, and go to the update where the training begins."""
        session, loader = self._active, trainer.train_dataloader
        samples = dataset_length(loader) if self.samples is None else self.samples
        session.ahead = updates_ahead(loader) if self.ahead is None else self.ahead
        plan = session.begin(trainer.optimizers, samples, trainer.world_size, trainer.strategy.model)
        pictures = batch_size(loader)
        if pictures is not None:
            self._accumulate = accumulations(plan, pictures, "the loader's batch size")
        if self._saved is not None:
            session.load_state_dict(self._saved)
        if trainer.max_steps != plan.updates:
            text = f"the Trainer has max_steps={trainer.max_steps}, and the curriculum {plan.updates} updates"
            warnings.warn(f"{text}: give Trainer(**trainer_arguments(curriculum, samples))", stacklevel=2)
        session.enter(trainer.global_step)
        if self._accumulate is not None:
            trainer.accumulate_grad_batches = self._accumulate[plan.at(trainer.global_step).stage]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set what holds for this update."""
        state = self._active.enter(trainer.global_step)
        wanted = trainer.accumulate_grad_batches if self._accumulate is None else self._accumulate[state.stage]
        if batch_idx % wanted == 0:  # Lightning counts the epoch's batches: elsewhere an update would come short
            trainer.accumulate_grad_batches = wanted

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model at the size of its last stage, without hooks."""
        if stage == "fit" and self.session is not None:
            self.session.detach()

    def state_dict(self) -> dict[str, Any]:
        """The curriculum, and how far its training is."""
        return {} if self.session is None else self.session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the training begins."""
        self._saved = state_dict or None

    @property
    def _active(self) -> Session:
        if self.session is None:
            raise UserError("the curriculum was not set up: run it by Trainer.fit")
        return self.session


def trainer_arguments(curriculum: curricula.Curriculum, samples: int, world: int = 1) -> dict[str, Any]:
    """What a `Trainer` needs to train the whole curriculum: its updates, and no number of epochs.

    Raises:
        UserError: the curriculum does not fit the data.
    """
    return {"max_steps": curriculum.plan(samples, world).updates, "max_epochs": -1}


def _part(module: LightningModule, name: str | None) -> nn.Module:
    if name is not None:
        found = getattr(module, name, None)
        if not isinstance(found, nn.Module):
            known = ", ".join(dict(module.named_children()))
            raise UserError(f"{type(module).__name__} has no part {name!r}: it has {known}")
        return found
    children = dict(module.named_children())
    usual = [children[known] for known in NAMES if known in children]
    trained = [child for child in children.values() if any(True for _ in child.parameters())]
    if not usual and len(trained) != 1:
        given = f"{type(module).__name__} has the parts {', '.join(children) or '(none)'}"
        raise UserError(f"{given}, and none of them is the model by its name: give model=")
    return (usual or trained)[0]
