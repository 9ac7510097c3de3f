"""What the crop is measured beside: its complex Fourier route, PyTorch's bicubic resampling, and Composer's."""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from leap_shared.errors import UserError

__all__ = ["composer_resize", "has_composer", "interpolate_crop", "reference_crop"]

Images = Float[Tensor, "batch channels height width"]
Squares = Float[Tensor, "batch channels size size"]


def reference_crop(x: Images, size: int) -> Squares:
    """The crop as the paper's formula is written down: transform, lowest frequencies, inverse transform, real part.

    Args:
        x: square images in float32 or float64.
        size: even.
    """
    half, (height, width) = size // 2, x.shape[2:]
    spectrum = torch.fft.fft2(x)
    rows = torch.cat([spectrum[:, :, :half], spectrum[:, :, height - half :]], 2)
    kept = torch.cat([rows[..., :half], rows[..., width - half :]], 3)
    pixels: Tensor = torch.fft.ifft2(kept * (size / width) ** 2)
    return pixels.real


def interpolate_crop(x: Images, size: int) -> Squares:
    """Bicubic resampling with anti-aliasing: another low-pass filter, not the same numbers."""
    return F.interpolate(x, size=(size, size), mode="bicubic", antialias=True, align_corners=False)


def has_composer() -> bool:
    """Whether Composer is installed."""
    return importlib.util.find_spec("composer") is not None


def composer_resize(x: Images, size: int) -> Squares:
    """Composer's progressive resizing of a batch: bilinear, to a share of the width.

    Raises:
        UserError: Composer is not installed.
    """
    if not has_composer():
        raise UserError("Composer's resizing needs Composer: pip install mosaicml")
    from composer.algorithms.progressive_resizing import (  # type: ignore[import-not-found, unused-ignore]
        resize_batch,
    )

    resized: Tensor = resize_batch(x, torch.zeros(len(x)), scale_factor=size / x.shape[3], mode="resize")[0]
    return resized
