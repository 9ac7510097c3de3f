"""Real pictures that come with pip packages, to try a curriculum on: patches of photographs, and digits."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from leap_shared.errors import UserError
from leap_shared.vision.sources import class_names, open_source

__all__ = ["PHOTOGRAPHS", "Pictures", "Task", "digits", "given", "photographs"]

PHOTOGRAPHS = {
    "skimage.data": (
        *(
            "astronaut.png",
            "brick.png",
            "camera.png",
            "cell.png",
            "chelsea.png",
            "coffee.png",
            "coins.png",
            "grass.png",
        ),
        *(
            "gravel.png",
            "hubble_deep_field.jpg",
            "ihc.png",
            "moon.png",
            "motorcycle_left.png",
            "page.png",
            "retina.jpg",
        ),
        "rocket.jpg",
    ),
    "sklearn.datasets.images": ("china.jpg", "flower.jpg"),
}
PATCH_SIDES = (64, 128)  # pixels of the photograph
DIGITS_TRAIN = 1200


class Pictures(NamedTuple):
    """Pictures as bytes, and what they show."""

    images: UInt8[Tensor, "pictures side side 3"]
    labels: Int64[Tensor, " pictures"]


class Task(NamedTuple):
    """Pictures to train on, others to test, and the names of the classes."""

    train: Pictures
    test: Pictures
    classes: tuple[str, ...]


def _check_side(side: int, *counts: int) -> None:
    if min((side, *counts)) < 1:
        raise UserError(f"side {side}, pictures {counts}: expected 1 or more of each")


@lru_cache(maxsize=1)
def _photographs() -> tuple[tuple[str, Image.Image], ...]:
    found = []
    for package, names in PHOTOGRAPHS.items():
        for name in names:
            try:
                with importlib.resources.files(package).joinpath(name).open("rb") as file:
                    found.append((name.partition(".")[0], Image.open(file).convert("RGB")))
            except (ModuleNotFoundError, FileNotFoundError) as error:
                raise UserError(
                    f"the photograph {name} of {package} is missing: pip install scikit-image scikit-learn"
                ) from error
    return tuple(found)


@lru_cache(maxsize=1)  # the arms of a seed share them
def photographs(seed: int, side: int = 96, train: int = 68, test: int = 40) -> Task:
    """Which of eighteen photographs is a patch from?

    Each photograph is cut in two across its longer side; the seed draws which half gives the patches to train on, the
    other one gives those to test. Patches are squares of 64 to 128 pixels of the photograph, brought to one size.

    Args:
        seed: of the halves and of the patches.
        side: of the patches in pixels.
        train: patches of each photograph to train on.
        test: the same to test.

    Raises:
        UserError: a number is below 1, or scikit-image or scikit-learn is not installed.
    """
    _check_side(side, train, test)
    generator = np.random.default_rng(seed)
    parts: tuple[list[Image.Image], list[Image.Image]] = ([], [])
    names = []
    for name, photograph in _photographs():
        names.append(name)
        halves = _halves(photograph.size)
        if generator.integers(2):
            halves.reverse()
        for patches, box, count in zip(parts, halves, (train, test), strict=True):
            patches.extend(_patches(photograph, box, side, count, generator))
    labels = np.arange(len(names))
    trained, tested = (_together(part, labels.repeat(n)) for part, n in zip(parts, (train, test), strict=True))
    return Task(trained, tested, tuple(names))


def _halves(size: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    width, height = size
    if width >= height:
        return [(0, 0, width // 2, height), (width // 2, 0, width, height)]
    return [(0, 0, width, height // 2), (0, height // 2, width, height)]


def _patches(
    photograph: Image.Image, box: tuple[int, int, int, int], side: int, count: int, generator: np.random.Generator
) -> Iterator[Image.Image]:
    """Squares inside of `box` (left, top, right, bottom), their sides spread evenly on a logarithmic scale."""
    left, top, right, bottom = box
    least, most = PATCH_SIDES
    longest = min(most, right - left, bottom - top)
    for _ in range(count):
        length = round(math.exp(generator.uniform(math.log(least), math.log(longest))))
        x, y = generator.integers(left, right - length + 1), generator.integers(top, bottom - length + 1)
        # cut before it is resized: the filter would see across the border of the half
        patch = photograph.crop((int(x), int(y), int(x) + length, int(y) + length))
        yield patch.resize((side, side), Image.Resampling.LANCZOS)


def digits(seed: int, side: int = 16) -> Task:
    """scikit-learn's 1797 digits of 8x8 pixels, enlarged; the seed draws 1200 of them to train on.

    Raises:
        UserError: the side is below 1, or scikit-learn is not installed.
    """
    _check_side(side)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("the digits come with scikit-learn: pip install scikit-learn") from error
    values, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    small = [Image.fromarray((values[row].reshape(8, 8) * (255 / 16)).astype(np.uint8)) for row in order]
    pictures = [picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for picture in small]
    parts = (slice(DIGITS_TRAIN), slice(DIGITS_TRAIN, None))
    trained, tested = (_together(pictures[part], labels[order[part]]) for part in parts)
    return Task(trained, tested, tuple(map(str, range(10))))


@lru_cache(maxsize=1)
def given(train: str, test: str, side: int) -> Task:
    """Pictures of the user's, held in memory: cut to squares about their middle and brought to one size.

    Args:
        train: a folder of class folders, .tar shards, an .npz file, or hf:NAME.
        test: the same for what is tested.
        side: of the pictures in pixels.

    Raises:
        UserError: there is nothing readable, or what is tested has classes that are not trained.
    """
    _check_side(side)
    found, names = [], {}
    for name in (train, test):
        source = open_source(name)
        rows = [source[index] for index in range(len(source))]
        squares = [ImageOps.fit(_picture(picture), (side, side), Image.Resampling.LANCZOS) for picture, _ in rows]
        found.append(_together(squares, np.array([label for _, label in rows])))
        names[name] = class_names(source)
    train_part, test_part = found
    if new := set(test_part.labels.tolist()) - set(train_part.labels.tolist()):
        raise UserError(f"{test} has classes that {train} lacks: {sorted(new)[:5]}: give two parts of one data set")
    count = int(train_part.labels.max()) + 1
    return Task(train_part, test_part, tuple(names[train] or map(str, range(count))))


def _picture(picture: Any) -> Image.Image:
    return (picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture))).convert("RGB")


def _together(pictures: list[Image.Image], labels: NDArray[Any]) -> Pictures:
    images = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return Pictures(images, torch.as_tensor(labels, dtype=torch.int64))
