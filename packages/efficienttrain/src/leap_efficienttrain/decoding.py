"""Pictures from files: the crop box before the pixels, and no more pixels than the crop needs."""

from __future__ import annotations

import io
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from leap_shared.errors import UserError

__all__ = ["Box", "Decoder", "crop", "crop_resized", "decode", "decode_factor", "is_encoded", "opened", "shrink"]

Box = tuple[int, int, int, int]  # left, upper, right, lower, as Pillow's
Decoder = Literal["auto", "simplejpeg", "pillow"]
FILTERS = {"lanczos": Image.Resampling.LANCZOS, "area": Image.Resampling.BOX, "bicubic": Image.Resampling.BICUBIC}


def opened(image: Any) -> Image.Image | Tensor:
    """A picture of any kind as a PIL image, not decoded yet where it is a file; tensors of floats as they are.

    Args:
        image: a PIL image, the bytes of a file, a uint8 array H x W (x 3) or a uint8 tensor 3 x H x W.

    Raises:
        UserError: it is none of them.
    """
    if isinstance(image, (bytes, bytearray, memoryview)):
        return Image.open(io.BytesIO(image))
    if isinstance(image, Tensor) and image.is_floating_point():
        return image
    if isinstance(image, (Tensor, np.ndarray)):
        image = to_pil_image(image)
    if not isinstance(image, Image.Image):
        kinds = "PIL image, bytes of a file, uint8 array or tensor"
        raise UserError(f"the picture is a {type(image).__name__}: give a {kinds}")
    return image


def decode_factor(box: Box, size: int) -> int:
    """By how much a JPEG may be decoded smaller (1, 2, 4 or 8) so that the box keeps `size` pixels on each side."""
    side = min(box[2] - box[0], box[3] - box[1])
    return next((factor for factor in (8, 4, 2) if side >= factor * size), 1)


def decode(image: Image.Image, factor: int = 1, decoder: Decoder = "auto") -> Image.Image | NDArray[np.uint8]:
    """The pixels in RGB; those of a JPEG file that is not decoded yet smaller by `factor`, as an image of its own.

    simplejpeg, where it is installed, gives the same pixels as Pillow, faster.
    """
    if is_encoded(image):
        file: Any = getattr(image, "fp")  # noqa: B009 - an attribute of images from files only
        file.seek(0)
        content = file.read()
        pixels = _simplejpeg(content, image, factor) if decoder != "pillow" else None
        if pixels is not None:
            return pixels
        image = Image.open(io.BytesIO(content))
        if factor > 1:
            image.draft(None, (image.width // factor, image.height // factor))
    return image if image.mode == "RGB" else image.convert("RGB")


def is_encoded(image: Any) -> bool:
    """Whether the image is a JPEG file whose pixels were not asked for yet."""
    return image.format == "JPEG" and bool(image.tile) and image.fp is not None


def _simplejpeg(content: bytes, image: Image.Image, factor: int) -> NDArray[np.uint8] | None:
    """Decoded by libjpeg-turbo; None where the package is missing or refuses, so that Pillow says what is wrong."""
    if image.mode not in ("RGB", "L"):
        return None
    try:
        import simplejpeg

        height, width = (-(-side // factor) if factor > 1 else 0 for side in (image.height, image.width))
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            content, "RGB", min_height=height, min_width=width, min_factor=factor
        )
    except (ImportError, ValueError):
        return None
    return pixels


def crop(pixels: Image.Image | NDArray[np.uint8], box: Box) -> Image.Image:
    """The pixels in the box."""
    if isinstance(pixels, Image.Image):
        return pixels.crop(box)
    return Image.fromarray(np.ascontiguousarray(pixels[box[1] : box[3], box[0] : box[2]]))


def crop_resized(
    image: Image.Image, box: Box, size: int, interpolation: str = "bicubic", decoder: Decoder = "auto"
) -> Image.Image:
    """The pixels in the box at `size` x `size`, decoded no larger than needed, for which the box is rounded.

    Resized in antialiased uint8 arithmetic of torch: at most one level from Pillow's, and several times as fast.
    """
    factor = decode_factor(box, size) if is_encoded(image) else 1
    pixels = decode(image, factor, decoder)
    left, upper, right, lower = ((side + factor // 2) // factor for side in box)
    if isinstance(pixels, Image.Image):
        part = np.array(pixels.crop((left, upper, right, lower)))
    else:
        part = pixels[upper:lower, left:right].copy()
    batch = torch.from_numpy(part).permute(2, 0, 1)[None]
    small = F.interpolate(batch, (size, size), mode=interpolation, antialias=True)
    return Image.fromarray(small[0].permute(1, 2, 0).contiguous().numpy())


def shrink(image: Image.Image, size: int, method: str) -> Image.Image:
    """The shorter side at `size` pixels by Pillow's filter, the longer one in proportion; never larger than it was."""
    short, long = sorted(image.size)
    if size >= short:
        return image
    other = int(size * long / short)
    return image.resize((size, other) if image.width <= image.height else (other, size), FILTERS[method])
