"""The input pipeline as something to measure: the authors' order, timm's, and ours, from JPEG files to a batch."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from leap_efficienttrain.decoding import shrink
from leap_efficienttrain.finish import Finish
from leap_efficienttrain.transforms import LiveTransform
from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Number
from leap_shared.vision.config import AugmentationConfig
from leap_shared.vision.data import isolated

__all__ = ["BASE", "LOW", "PIPELINES", "REFERENCE", "TIMM", "Pipeline", "images_per_second", "photographs", "pipeline"]

Pipeline = Callable[[Iterable[bytes]], Float[Tensor, "batch 3 size size"]]
REFERENCE, TIMM = "authors' order, Pillow", "timm, straight to the size"
BASE, LOW = "ours, augment_at='base'", "ours, augment_at='low'"
PIPELINES = (REFERENCE, TIMM, BASE, LOW)
PHOTOGRAPHS = ("astronaut", "chelsea", "coffee", "rocket", "immunohistochemistry", "hubble_deep_field")
BASE_SIZE = 224


def photographs(count: int = 120, size: tuple[int, int] = (360, 270), quality: int = 90, seed: int = 0) -> list[bytes]:
    """JPEG files of random parts of scikit-image's photographs.

    Args:
        count: how many.
        size: width and height in pixels, at most 427 x 300.
        quality: of the JPEG files.
        seed: of the parts.

    Raises:
        UserError: scikit-image is missing.
    """
    try:
        from skimage import data
    except ModuleNotFoundError as error:
        raise UserError("the photographs need scikit-image: pip install scikit-image") from error
    generator = np.random.default_rng(seed)
    whole = [np.asarray(getattr(data, name)())[..., :3] for name in PHOTOGRAPHS]
    files = []
    for number in range(count):
        picture = whole[number % len(whole)]
        top, left = (
            generator.integers(0, full - part + 1) for full, part in zip(picture.shape[:2], size[::-1], strict=True)
        )
        part = Image.fromarray(np.ascontiguousarray(picture[top : top + size[1], left : left + size[0]]))
        part.save(file := io.BytesIO(), "JPEG", quality=quality)
        files.append(file.getvalue())
    return files


def pipeline(name: str, size: int, magnitude: Number | None = None, base_size: int = BASE_SIZE) -> Pipeline:
    """One of `PIPELINES`, from files to a normalised batch; random erasing, which is alike in all, is left out.

    Args:
        name: of the pipeline.
        size: of the pictures.
        magnitude: of RandAugment; none without one.
        base_size: at which pictures are augmented.

    Raises:
        UserError: there is no such pipeline.
    """
    policy = None if magnitude is None else f"rand-m{magnitude:g}-mstd0.5-inc1"
    if name in (REFERENCE, TIMM):
        at = base_size if name == REFERENCE else size
        options: dict[str, Any] = {"is_training": True, "auto_augment": policy, "color_jitter": None}
        steps = create_transform(at, interpolation="bicubic", **options).transforms
        return partial(_one_by_one, steps[:-2], steps[-2:], size)
    if name not in (BASE, LOW):
        raise UserError(f"there is no pipeline {name!r}: take {', '.join(PIPELINES)}")
    augmentation = AugmentationConfig(auto_augment=policy, colour_jitter=0, erasing=0)
    where: Literal["base", "low"] = "base" if name == BASE else "low"
    transform = LiveTransform(base_size, augmentation=augmentation, augment_at=where)
    transform.set(size=size, magnitude=magnitude)
    return partial(_by_the_batch, transform, Finish(erasing=0))


def _one_by_one(before: list[Any], after: list[Any], size: int, files: Iterable[bytes]) -> Tensor:
    tensors = []
    for file in files:
        image: Any = Image.open(io.BytesIO(file)).convert("RGB")
        for step in before:
            image = step(image)
        image = shrink(image, size, "lanczos")
        for step in after:
            image = step(image)
        tensors.append(image)
    return torch.stack(tensors)


def _by_the_batch(transform: LiveTransform, finish: Finish, files: Iterable[bytes]) -> Tensor:
    return finish(torch.stack([transform(file) for file in files]), transform.size)


def images_per_second(function: Pipeline, files: Sequence[bytes], batch: int = 32, rounds: int = 3) -> float:
    """Pictures per second of CPU time of this process, the fastest of some rounds over all files.

    Args:
        function: see `pipeline`.
        files: see `photographs`.
        batch: files that are given at once.
        rounds: over all files, each with the same random numbers.
    """
    seconds = []
    for _ in range(rounds):
        with isolated(0):
            before = time.process_time()
            for first in range(0, len(files), batch):
                function(files[first : first + batch])
            seconds.append(time.process_time() - before)
    return len(files) / min(seconds)
