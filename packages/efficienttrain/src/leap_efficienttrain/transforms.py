"""The training transform whose size and magnitude of RandAugment change while workers run.

EfficientTrain (Wang et al., ICCV 2023) and EfficientTrain++ (TPAMI 2024).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor

from leap_efficienttrain.decoding import Decoder, crop, crop_resized, decode, opened, shrink
from leap_efficienttrain.plan import State
from leap_efficienttrain.randaug import Magnitude
from leap_efficienttrain.resampling import low_frequency_crop
from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Number
from leap_shared.vision.config import AugmentationConfig, DataConfig
from leap_shared.vision.data import build_transform

__all__ = ["Downsample", "Live", "LiveTransform", "to_uint8"]

Downsample = Literal["lanczos", "fourier", "area", "bicubic"]


class Shared:
    """A size and a magnitude in memory that all workers share, and all copies too."""

    def __init__(self, size: int, magnitude: Number) -> None:
        values = torch.tensor([size, magnitude], dtype=torch.float64)
        self.values: Tensor = values.share_memory_()  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self


class Live:
    """What is common to transforms whose size and magnitude running workers read for every picture.

    Args:
        base_size: largest size; None where any may be set.
        size, magnitude: at the beginning.
        magnitudes: what the magnitude drives; None where there is nothing.
    """

    def __init__(self, base_size: int | None, size: int, magnitude: Number, magnitudes: Magnitude | None) -> None:
        self.base_size, self.magnitudes = base_size, magnitudes
        self._shared, self._given, self._warned = Shared(size, magnitude), False, False

    @property
    def size(self) -> int:
        """Side of the pictures now, in pixels."""
        return int(self._shared.values[0])

    @property
    def magnitude(self) -> float:
        """Magnitude of RandAugment now."""
        return float(self._shared.values[1])

    def set(self, *, size: int | None = None, magnitude: Number | None = None) -> None:
        """Change one or both, in running workers too; to be called between passes, since a batch has one size.

        Raises:
            UserError: the size is above the base size or the magnitude not in 0 to 10.

        Warns:
            UserWarning: the magnitude changes, and there is no RandAugment that it could drive.
        """
        if size is not None:
            if size < 1 or (self.base_size is not None and size > self.base_size):
                raise UserError(f"size {size}: expected 1 to {self.base_size or 'that of the pictures'}")
            self._shared.values[0] = size
        if magnitude is not None:
            if not 0 <= magnitude <= 10:
                raise UserError(f"magnitude {magnitude}: expected a number from 0 to 10")
            if self.magnitudes is None and self._given and magnitude != self.magnitude and not self._warned:
                self._warned = True
                text = "the magnitude changes, and the transform has no RandAugment that it could drive"
                warnings.warn(f"{text}: add one, as rand-m9-mstd0.5-inc1, or keep one magnitude", stacklevel=2)
            self._given = True
            self._shared.values[1] = magnitude

    def set_state(self, state: State) -> None:
        """Take size and magnitude of a curriculum's state."""
        self.set(size=state.size, magnitude=state.magnitude)

    def _now(self, size: int | None, magnitude: Number | None) -> tuple[int, Number]:
        shared = self._shared.values.tolist()
        return int(shared[0]) if size is None else size, shared[1] if magnitude is None else magnitude


