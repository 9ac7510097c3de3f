"""Trainings of a minute: a small convolutional network, augmentation of whole batches, and a clock."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from leap_efficienttrain.curriculum import Curriculum
from leap_efficienttrain.resampling import lanczos_resize, prepare
from leap_efficienttrain.sizes import flexible
from leap_efficienttrain.tasks import Pictures
from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Number

__all__ = ["ConvNet", "Recipe", "accuracy", "augment", "seconds", "train"]

TEST_BATCH = 64


@dataclass(frozen=True)
class Recipe:
    """Network and optimiser; the same for all arms and seeds.

    Raises:
        UserError: a number is impossible.
    """

    widths: tuple[int, ...] = (32, 64, 128, 256)
    batch: int = 32
    learning_rate: Number = 3e-3
    """Peak, after a warm-up of `warmup_share` of the training; a cosine follows."""
    warmup_share: Number = 0.05
    weight_decay: Number = 0.05
    label_smoothing: Number = 0.1

    def __post_init__(self) -> None:
        if not self.widths or min(*self.widths, self.batch) < 1:
            raise UserError(f"widths {self.widths}, batch {self.batch}: expected whole numbers of 1 or more")
        if self.learning_rate <= 0 or self.weight_decay < 0 or not 0 <= self.label_smoothing < 1:
            given = f"learning_rate {self.learning_rate}, weight_decay {self.weight_decay}"
            raise UserError(f"{given}, label_smoothing {self.label_smoothing}: expected > 0, >= 0, and 0 to 1")


class ConvNet(nn.Sequential):
    """A 3x3 convolution of stride 2, batch norm and ReLU for each of `widths`, the mean over pixels, a linear layer."""

    def __init__(self, widths: tuple[int, ...], classes: int, seed: int) -> None:
        layers: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for before, width in zip((3, *widths), widths, strict=False):
                layers += [nn.Conv2d(before, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))
        self.to(memory_format=torch.channels_last)


def augment(
    images: Float[Tensor, "batch channels height width"], magnitude: Number, generator: torch.Generator
) -> Float[Tensor, "batch channels height width"]:
    """Turn, scale and shift every picture by chance; nothing happens at magnitude 0.

    Args:
        images: on any device.
        magnitude: M, for angles up to 3M degrees, scales of 1 up to 2.5M % more or less, shifts up to M % of the side.
        generator: of the CPU.
    """
    if not magnitude:
        return images
    chance = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale = chance[0] * math.radians(3 * magnitude), 1 + chance[1] * 0.025 * magnitude
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    shift = chance[2:] * 0.02 * magnitude  # the side is 2 long
    rows = torch.stack([cosine, -sine, shift[0], sine, cosine, shift[1]], 1).reshape(-1, 2, 3)
    grid = F.affine_grid(rows.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def seconds(device: torch.device) -> float:
    """A clock of computing: this process's processor time, or on a GPU the time when all work given to it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def train(
    model: ConvNet, pictures: Pictures, curriculum: Curriculum, recipe: Recipe, seed: int, device: torch.device
) -> dict[int, tuple[float, int]]:
    """Train in place, every stage at its size and magnitude.

    All pictures are brought to a size once, when the first stage needs it; they are augmented at that size. Both count.

    Args:
        model: on its device.
        pictures: of the curriculum's base size.
        curriculum: what is trained; its batch and rates are taken, too.
        recipe: the rest.
        seed: of batches and augmentation.
        device: of the model.

    Returns:
        By size, the seconds and the pictures that went through the network.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    flex = flexible(model, optimizer, size=curriculum.base_size)
    images, labels = pictures.images.to(device), pictures.labels.to(device)
    smaller: dict[int, Tensor] = {}
    spent: dict[int, tuple[float, int]] = {}
    model.train()
    for state in curriculum.epochs(len(labels)):
        start = seconds(device)
        flex.set_size(state.size)
        if state.size not in smaller:
            smaller[state.size] = lanczos_resize(images, state.size)
        order = torch.randperm(len(labels), generator=generator)
        batches = torch.split(order, state.micro_batch)[: state.steps]
        for step, rows in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = state.lr(step)
            x = prepare(smaller[state.size][rows.to(device)], state.size, method="none")
            x = augment(x, state.magnitude, generator).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), labels[rows.to(device)], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        before, count = spent.get(state.size, (0.0, 0))
        spent[state.size] = before + seconds(device) - start, count + sum(map(len, batches))
    return spent


@torch.no_grad()
def accuracy(model: ConvNet, pictures: Pictures, device: torch.device) -> float:
    """Share of the pictures that the model classifies rightly, in percent, at the size that they have."""
    model.eval()
    right = 0
    for images, labels in zip(*(torch.split(part, TEST_BATCH) for part in pictures), strict=True):
        x = prepare(images.to(device), images.shape[1], method="none").contiguous(memory_format=torch.channels_last)
        right += int((model(x).argmax(1).cpu() == labels).sum())
    return 100 * right / len(pictures.labels)
