"""The operators as their definitions read: the crop by complex Fourier transforms, Lanczos in whole numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from leap_efficienttrain.ops.weights import LANCZOS_BITS, lanczos_sizes, lanczos_table

__all__ = ["adjoint", "crop", "lanczos", "normalize", "prepare", "widest"]

Images = Float[Tensor, "batch channels height width"]
Pictures = UInt8[Tensor, "batch height width channels"]
Squares = Float[Tensor, "batch channels size size"]
Others = Float[Tensor, "batch channels new_height new_width"]


def widest(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in."""
    return dtype if dtype == torch.float64 else torch.float32


def _lowest(length: int, size: int, device: torch.device) -> Tensor:
    """Where frequencies 0 to h - 1 and -h to -1 are in a transform."""
    half = size // 2
    return torch.cat([torch.arange(half, device=device), torch.arange(length - half, length, device=device)])


def crop(x: Images, size: int, gain: float) -> Squares:
    """Lowest frequencies of an unnormalised transform, times size**2 / (height * width) and `gain`, back to pixels."""
    if not x.numel():
        return x[:, :, :size, :size].clone()
    height, width = x.shape[2:]
    spectrum = torch.fft.fft2(x.to(widest(x.dtype)))
    rows, columns = _lowest(height, size, x.device), _lowest(width, size, x.device)
    kept = spectrum[:, :, rows[:, None], columns] * (gain * size**2 / (height * width))
    pixels: Tensor = torch.fft.ifft2(kept)
    return pixels.real.to(x.dtype).contiguous()


def adjoint(gradient: Squares, height: int, width: int, gain: float) -> Images:
    """Gradient of `crop` for its input: the spectrum with zeros around it."""
    size = gradient.shape[3]
    if not gradient.numel():
        return F.pad(gradient, (0, width - size, 0, height - size))
    spectrum = torch.fft.fft2(gradient.to(widest(gradient.dtype))) * gain
    rows, columns = _lowest(height, size, gradient.device), _lowest(width, size, gradient.device)
    places = (rows[:, None] * width + columns).flatten()
    padded = spectrum.new_zeros(*spectrum.shape[:2], height * width).index_copy(2, places, spectrum.flatten(2))
    pixels: Tensor = torch.fft.ifft2(padded.reshape(*spectrum.shape[:2], height, width))
    return pixels.real.to(gradient.dtype).contiguous()


def _pass(x: Tensor, size: int, axis: int) -> Tensor:
    """One pass over an axis; sums of products of whole numbers, which float64 holds exactly."""
    weights = torch.from_numpy(lanczos_table(x.shape[axis], size).astype("float64")).to(x.device)
    total: Tensor = torch.tensordot(x, weights, ([axis], [1])).movedim(-1, axis)
    whole: Tensor = ((total + 2 ** (LANCZOS_BITS - 1)) / 2**LANCZOS_BITS).floor()
    return whole.clamp(0, 255)


def lanczos(images: Pictures, height: int, width: int) -> UInt8[Tensor, "batch new_height new_width channels"]:
    """Pillow's Lanczos: rows are resized and rounded to bytes, then columns."""
    return _pass(_pass(images.double(), width, 2), height, 1).to(torch.uint8).contiguous()


def normalize(x: Images, mean: Sequence[float], std: Sequence[float]) -> Images:
    """(x / 255 - mean) / std by channel."""
    of_mean, of_std = (x.new_tensor(value)[:, None, None] for value in (mean, std))
    return (x / 255 - of_mean) / of_std


def prepare(
    images: Pictures, size: int, mean: Sequence[float], std: Sequence[float], method: str, dtype: torch.dtype
) -> Others:
    """Resize by `method`, then normalise; in float32, rounded to `dtype` at the end."""
    if method == "lanczos":
        images = lanczos(images, *lanczos_sizes(images.shape[1], images.shape[2], size))
    x = images.permute(0, 3, 1, 2).float()
    if method == "fourier":
        x = crop(x, size, 1.0)
    return normalize(x, mean, std).to(dtype).contiguous()
