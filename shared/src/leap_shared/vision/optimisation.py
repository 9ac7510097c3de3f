"""Models, optimisers, parameter groups, schedules and losses of timm, made from a configuration."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Any

import timm
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.optim import Optimizer

from leap_shared.errors import UserError, did_you_mean
from leap_shared.vision.config import AugmentationConfig, OptimiserConfig, TrainConfig

__all__ = ["Schedule", "build_loss", "build_model", "build_optimiser", "parameter_groups"]


def build_model(name: str, options: dict[str, Any]) -> nn.Module:
    """The model that timm registers under that name.

    Raises:
        UserError: the name or an option is unknown.
    """
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        hint = did_you_mean(name, known)
        raise UserError(f"model {name!r} is unknown: {hint if len(hint) < 200 else 'timm.list_models() names all'}")
    try:
        model: nn.Module = timm.create_model(name, **options)
    except (TypeError, AssertionError) as error:
        raise UserError(f"model {name} does not take model_options {options}: {error}") from error
    return model


def parameter_groups(model: nn.Module, config: OptimiserConfig) -> list[dict[str, Any]]:
    """Groups as timm makes them: no decay for biases, 1-D tensors, `model.no_weight_decay()` and `config.no_decay`."""
    own: Any = getattr(model, "no_weight_decay", set)
    names = [name for name, _ in model.named_parameters()]
    spared = {name for name in names if any(fnmatch(name, pattern) for pattern in config.no_decay)} | set(own())
    options: dict[str, Any] = {"weight_decay": config.weight_decay, "no_weight_decay_list": spared}
    if config.layer_decay is None:
        return list(param_groups_weight_decay(model, **options))
    return list(param_groups_layer_decay(model, layer_decay=config.layer_decay, **options))


def build_optimiser(groups: list[dict[str, Any]], config: OptimiserConfig, lr: float) -> Optimizer:
    """The optimiser that timm knows by that name.

    Raises:
        UserError: the name is unknown, or the optimiser does not take `betas` or `eps`.
    """
    if config.name not in list_optimizers():
        raise UserError(f"optimiser {config.name!r} is unknown: {did_you_mean(config.name, list_optimizers())}")
    info = get_optimizer_info(config.name)
    options = {"lr": lr, "weight_decay": config.weight_decay, "momentum": config.momentum}
    for name, takes in (("betas", info.has_betas), ("eps", info.has_eps)):
        value = getattr(config, name)
        if value is not None and not takes:
            raise UserError(f"optimiser {config.name} takes no {name}: leave it out")
        options |= {} if value is None else {name: value}
    try:
        optimiser: Optimizer = create_optimizer_v2(groups, config.name, **options)
    except ValueError as error:
        raise UserError(f"optimiser {config.name} does not take {options}: {error}") from error
    return optimiser


class Schedule:
    """A schedule of timm as a function of the epochs done; a group's rate is the schedule's times its `lr_scale`."""

    def __init__(self, optimiser: Optimizer, config: TrainConfig, per_epoch: int, scale: float) -> None:
        settings = config.schedule
        by_update = settings.per == "update"
        self.unit, self.lag = (per_epoch, settings.lag_updates) if by_update else (1, 0)
        length = -(-config.updates * self.unit // per_epoch) if config.updates else config.epochs * self.unit
        self.scheduler, length = create_scheduler_v2(
            optimiser,
            {"linear": "poly", "constant": "step"}.get(settings.kind, settings.kind),
            num_epochs=length,
            warmup_epochs=round(settings.warmup_epochs * self.unit),
            cooldown_epochs=settings.cooldown_epochs * self.unit,
            decay_epochs=settings.decay_epochs[0] * self.unit,
            decay_milestones=[epoch * self.unit + 1 for epoch in settings.decay_epochs],  # timm decays one unit early
            decay_rate=1.0 if settings.kind in ("linear", "constant") else settings.decay_rate,
            warmup_lr=settings.warmup_lr * scale,
            warmup_prefix=settings.warmup_prefix,
            min_lr=settings.min_lr * scale,
        )
        self.epochs = -(-length // self.unit)

    def set(self, epoch: int, done: int, updates: int) -> None:
        """Set the rate of the update that follows `done` of the `updates` of `epoch`."""
        self.scheduler.step(max(epoch * self.unit + done * self.unit // updates - self.lag, 0))


def build_loss(config: AugmentationConfig, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """Mixup and CutMix of timm, None where both are off; and cross-entropy for the targets that they leave."""
    if not config.mixes:
        smoothing = config.label_smoothing
        return None, LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
    mix = {"mixup_alpha": config.mixup, "cutmix_alpha": config.cutmix, "mode": config.mix_mode}
    chance = {"prob": config.mix_probability, "switch_prob": config.cutmix_share}
    labels = {"label_smoothing": config.label_smoothing, "num_classes": num_classes}
    return Mixup(**mix, **chance, **labels), SoftTargetCrossEntropy()
