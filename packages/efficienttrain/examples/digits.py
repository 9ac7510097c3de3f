"""What the examples share: scikit-learn's digits at 32 pixels, a small vision transformer, and a curriculum."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

import leap_efficienttrain as et
from leap_shared.vision.config import AugmentationConfig

SIZE, BATCH, TRAINING = 32, 30, 600
POLICY = "rand-m9-n1-mstd0.5-inc1"  # one operation for each picture
AUGMENTATION = AugmentationConfig(scale=(0.8, 1.0), flip=0.0, auto_augment=POLICY, erasing=0.0)


class Digits:
    """Real digits, 8 x 8 pixels, enlarged to colour pictures of 36; a source of (picture, label)."""

    def __init__(self, train: bool) -> None:
        images, labels = load_digits(return_X_y=True)
        rows = np.random.default_rng(0).permutation(len(labels))
        rows = rows[:TRAINING] if train else rows[TRAINING:]
        self.images, self.labels = [_enlarged(images[row].reshape(8, 8)) for row in rows], labels[rows]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self.images[index], int(self.labels[index])


def _enlarged(pixels: NDArray[np.float64]) -> NDArray[np.uint8]:
    small = Image.fromarray((pixels * 255 / 16).astype(np.uint8))
    return np.asarray(small.resize((SIZE + 4, SIZE + 4), Image.Resampling.BICUBIC).convert("RGB"))


def make_model(seed: int = 0) -> nn.Module:
    """A transformer with 64 patches at full size, and a position embedding for each."""
    torch.manual_seed(seed)
    options = {"img_size": SIZE, "patch_size": 4, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", global_pool="avg", class_token=False, **options)


def make_curriculum(epochs: float, **changes: Any) -> et.Curriculum:
    """Three stages of equal compute, as cheap as `epochs` passes at 32 pixels."""
    stages = tuple(et.Stage(1 / 3, size, magnitude) for size, magnitude in ((16, 0), (24, 1), (32, 2)))
    lr = et.LearningRate(base=4e-3, warmup_share=0.1)
    return et.Curriculum(stages, epochs, SIZE, **{"arithmetic": "continuous", "batch": BATCH, "lr": lr, **changes})


def make_transform(output: str = "uint8") -> et.LiveTransform:
    """The training transform, with a size and a magnitude that change."""
    return et.LiveTransform(SIZE, augmentation=AUGMENTATION, output=output)


class Rows(torch.utils.data.Dataset[Any]):
    """The same pictures as tensors, for loaders of other libraries: (picture, label), or a row of named columns."""

    def __init__(self, source: Digits, transform: et.LiveTransform, named: bool = False) -> None:
        self.source, self.transform, self.named = source, transform, named

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Any:
        image, label = self.source[index]
        picture = self.transform(image)
        return {"pixel_values": picture, "labels": label} if self.named else (picture, label)


@torch.no_grad()
def accuracy(model: nn.Module, source: Digits) -> float:
    """Share of the digits that are recognised at full size, in percent."""
    images = np.stack([np.asarray(Image.fromarray(image).resize((SIZE, SIZE))) for image in source.images])
    logits = model.eval()(et.prepare(torch.from_numpy(images), SIZE, method="none"))
    return 100 * float((logits.argmax(1).numpy() == source.labels).mean())


def options(description: str | None, arguments: Sequence[str] | None, epochs: float = 9) -> argparse.Namespace:
    """Command line of an example."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=float, default=epochs, help="compute, in passes at full size")
    parser.add_argument("--out", type=Path, help="folder for checkpoints; a run goes on from what is there")
    parser.add_argument("--stop", type=int, help="stop after so many updates, to go on later")
    return parser.parse_args(arguments)
