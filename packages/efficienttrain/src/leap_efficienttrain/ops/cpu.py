"""The crop and its adjoint on a CPU, a few images at a time, whose numbers then stay in the cache.

Small images are multiplied by the crop's matrices as they are, larger ones by folded matrices, and very large ones go
through real Fourier transforms.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from leap_efficienttrain.ops.folding import plan_of
from leap_efficienttrain.ops.reference import widest
from leap_efficienttrain.ops.weights import crop_axis

__all__ = ["adjoint", "crop", "cropped", "few", "form", "parts", "spread"]

# Longer sides at which one form overtakes the other, measured on a core with AVX2 and half a MiB of second-level cache.
FOLDED = 112
TRANSFORMED = 384
NUMBERS = {"dense": 2**17, "folded": 2**18, "transformed": 2**17}
"""Of the images that come at once, for each thread; folded matrices cost calls, which more images share."""


def form(height: int, width: int, dtype: torch.dtype) -> str:
    """What images of a size are computed by: "dense", "folded" or "transformed"."""
    side = max(height, width)
    if side < FOLDED:
        return "dense"
    return "folded" if side < TRANSFORMED and dtype == torch.float32 else "transformed"


def few(images: int, numbers: int, most: int) -> int:
    """How many images of so many numbers come at once, in parts of about equal size."""
    most = max(most * torch.get_num_threads() // max(numbers, 1), 1)
    return max(-(-images // max(-(-images // most), 1)), 1)


@functools.lru_cache(maxsize=32)
def _tables(height: int, width: int, size: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """P of the rows, P^T of the columns, -t t^T and s s^T, flat."""
    rows, columns = crop_axis(height, size), crop_axis(width, size)
    with torch.inference_mode(mode=False):
        arrays = (
            rows.matrix,
            columns.matrix.T,
            -(rows.sine[:, None] * columns.sine).ravel(),
            (rows.alternating[:, None] * columns.alternating).ravel(),
        )
        return tuple(torch.from_numpy(array.copy(order="C")).to(dtype) for array in arrays)


def _multiplied(x: Tensor, left: Tensor, right: Tensor, given: Tensor, wanted: Tensor, out: Tensor | None) -> Tensor:
    """The matrices around x: left x right + (given . x) wanted, for images (images, rows, columns)."""
    out = x.new_empty(len(x), len(left), right.shape[1]) if out is None else out
    torch.outer(torch.mv(x.flatten(1), given), wanted, out=out.view(len(x), -1))
    if left.shape[0] * x.shape[2] <= x.shape[1] * right.shape[1]:
        short = torch.bmm(left.expand(len(x), -1, -1), x)
        out.view(-1, right.shape[1]).addmm_(short.view(-1, x.shape[2]), right)
        return out
    short = torch.mm(x.view(-1, x.shape[2]), right).view(*x.shape[:2], -1)
    return out.baddbmm_(left.expand(len(x), -1, -1), short)


def _transformed(x: Tensor, size: int) -> Tensor:
    """The crop by real transforms, which keep columns 0 to h; what has no conjugate partner becomes its own."""
    height, width = x.shape[1:]
    half = size // 2
    spectrum = torch.fft.fft(torch.fft.rfft(x, dim=2)[:, :, : half + 1], dim=1)
    kept = spectrum.new_empty(len(x), size, half + 1)
    kept[:, :half] = spectrum[:, :half]
    kept[:, half + 1 :] = spectrum[:, height - half + 1 :]
    lowest, highest = spectrum[:, height - half], spectrum[:, half]
    torch.add(lowest, highest, out=kept[:, half]).mul_(0.5)
    edge = spectrum[:, :, half]
    before, after = edge[:, 1:half].flip(1), edge[:, height - half + 1 :].flip(1)
    mirrored = torch.cat([edge[:, :1], after, edge[:, half : half + 1], before], 1)
    kept[:, :, half].add_(mirrored.conj()).mul_(0.5)
    kept[:, half, half] = highest[:, half].real
    out: Tensor = torch.fft.irfft(torch.fft.ifft(kept, dim=1), size, dim=2)
    return out.mul_(size**2 / (height * width))


def _transformed_adjoint(gradient: Tensor, height: int, width: int) -> Tensor:
    """The adjoint of `_transformed`: half of what has no partner stays, and half becomes the partner."""
    size = gradient.shape[2]
    half = size // 2
    spectrum = torch.fft.fft(torch.fft.rfft(gradient, dim=2), dim=1)
    if width > size:
        spectrum[:, :, half] *= 0.5
    if height > size:
        spectrum[:, half] *= 0.5
    padded = spectrum.new_zeros(len(gradient), height, width // 2 + 1)
    padded[:, height - half + 1 :, : half + 1] = spectrum[:, half + 1 :]
    padded[:, height - half, : half + 1] = spectrum[:, half]
    padded[:, : half + 1, : half + 1] = spectrum[:, : half + 1]
    if min(height - size, width - size) > 0:
        padded[:, height - half, half] = 0
        padded[:, half, half] *= 2
    out: Tensor = torch.fft.irfft(torch.fft.ifft(padded, dim=1), width, dim=2)
    return out


def cropped(x: Tensor, size: int, out: Tensor | None = None) -> Tensor:
    """The crop of a few images (images, height, width), contiguous, in float32 or float64; it may be put into `out`."""
    shape = (x.shape[1], x.shape[2], size)
    how = form(*shape[:2], x.dtype)
    if how == "folded":
        return plan_of(*shape, len(x), False)(x)
    if how == "transformed":
        return _transformed(x, size)
    left, right, given, wanted = _tables(*shape, x.dtype)
    return _multiplied(x, left, right, given, wanted, out)


def spread(gradient: Tensor, height: int, width: int, out: Tensor | None = None) -> Tensor:
    """The adjoint for a few images (images, size, size), as `cropped`."""
    shape = (height, width, gradient.shape[2])
    how = form(height, width, gradient.dtype)
    if how == "folded":
        return plan_of(*shape, len(gradient), True)(gradient)
    if how == "transformed":
        return _transformed_adjoint(gradient, height, width)
    left, right, given, wanted = _tables(*shape, gradient.dtype)
    return _multiplied(gradient, left.mT, right.mT, wanted, given, out)


def _through(
    x: Tensor, out: Tensor, gain: float, numbers: int, step: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """Take a batch through `step`, a few images at a time, as one dimension and contiguous."""
    for part, target in parts(x, out, max(numbers // max(x.shape[1], 1), 1)):
        flat = part.flatten(0, 1).to(widest(x.dtype)).contiguous()
        wanted = target.flatten(0, 1)
        for images, place in parts(flat, wanted, numbers):
            found = step(images, place if place.dtype == images.dtype else None)
            if gain != 1.0:
                found.mul_(gain)
            if found is not place:
                place.copy_(found)
    return out


def parts(x: Tensor, out: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """A batch and its output, `count` at a time."""
    starts = range(0, len(x), count)
    return ((x[start : start + count], out[start : start + count]) for start in starts)


def crop(x: Tensor, size: int, gain: float) -> Tensor:
    """See `leap_efficienttrain.ops.low_frequency_crop`."""
    height, width = x.shape[2:]
    numbers = NUMBERS[form(height, width, widest(x.dtype))]
    images = few(x.shape[0] * x.shape[1], height * width, numbers)
    out = x.new_empty(*x.shape[:2], size, size)
    return _through(x, out, gain, images, lambda part, place: cropped(part, size, place))


def adjoint(gradient: Tensor, height: int, width: int, gain: float) -> Tensor:
    """See `leap_efficienttrain.ops.low_frequency_crop_adjoint`."""
    numbers = NUMBERS[form(height, width, widest(gradient.dtype))]
    images = few(gradient.shape[0] * gradient.shape[1], height * width, numbers)
    out = gradient.new_empty(*gradient.shape[:2], height, width)
    return _through(gradient, out, gain, images, lambda part, place: spread(part, height, width, place))
