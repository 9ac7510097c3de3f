"""What happens to a whole batch, on any device: normalisation, random erasing, low-frequency crop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from leap_efficienttrain.resampling import low_frequency_crop, prepare
from leap_efficienttrain.transforms import Downsample
from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Number

__all__ = ["Finish", "erase"]

ATTEMPTS, AREA, ASPECT = 10, (0.02, 1 / 3), (0.3, 1 / 0.3)


class Finish:
    """Makes a batch of uint8 pictures the input of a model.

    Args:
        mean, std: of the normalisation.
        erasing: probability of random erasing, per picture.
        erasing_mode: see `erase`.
        downsample: how pictures that are larger become smaller: "lanczos" before erasing, "fourier" after it.
        dtype: of the result.
    """

    def __init__(
        self,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        *,
        erasing: Number = 0.25,
        erasing_mode: Literal["const", "rand", "pixel"] = "pixel",
        downsample: Downsample = "lanczos",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.mean, self.std, self.dtype = tuple(mean), tuple(std), dtype
        self.erasing, self.erasing_mode, self.downsample = erasing, erasing_mode, downsample

    def __call__(
        self, images: Shaped[Tensor, "batch first second third"], size: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "batch channels height width"]:
        """The batch, normalised and erased, at `size`.

        Args:
            images: uint8, batch x height x width x 3; or floats, batch x channels x height x width, which are neither
                normalised nor erased.
            size: side of the result in pixels.
            generator: of the erasing, on the CPU.

        Raises:
            UserError: the pictures are neither of the size nor to become so here.
        """
        if images.is_floating_point():
            batch = images.to(self.dtype)
        else:
            later = size >= images.shape[1] or (self.downsample == "fourier" and self.erasing > 0)
            method, now = ("none", images.shape[1]) if later else (self.downsample, size)
            batch = prepare(images, now, mean=self.mean, std=self.std, method=method, dtype=self.dtype)
            erase(batch, self.erasing, self.erasing_mode, generator)
        if batch.shape[-2:] == (size, size):
            return batch
        if self.downsample != "fourier":
            given = f"pictures of {batch.shape[-2]}x{batch.shape[-1]} pixels, and the size is {size}"
            raise UserError(f"{given}: give uint8 pictures, or take downsample='fourier', which acts on floats too")
        return low_frequency_crop(batch, size)


def erase(
    images: Float[Tensor, "batch channels height width"],
    probability: Number = 0.25,
    mode: Literal["const", "rand", "pixel"] = "pixel",
    generator: torch.Generator | None = None,
) -> None:
    """Random erasing (Zhong et al. 2020) by timm's rule, in place.

    One rectangle in a picture: 2 to 33 % of its area, 0.3 to 3.3 times as high as wide.

    Args:
        images: normalised.
        probability: of each picture.
        mode: what it is filled with: zeros ("const"), one normal colour ("rand"), normal noise ("pixel").
        generator: on the CPU; the noise of other devices is drawn there by a generator that is seeded from it.
    """
    height, width = images.shape[-2:]
    boxes: list[tuple[int, int, int, int, int]] = []
    chosen = torch.rand(len(images), generator=generator) < probability
    for row in chosen.nonzero().flatten().tolist():
        draws = torch.rand(ATTEMPTS, 4, generator=generator).tolist()
        for area, aspect, down, across in draws:
            pixels = (AREA[0] + area * (AREA[1] - AREA[0])) * height * width
            ratio = math.exp(math.log(ASPECT[0]) + aspect * (math.log(ASPECT[1]) - math.log(ASPECT[0])))
            tall, wide = round(math.sqrt(pixels * ratio)), round(math.sqrt(pixels / ratio))
            if tall < height and wide < width:
                boxes.append((row, int(down * (height - tall + 1)), int(across * (width - wide + 1)), tall, wide))
                break
    if not boxes:
        return
    counts = [images.shape[1] * (tall * wide if mode == "pixel" else 1) for *_, tall, wide in boxes]
    values = iter(torch.split(_noise(images, sum(counts), mode, generator), counts))
    for row, top, left, tall, wide in boxes:
        shape = (-1, tall, wide) if mode == "pixel" else (-1, 1, 1)
        images[row, :, top : top + tall, left : left + wide] = next(values).view(shape)


def _noise(images: Tensor, count: int, mode: str, generator: torch.Generator | None) -> Tensor:
    options: dict[str, Any] = {"dtype": images.dtype, "device": images.device}
    if mode == "const":
        values = torch.zeros(count, **options)
    elif images.device.type == "cpu":
        values = torch.randn(count, generator=generator, **options)
    else:
        seed = int(torch.randint(2**62, (), generator=generator))
        values = torch.randn(count, generator=torch.Generator(images.device).manual_seed(seed), **options)
    return values
