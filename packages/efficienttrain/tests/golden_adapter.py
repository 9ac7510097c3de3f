"""The golden cases' interface on the public API of leap_efficienttrain, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import Lamb

import leap_efficienttrain as et
from leap_efficienttrain import low_frequency_crop, lr_schedule, stage_table  # noqa: F401 - of the interface

State = dict[str, torch.Tensor]

lanczos_resize = et.lanczos_resize


def replay_stream(batches: Any, split_factor: int, buffer_size: int, replay_times: int) -> Any:
    return map(et.ReplayBuffer(buffer_size, split_factor, replay_times, dtype=None, ragged="keep"), batches)


def size_transfer(model: str, num_classes: int, from_size: int, to_size: int, states: dict[str, State]) -> Any:
    new = {kind: et.transfer_state(state, from_size, to_size) for kind, state in states.items()}
    return new, build_model(model, to_size, num_classes, new["model"])


def build_model(model: str, img_size: int, num_classes: int, state: State) -> torch.nn.Module:
    return et.load_state(et.create_model(model, size=img_size, num_classes=num_classes), state)


def param_groups(model: str, img_size: int, layer_decay: float | None, weight_decay: float) -> list[dict[str, Any]]:
    return et.named_groups(et.create_model(model, size=img_size), weight_decay=weight_decay, layer_decay=layer_decay)


def lamb(params: Any, decay: Any, grads: Any, weight_decay: float, **options: Any) -> list[torch.Tensor]:
    weights = [torch.nn.Parameter(p.clone()) for p in params]
    groups = [{"params": [p], "weight_decay": weight_decay * d} for p, d in zip(weights, decay, strict=True)]
    optimiser = Lamb(groups, **options)
    for step in grads:
        for p, grad in zip(weights, step, strict=True):
            p.grad = grad
        optimiser.step()
    return [p.detach() for p in weights]
