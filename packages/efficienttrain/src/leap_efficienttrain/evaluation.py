"""Scores of a checkpoint at several input sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leap_efficienttrain.cache import open_pictures
from leap_efficienttrain.checkpoints import load_state, read_checkpoint
from leap_efficienttrain.models import VARIANTS, create_model
from leap_efficienttrain.released import BASE_SIZE
from leap_efficienttrain.resampling import low_frequency_crop
from leap_shared.errors import UserError
from leap_shared.vision import DataConfig, build_transform, evaluate, evaluation_loader
from leap_shared.vision.learner import AMP

__all__ = ["TRAINING", "score"]

TRAINING = "training.json"  # in the folder of a training: its model and full size


def score(
    checkpoint: str | Path,
    data: str,
    *,
    model: str | None = None,
    which: Any = "model",
    sizes: Sequence[int] = (),
    fourier: bool = False,
    batch_size: int = 64,
    workers: int = 4,
    amp: str = "no",
    device: torch.device | None = None,
    reporter: Any = None,
) -> list[dict[str, Any]]:
    """A row of scores for each size, with the published accuracy where the file has a released name.

    Args:
        checkpoint: see `read_checkpoint`.
        data: validation pictures, as `open_pictures` takes them.
        model: official name or one of timm's; told from the file where it is None.
        which: model or ema.
        sizes: of the pictures in pixels; those of the checkpoint where there are none.
        fourier: prepare pictures at full size and crop their spectrum, as EfficientTrain of 2023 does.
        batch_size: pictures per forward pass.
        workers: processes that read pictures.
        amp: no, bf16 or fp16.
        device: the CPU unless given.
        reporter: shows progress.

    Raises:
        UserError: the checkpoint, the pictures, a size and the model do not fit together.
    """
    found = read_checkpoint(checkpoint, which=which)
    trained, base = _of_training(Path(checkpoint))
    name = model or trained or found.variant
    if name is None:
        raise UserError(f"{checkpoint} fits no released model: give --model, its name in timm")
    classes = found.num_classes
    source = open_pictures(data, "validation")
    names = getattr(source, "classes", None)
    if names is not None and len(names) != classes:
        given = f"{data} has {len(names)} classes, and {checkpoint} is for {classes}"
        raise UserError(f"{given}: give pictures of its classes, a folder for each")
    published = {file: top1 for variant in VARIANTS.values() for file, top1 in variant.files.items()}
    rows = []
    for size in sizes or (base or found.size,):
        network = create_model(name, size=size, num_classes=classes)
        load_state(network, found.state, resize=True)
        network.to(device or "cpu")
        prepared = max(BASE_SIZE, size) if fourier else size
        loader = evaluation_loader(
            source,
            build_transform(DataConfig(data, image_size=prepared, squash=prepared >= 384)),
            batch_size=batch_size,
            num_classes=classes,
            workers=workers,
            pin=device is not None and device.type == "cuda",
        )
        shown = loader if reporter is None else reporter.progress(loader, description=f"{name} at {size}")
        scores = evaluate(network, shown, amp=AMP[amp], predict=_cropping(size) if fourier else None)
        rows.append({"model": name, "size": size, **scores, "published top1": published.get(Path(checkpoint).name)})
    return rows


def _of_training(folder: Path) -> tuple[str | None, int | None]:
    """Model and full size of the training that wrote a folder; None where nothing tells them."""
    path = folder / TRAINING
    if not path.is_file():
        return None, None
    facts = json.loads(path.read_text(encoding="utf-8"))
    return facts["model"], facts["base_size"]


def _cropping(size: int) -> Callable[[nn.Module, Tensor], Tensor]:
    def predict(model: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            cropped = low_frequency_crop(images, size)
        logits: Tensor = model(cropped)
        return logits

    return predict