class LiveTransform(Live):
    """timm's training transform with a size and a magnitude that change while workers run.

    At the base size: random resized crop, flip, RandAugment; then the picture becomes smaller, and only after that a
    tensor, normalised and erased: so the augmentation is that of the base size (the authors' order). With
    `augment_at="low"` the crop goes straight to the small size, JPEG files are decoded no larger than it needs, and
    augmentation acts on the small picture: twice as fast and more, with slightly other pixels.

    At the base size it is timm's own, to the bit. One call draws from the global generators of Python, NumPy and torch,
    as timm does.

    Args:
        size: base size, at which pictures are cropped and augmented; the size at the beginning too.
        augmentation: crop, flip, RandAugment and erasing. Its `auto_augment` may have any of timm's policies; the
            magnitude drives RandAugment only.
        downsample: how pictures become smaller. "fourier" acts after erasing, as in EfficientTrain: with output
            "uint8" pictures stay at the base size, and `Finish` makes them smaller.
        augment_at: "base" or "low".
        downsample_in: "batch" leaves Lanczos to `Finish` too, to the same bits: for workers that are slower than a GPU.
        mean, std: of the normalisation.
        interpolation: of the crop.
        output: "uint8" for S x S x 3, which `Finish` normalises and erases by the batch; "float" for 3 x S x S,
            normalised and erased.
        randaug_off_at_zero: leave RandAugment out at magnitude 0, where some operations act nonetheless.
        decoder: simplejpeg or pillow; "auto" takes the first where it is installed.

    Raises:
        UserError: timm does not know the policy, or the options do not go together.
    """

    def __init__(
        self,
        size: int = 224,
        *,
        augmentation: AugmentationConfig = AugmentationConfig(),  # noqa: B008 - frozen
        downsample: Downsample = "lanczos",
        augment_at: Literal["base", "low"] = "base",
        downsample_in: Literal["worker", "batch"] = "worker",
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        interpolation: Literal["bilinear", "bicubic"] = "bicubic",
        output: Literal["uint8", "float"] = "uint8",
        randaug_off_at_zero: bool = False,
        decoder: Decoder = "auto",
    ) -> None:
        if downsample_in == "batch" and (downsample != "lanczos" or output != "uint8"):
            given = f"downsample_in='batch' with downsample={downsample!r} and output={output!r}"
            raise UserError(f"{given}: it goes with lanczos and uint8")
        means, deviations = (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
        data = DataConfig(train="-", image_size=size, mean=means, std=deviations, interpolation=interpolation)
        timm: Any = build_transform(data, augmentation)
        steps = list(timm.transforms)
        last = next(place for place, step in enumerate(steps) if type(step).__name__ == "MaybeToTensor")
        self.crop, self.augment, self.final = steps[0], steps[1:last], steps[last:]
        magnitudes = Magnitude.found(self.augment, randaug_off_at_zero)
        super().__init__(size, size, 9 if magnitudes is None else magnitudes.value, magnitudes)
        self.augmentation, self.downsample, self.augment_at = augmentation, downsample, augment_at
        self.mean, self.std, self.interpolation, self.output = means, deviations, interpolation, output
        self.decoder = decoder
        self._shrinks = downsample != "fourier" and downsample_in == "worker"

    def __call__(self, image: Any, *, size: int | None = None, magnitude: Number | None = None) -> Tensor:
        """One picture, transformed.

        Args:
            image: see `opened`; tensors of floats come back as they are.
            size: in place of the one that is set.
            magnitude: in place of the one that is set.
        """
        size, magnitude = self._now(size, magnitude)
        picture = opened(image)
        if isinstance(picture, Tensor):
            return picture
        picture = self._cropped(picture, size)
        if self.magnitudes is not None:
            self.magnitudes.value = magnitude
        for step in self.augment:
            picture = step(picture)
        if self._shrinks:
            picture = shrink(picture, size, self.downsample)
        if self.output == "uint8":
            return to_uint8(picture)
        result: Any = picture
        for step in self.final:
            result = step(result)
        smaller = size < result.shape[-1]
        finished: Tensor = low_frequency_crop(result[None], size)[0] if smaller else result
        return finished

    def _cropped(self, image: Image.Image, size: int) -> Image.Image:
        """The random crop at the base size, or at the size itself."""
        low = self.augment_at == "low" and self.downsample != "fourier"
        if not isinstance(self.crop, RandomResizedCropAndInterpolation):
            cropped: Image.Image = self.crop(image.convert("RGB"))
            return shrink(cropped, size, self.downsample) if low else cropped
        upper, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        box = (left, upper, left + width, upper + height)
        if low:
            return crop_resized(image, box, size, self.interpolation, self.decoder)
        part = crop(decode(image, 1, self.decoder), box)
        return part.resize(self.crop.size, Image.Resampling[self.interpolation.upper()])


def to_uint8(picture: Image.Image) -> UInt8[Tensor, "height width 3"]:
    """The pixels of an RGB picture."""
    return torch.from_numpy(np.array(picture))
