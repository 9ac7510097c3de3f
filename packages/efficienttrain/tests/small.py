"""Small models, pictures and curricula for the tests of the adapters."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import leap_efficienttrain.curriculum as curricula
from leap_efficienttrain.loops import downsample
from leap_efficienttrain.sizes import flexible
from leap_efficienttrain.stages import LearningRate, Stage

SIZES, BASE, SAMPLES, BATCH = (16, 32), 32, 24, 8
UPDATES = (12, 3)
"""Of the two stages: half of two epochs each, where pictures of half the side cost a quarter."""


def curriculum(**changes: Any) -> curricula.Curriculum:
    """Two stages of equal compute."""
    stages = changes.pop("stages", tuple(Stage(0.5, size, 5 * place) for place, size in enumerate(SIZES)))
    lr = LearningRate(base=1e-2, warmup_share=0.1)
    fields: dict[str, Any] = {"equivalent_epochs": 2, "base_size": BASE, "batch": BATCH, "lr": lr}
    return curricula.Curriculum(stages, **{**fields, "arithmetic": "continuous", **changes})


def vit(seed: int = 0, **changes: Any) -> nn.Module:
    """A transformer with a position embedding for each of its patches."""
    torch.manual_seed(seed)
    options = {"img_size": BASE, "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 4}
    return timm.create_model("vit_tiny_patch16_224", **{**options, **changes})


class ConvNet(nn.Module):
    """Takes pictures of any size."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2))
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images).mean((2, 3)))


def pictures(count: int = SAMPLES, seed: int = 0, size: int = BASE) -> tuple[Tensor, Tensor]:
    """Normalised pictures whose labels can be learned, and these."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.randn(count, 3, size, size, generator=generator) * 0.5
    return images + labels[:, None, None, None] - 1.5, labels


def plain_training(order: list[int], decay: float = 0.01) -> tuple[nn.Module, list[float]]:
    """What the curriculum trains without any adapter, on batches of these pictures over and over; and the losses."""
    model, cur, losses = vit(), curriculum(), []
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=decay)
    flex, plan, (images, labels) = flexible(model, optimizer), cur.plan(SAMPLES), pictures()
    for update in range(plan.updates):
        flex.set_size(plan.at(update).size)
        optimizer.param_groups[0]["lr"] = plan.lr(update)
        first = update * BATCH % SAMPLES
        rows = order[first : first + BATCH]
        loss = F.cross_entropy(model(downsample(images[rows], plan.at(update).size)), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


class Rows(Dataset[Any]):
    """The same, as Transformers wants them, or as pairs."""

    def __init__(self, count: int = SAMPLES, named: bool = False) -> None:
        self.images, self.labels = pictures(count)
        self.named = named

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        pair = self.images[index], self.labels[index]
        return {"pixel_values": pair[0], "labels": pair[1]} if self.named else pair


def moments(optimizer: Any, parameter: nn.Parameter) -> Tensor:
    """First moment of Adam."""
    return optimizer.state[parameter]["exp_avg"]
