"""The package's operators: the low-frequency crop with its adjoint, Lanczos of bytes, and pictures made ready in one.

`reference.py` holds their definitions, by complex Fourier transforms and in whole numbers; `cpu.py`, `folding.py` and
`cpu_pictures.py` multiply real matrices, whole or folded, or use real transforms; the Triton files have the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from leap_efficienttrain.ops import cpu, cpu_pictures, reference
from leap_efficienttrain.ops.weights import Length, lanczos_sizes
from leap_shared.ops import operator

__all__ = ["lanczos_resize", "low_frequency_crop", "low_frequency_crop_adjoint", "prepare"]


@operator("leap_efficienttrain::low_frequency_crop")
def low_frequency_crop(
    x: Float[Tensor, "batch channels height width"], size: int, gain: float, amp: bool
) -> Float[Tensor, "batch channels size size"]:
    """The lowest frequencies of images, as images (Wang et al. 2023, section 3.2).

    Args:
        x: images of any float dtype; halves are computed in float32.
        size: of the output, even, at most the shorter side.
        gain: what the output, whose mean is the input's, is multiplied by.
        amp: whether products may round their inputs to TensorFloat-32.
    """
    del amp
    return reference.crop(x, size, gain)


@low_frequency_crop.fake
def _square(x: Tensor, size: Length, gain: float, amp: bool) -> Tensor:
    del gain, amp
    return x.new_empty(*x.shape[:2], size, size)


@low_frequency_crop.backend("cpu")
def _crop_cpu(x: Tensor, size: int, gain: float, amp: bool) -> Tensor:
    del amp  # nothing would be faster
    return cpu.crop(x, size, gain)


def _fits(x: Tensor, *_: object) -> bool | str:
    from leap_efficienttrain.ops import triton

    return triton.refusal(x) or True


@low_frequency_crop.backend("triton", supports=_fits)
def _crop_triton(x: Tensor, size: int, gain: float, amp: bool) -> Tensor:
    from leap_efficienttrain.ops import triton

    return triton.crop(x, size, gain, amp)


@operator("leap_efficienttrain::low_frequency_crop_adjoint")
def low_frequency_crop_adjoint(
    gradient: Float[Tensor, "batch channels size size"], height: int, width: int, gain: float, amp: bool
) -> Float[Tensor, "batch channels height width"]:
    """Gradient of `low_frequency_crop` for its input, whose gradient in turn is the crop."""
    del amp
    return reference.adjoint(gradient, height, width, gain)


@low_frequency_crop_adjoint.fake
def _rectangle(gradient: Tensor, height: Length, width: Length, gain: float, amp: bool) -> Tensor:
    del gain, amp
    return gradient.new_empty(*gradient.shape[:2], height, width)


@low_frequency_crop_adjoint.backend("cpu")
def _adjoint_cpu(gradient: Tensor, height: int, width: int, gain: float, amp: bool) -> Tensor:
    del amp
    return cpu.adjoint(gradient, height, width, gain)


@low_frequency_crop_adjoint.backend("triton", supports=_fits)
def _adjoint_triton(gradient: Tensor, height: int, width: int, gain: float, amp: bool) -> Tensor:
    from leap_efficienttrain.ops import triton

    return triton.adjoint(gradient, height, width, gain, amp)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.given, ctx.wanted, ctx.options = inputs[0].shape[2:], output.shape[3], inputs[-2:]


@low_frequency_crop.backward(_remember)
def _crop_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return low_frequency_crop_adjoint.overload(gradient, *ctx.given, *ctx.options), None, None, None


@low_frequency_crop_adjoint.backward(_remember)
def _adjoint_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return low_frequency_crop.overload(gradient, ctx.given[0], *ctx.options), None, None, None, None


@operator("leap_efficienttrain::lanczos_resize")
def lanczos_resize(
    images: UInt8[Tensor, "batch height width channels"], height: int, width: int
) -> UInt8[Tensor, "batch new_height new_width channels"]:
    """Pillow's Lanczos resampling, bit for bit."""
    return reference.lanczos(images, height, width)


@lanczos_resize.fake
def _resized(images: Tensor, height: Length, width: Length) -> Tensor:
    return images.new_empty(images.shape[0], height, width, images.shape[3])


def _few_taps(images: Tensor, height: int, width: int) -> bool | str:
    taps = max(cpu_pictures.taps(images.shape[1], height), cpu_pictures.taps(images.shape[2], width))
    most = cpu_pictures.MOST_TAPS
    return taps <= most or f"{taps} weights for an output are more than the {most} whose sums are exact"


@lanczos_resize.backend("cpu", supports=_few_taps)
def _lanczos_cpu(images: Tensor, height: int, width: int) -> Tensor:
    return cpu_pictures.lanczos(images, height, width)


@lanczos_resize.backend("triton")
def _lanczos_triton(images: Tensor, height: int, width: int) -> Tensor:
    from leap_efficienttrain.ops import triton_pictures

    return triton_pictures.lanczos(images, height, width)


@operator("leap_efficienttrain::prepare")
def prepare(
    images: UInt8[Tensor, "batch height width channels"],
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    method: str,
    dtype: torch.dtype,
) -> Float[Tensor, "batch channels new_height new_width"]:
    """Pictures of bytes, at a lower size and normalised: (x / 255 - mean) / std by channel.

    Args:
        images: channels last.
        size: of the output's shorter side.
        mean: by channel, of numbers from 0 to 1.
        std: by channel.
        method: "lanczos" rounds to bytes in between; "fourier" is the crop, to a square; "none" leaves the size.
        dtype: of the output, computed in float32.
    """
    return reference.prepare(images, size, mean, std, method, dtype)


@prepare.fake
def _prepared(images: Tensor, size: Length, mean: object, std: object, method: str, dtype: torch.dtype) -> Tensor:
    del mean, std
    height, width = images.shape[1:3]
    shape = {"lanczos": lanczos_sizes(height, width, size), "fourier": (size, size)}.get(method, (height, width))
    return images.new_empty(images.shape[0], images.shape[3], *shape, dtype=dtype)


def _few_taps_or_none(images: Tensor, size: int, mean: object, std: object, method: str, dtype: object) -> bool | str:
    del mean, std, dtype
    return method != "lanczos" or _few_taps(images, *lanczos_sizes(images.shape[1], images.shape[2], size))


@prepare.backend("cpu", supports=_few_taps_or_none)
def _prepare_cpu(
    images: Tensor, size: int, mean: Sequence[float], std: Sequence[float], method: str, dtype: torch.dtype
) -> Tensor:
    return cpu_pictures.prepare(images, size, mean, std, method, dtype)


@prepare.backend("triton")
def _prepare_triton(
    images: Tensor, size: int, mean: Sequence[float], std: Sequence[float], method: str, dtype: torch.dtype
) -> Tensor:
    from leap_efficienttrain.ops import triton_pictures

    return triton_pictures.prepare(images, size, mean, std, method, dtype)
