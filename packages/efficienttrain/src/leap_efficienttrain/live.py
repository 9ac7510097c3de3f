"""Transforms that users have already, made live: the magnitude is driven and pictures become smaller, by role."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal

from PIL import Image
from timm.data import transforms as timm_transforms
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms as v1
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from leap_efficienttrain.decoding import shrink
from leap_efficienttrain.randaug import Magnitude, walk
from leap_efficienttrain.resampling import low_frequency_crop
from leap_efficienttrain.transforms import Downsample, Live
from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Number

__all__ = ["Columns", "LiveCompose", "live"]

CONVERSIONS: tuple[type, ...] = (
    *(v1.ToTensor, v1.PILToTensor, v1.ConvertImageDtype, v1.Normalize, v1.RandomErasing),
    *(v2.ToImage, v2.PILToTensor, v2.ToDtype, v2.ConvertImageDtype, v2.Normalize, v2.RandomErasing, v2.ToPureTensor),
    *(timm_transforms.ToNumpy, timm_transforms.ToTensor, timm_transforms.MaybeToTensor),
    *(timm_transforms.MaybePILToTensor, RandomErasing),
)
CROPS = (v1.RandomResizedCrop, v2.RandomResizedCrop, timm_transforms.RandomResizedCropAndInterpolation)
LIBRARIES = ("torchvision.", "timm.")


class LiveCompose(Live):
    """A user's transform with a size and a magnitude that change while workers run; see `live`.

    Args:
        before, after: steps before and after the picture becomes smaller.
        downsample, augment_at: see `live`.
    """

    def __init__(
        self,
        before: list[Callable[[Any], Any]],
        after: list[Callable[[Any], Any]],
        *,
        downsample: Downsample = "lanczos",
        augment_at: Literal["base", "low"] = "base",
    ) -> None:
        self.before, self.after, self.downsample, self.augment_at = before, after, downsample, augment_at
        magnitudes = Magnitude.found(before + after)
        super().__init__(None, 0, 9 if magnitudes is None else magnitudes.value, magnitudes)
        self._crops = [step for step in walk(before) if isinstance(step, CROPS)] if augment_at == "low" else []
        self._sizes = [crop.size for crop in self._crops]

    def __call__(self, image: Any, *, size: int | None = None, magnitude: Number | None = None) -> Any:
        """One picture, transformed; `size` and `magnitude` take the place of those that are set."""
        size, magnitude = self._now(size, magnitude)
        if self.magnitudes is not None:
            self.magnitudes.value = magnitude
        for crop, given in zip(self._crops, self._sizes, strict=True):
            crop.size = (size, size) if size else given
        for step in self.before:
            image = step(image)
        if size and self.downsample != "fourier":
            image = _smaller(image, size, self.downsample)
        for step in self.after:
            image = step(image)
        if size and self.downsample == "fourier" and size < min(image.shape[-2:]):
            image = low_frequency_crop(image[None], size)[0]
        return image


def live(
    transform: Any, *, downsample: Downsample = "lanczos", augment_at: Literal["base", "low"] = "base"
) -> LiveCompose:
    """A copy of a transform of timm or torchvision (v1 or v2) that a curriculum can drive.

    Every RandAugment in it takes the magnitude, and pictures become smaller after augmentation and before the
    conversion to tensor or the normalisation, wherever these stand. Until a size is set, pictures keep theirs.

    Args:
        transform: a Compose, a sequence of steps, or one step.
        downsample: how pictures become smaller; "fourier" acts on the tensor at the end.
        augment_at: "low" lets random resized crops go straight to the size that is set.

    Raises:
        UserError: the transform is a tuple, as timm's with separate=True.
    """
    if isinstance(transform, (tuple, list)):
        raise UserError(f"the transform is a {type(transform).__name__} of {len(transform)}: give one Compose of them")
    transform = copy.deepcopy(transform)
    steps = list(getattr(transform, "transforms", [transform]))
    last = max((place for place, step in enumerate(steps) if _acts_on_pictures(step)), default=-1)
    place = next((at for at in range(last + 1, len(steps)) if isinstance(steps[at], CONVERSIONS)), len(steps))
    return LiveCompose(steps[:place], steps[place:], downsample=downsample, augment_at=augment_at)


def _acts_on_pictures(step: Any) -> bool:
    """Whether a step of the libraries is a crop, a flip or an augmentation."""
    return type(step).__module__.startswith(LIBRARIES) and not isinstance(step, (*CONVERSIONS, v1.Lambda, v2.Lambda))


def _smaller(image: Any, size: int, method: str) -> Any:
    """The picture with its shorter side at `size`: a PIL image, or a uint8 tensor by way of one."""
    if isinstance(image, Image.Image):
        return shrink(image, size, method)
    if isinstance(image, Tensor) and image.ndim == 3 and not image.is_floating_point():
        if size >= min(image.shape[-2:]):
            return image
        return pil_to_tensor(shrink(to_pil_image(image), size, method))
    given = (
        f"a tensor {image.dtype} of shape {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
    )
    raise UserError(
        f"where it should become smaller, the picture is {given}: convert to float after augmentation, or take "
        "downsample='fourier'"
    )


class Columns:
    """Transforms batches of a Hugging Face data set: for its `set_transform` and `with_transform`.

    Args:
        transform: acts on one picture.
        image: column of the pictures, which makes way for `into`; all others stay.
        into: column of the results.
    """

    def __init__(self, transform: Callable[[Any], Any], image: str = "image", into: str = "pixel_values") -> None:
        self.transform, self.image, self.into = transform, image, into

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch, with the results in place of the pictures."""
        rest = {name: values for name, values in batch.items() if name != self.image}
        return {**rest, self.into: [self.transform(_rgb(image)) for image in batch[self.image]]}


def _rgb(image: Any) -> Any:
    return image.convert("RGB") if isinstance(image, Image.Image) and image.mode != "RGB" else image
