"""One update of the weights from one global batch, split over micro-batches and processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from leap_shared.errors import UserError
from leap_shared.vision import data, optimisation
from leap_shared.vision.config import TrainConfig

__all__ = ["Learner", "LossFunction"]

AMP = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}

LossFunction = Callable[[nn.Module, Tensor, Tensor], Tensor | Mapping[str, Tensor]]


class Learner:
    """The model with its optimiser, gradient scaler and moving average, and how they take a step.

    Args:
        model: trained where it is.
        config: the run.
        accelerator: Accelerate's view of the processes. Mixed precision is torch's own here, since Accelerate keeps one
            setting per process and a process may train twice.
        num_classes: outputs of the model.
        groups: parameter groups.
        loss_fn: see `Trainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        accelerator: Any,
        num_classes: int,
        groups: list[dict[str, Any]],
        loss_fn: LossFunction | None,
    ) -> None:
        self.model, self.accelerator, self.seed = model, accelerator, config.seed
        self.device, self.dtype = next(model.parameters()).device, AMP[config.amp]
        if config.amp == "fp16" and self.device.type != "cuda":
            raise UserError(f"amp=fp16 needs CUDA, and this run is on {self.device}: use bf16")
        self.mixup, criterion = optimisation.build_loss(config.augmentation, num_classes)
        self.loss_fn: LossFunction = loss_fn or (lambda model, images, targets: criterion(model(images), targets))
        settings, batch = config.optimiser, config.batch_size * config.accumulation * accelerator.num_processes
        self.clip_norm, self.scale = settings.clip_norm, batch / settings.base_batch if settings.base_batch else 1.0
        self.optimiser = optimisation.build_optimiser(groups, settings, settings.lr * self.scale)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.ema = ModelEmaV3(model, settings.ema_decay) if settings.ema_decay is not None else None
        self.wrap()

    def wrap(self) -> None:
        """Share gradients between the processes; to be called again where parameters have changed their shapes."""
        self.wrapped = self.accelerator.prepare_model(self.model, device_placement=False)

    @property
    def models(self) -> dict[str, nn.Module]:
        """The model as `weights` and, where there is one, its moving average as `ema`."""
        return {"weights": self.model} | ({"ema": self.ema.module} if self.ema is not None else {})

    @property
    def parts(self) -> dict[str, Any]:
        """All that has a state."""
        return {**self.models, "optimiser": self.optimiser, "scaler": self.scaler}

    def step(self, stream: Iterator[Any], accumulation: int, update: int) -> dict[str, Tensor]:
        """Update the weights; the means over this process's share of what the loss function gives."""
        means: dict[str, Tensor] = {}
        for micro in range(accumulation):
            images, targets = (part.to(self.device, non_blocking=True) for part in next(stream))
            data.seed_all(data.derive(self.seed, update, micro, self.accelerator.process_index))
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            last = micro == accumulation - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    losses = self.loss_fn(self.wrapped, images, targets)
                losses = losses if isinstance(losses, Mapping) else {"loss": losses}
                self.accelerator.backward(self.scaler.scale(losses["loss"] / accumulation))
            for name, value in losses.items():
                means[name] = means.get(name, 0) + value.detach().float() / accumulation
        self.scaler.unscale_(self.optimiser)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)
        return means
