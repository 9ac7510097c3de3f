"""Smaller pictures for the early stages: the low-frequency crop of 2023 and the Lanczos down-sample of 2024."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from leap_efficienttrain import ops
from leap_efficienttrain.ops.weights import lanczos_sizes, lanczos_table
from leap_shared.errors import UserError, did_you_mean
from leap_shared.vision.bodies.grids import Number

__all__ = ["METHODS", "lanczos_resize", "lanczos_weights", "low_frequency_crop", "prepare"]

METHODS = ("lanczos", "fourier", "none")
PRECISIONS = ("strict", "amp")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Picture = TypeVar("Picture", Tensor, NDArray[Any], Image.Image)


def _even(size: int, height: int, width: int) -> int:
    """The size that a crop has, or the error that says why it has none."""
    if size < 2:
        raise UserError(f"a low-frequency crop to size {size} keeps no frequency: give an even size of 2 or more")
    if size > min(height, width):
        raise UserError(
            f"a low-frequency crop to size {size} is larger than the image of {height}x{width}: "
            f"give at most {min(height, width)}"
        )
    if size % 2:
        warnings.warn(
            f"a low-frequency crop has an even size: {size} becomes {size - 1}; give an even size", stacklevel=3
        )
    return size - size % 2


def low_frequency_crop(
    x: Tensor,
    size: int,
    *,
    reference_scaling: bool = False,
    precision: str = "strict",
) -> Float[Tensor, "batch channels new_height new_width"]:
    """Keep the lowest frequencies of images, as smaller images (Wang et al. 2023, section 3.2).

    The mean stays the same, and so does what is normalised by channel before or after. Nothing is clamped: values may
    swing past the input's. Gradients of any order flow. Images that have the size already come back as they are.

    Args:
        x: images (batch, channels, height, width) of any float dtype, which is the output's too; halves are computed
            in float32.
        size: of both sides, at most the shorter of the input; odd sizes become the even one below, with a warning.
        reference_scaling: divide by the squared width alone, as the released code does, which multiplies the mean of
            images that are not square by height / width.
        precision: "strict" for products in float32; "amp" lets a GPU round their inputs to TensorFloat-32.

    Raises:
        UserError: `x` is no batch of float images, or the size is below 2 or above the shorter side.
    """
    if not isinstance(x, Tensor):
        raise UserError(f"low_frequency_crop takes a tensor, not a {type(x).__name__}: give torch.from_numpy(x)")
    if not isinstance(size, int):
        raise UserError(f"size {size}: expected a whole number of pixels")
    if x.ndim != 4 or not x.is_floating_point():
        raise UserError(
            f"low_frequency_crop takes float images (batch, channels, height, width), not {x.dtype} of shape "
            f"{tuple(x.shape)}: give x[None] for a single image, and x.float() / 255 or prepare(x, ...) for bytes"
        )
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}: {did_you_mean(precision, PRECISIONS)}")
    height, width = x.shape[2:]
    size = _even(size, height, width)
    if height == size and width == size:
        return x
    return ops.low_frequency_crop(x, size, height / width if reference_scaling else 1.0, precision == "amp")


def lanczos_weights(in_size: int, out_size: int) -> NDArray[np.int32]:
    """Pillow's Lanczos weights for an axis, times 2**22: (out_size, in_size), zeros outside of the window.

    With scale = in_size / out_size and f = max(scale, 1), output o is centred on c = (o + 0.5) scale and sees the
    places from max(0, trunc(c - 3f + 0.5)) up to min(in_size, trunc(c + 3f + 0.5)). Place x has the weight
    L((x - c + 0.5) / f), where L(u) = sinc(u) sinc(u / 3) for -3 <= u < 3 and sinc(u) = sin(pi u) / (pi u), divided by
    the sum of weights and rounded half away from zero to a multiple of 2**-22. A pass over an axis gives
    clip((sum(weight * byte) + 2**21) >> 22, 0, 255); columns come first, then rows.

    Raises:
        UserError: a size is below 1.
    """
    if min(in_size, out_size) < 1:
        raise UserError(f"sizes are 1 or more, not {in_size} and {out_size}")
    return np.array(lanczos_table(in_size, out_size))


def _check_pictures(shape: Sequence[int], dtype: object, size: int) -> None:
    if str(dtype).removeprefix("torch.") != "uint8" or len(shape) not in (3, 4):
        raise UserError(
            f"expected bytes (height, width, channels) or a batch of them, not {dtype} of shape {tuple(shape)}: "
            "give uint8 pictures with channels last"
        )
    height, width = shape[-3:-1]
    if size < 1 or min(height, width) < 1:
        raise UserError(f"a picture of {height}x{width} cannot have the size {size}: sizes are 1 or more")


def lanczos_resize(image: Picture, size: int) -> Picture:
    """Resize pictures of bytes so that the shorter side has `size`, equal to Pillow's Lanczos bit for bit.

    The longer side becomes int(size * longer / shorter), as in torchvision. Columns are resized before rows, as Pillow
    did until version 12; version 13 begins with the rows of pictures whose height loses more than twice the pixels that
    their width loses, which changes some bytes by one.

    Args:
        image: a PIL image, an array (height, width, channels), or a tensor, also with a batch in front. uint8.
        size: of the shorter side of the output.

    Returns:
        The same kind as `image`.

    Raises:
        UserError: it is no picture of bytes, or the size is below 1.
    """
    if isinstance(image, Image.Image):
        if image.mode not in ("RGB", "L"):
            raise UserError(f'a picture of mode {image.mode} is neither RGB nor L: give image.convert("RGB")')
        if image.mode == "L":
            return Image.fromarray(lanczos_resize(np.asarray(image)[..., None], size)[..., 0])
        return Image.fromarray(lanczos_resize(np.asarray(image), size))
    if isinstance(image, np.ndarray):
        _check_pictures(image.shape, image.dtype, size)
        return lanczos_resize(torch.from_numpy(np.array(image)), size).numpy()
    _check_pictures(image.shape, image.dtype, size)
    batch = image if image.ndim == 4 else image[None]
    found = ops.lanczos_resize(batch, *lanczos_sizes(batch.shape[1], batch.shape[2], size))
    return found if image.ndim == 4 else found[0]


def prepare(
    images: Tensor,
    size: int,
    *,
    mean: Sequence[Number] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[Number] = IMAGENET_DEFAULT_STD,
    method: str = "lanczos",
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "batch channels new_height new_width"]:
    """Turn bytes as loaders hold them into a model's input: smaller, as floats, (x / 255 - mean) / std, channels first.

    Args:
        images: uint8 (batch, height, width, channels).
        size: of the output's shorter side.
        mean: by channel, of numbers from 0 to 1.
        std: by channel.
        method: "lanczos" is equal to `lanczos_resize` before; "fourier" to `low_frequency_crop`, which gives a square,
            behind; "none" only normalises pictures that have the size.
        dtype: float32, bfloat16 or float16; it is computed in float32.

    Raises:
        UserError: pictures, statistics, size, method or dtype are none that the method takes.
    """
    _check_pictures(images.shape, images.dtype, size)
    if images.ndim != 4:
        raise UserError(f"prepare takes a batch, not one picture of shape {tuple(images.shape)}: give images[None]")
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}: {did_you_mean(method, METHODS)}")
    if dtype not in DTYPES:
        raise UserError(f"prepare gives {', '.join(str(known) for known in DTYPES)}, not {dtype}")
    channels = images.shape[3]
    if len(mean) != channels or len(std) != channels or min(std, default=1) <= 0:
        raise UserError(
            f"pictures of {channels} channels need as many means and positive deviations, "
            f"not {tuple(mean)} and {tuple(std)}"
        )
    height, width = images.shape[1:3]
    if method == "fourier":
        size = _even(size, height, width)
    elif method == "none" and size not in (height, width):
        raise UserError(f'pictures of {height}x{width} keep their size under method "none": give {height}, not {size}')
    return ops.prepare(images, size, [float(x) for x in mean], [float(x) for x in std], method, dtype)
