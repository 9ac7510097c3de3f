"""What the operators multiply by: the crop's real matrices and Pillow's integer Lanczos weights, made once by size."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["LANCZOS_BITS", "CropAxis", "Length", "crop_axis", "lanczos_sizes", "lanczos_table"]

LANCZOS_BITS = 22
"""Weights are multiples of 2**-22."""

Array = NDArray[np.float64]
Length = int | torch.SymInt
"""Of an axis, which graphs of dynamic shapes leave open."""


@dataclass(frozen=True)
class CropAxis:
    """One axis of the crop Y = P X P^T - (t^T X t) s s^T, in float64 (section 3.2 of the paper, in real numbers).

    The lowest frequencies -h to h - 1 of a signal have no conjugate partner for -h, which makes the complex crop's
    real part that product and a matrix of rank one.

    Args:
        matrix: P, (size, length).
        alternating: s, (size,): 1, -1, 1, ...
        sine: t, (length,).
    """

    matrix: Array
    alternating: Array
    sine: Array


def _centred(x: NDArray[np.int64], period: int) -> NDArray[np.int64]:
    """`x` in multiples of a period around zero, where sine and tangent lose nothing."""
    return (x + period // 2) % period - period // 2


@functools.lru_cache(maxsize=64)
def crop_axis(length: int, size: int) -> CropAxis:
    """The crop of an axis from `length` to an even `size`.

    P[m, n] = sin(pi b f) cot(pi f) / N with f = m / b - n / N, and b / N where f is whole; t[n] = sin(pi b n / N) / N.
    """
    out, place = np.arange(size), np.arange(length)
    phase = _centred(out[:, None] * length - place * size, size * length)  # f in units of 1 / (size * length)
    with np.errstate(divide="ignore", invalid="ignore"):
        wave = np.sin(np.pi / length * _centred(phase, 2 * length))
        matrix = wave / np.tan(np.pi / (size * length) * phase) / length
    matrix[phase == 0] = size / length
    sine = np.sin(np.pi / length * _centred(size * place, 2 * length)) / length
    axis = CropAxis(*(table.astype(np.float64) for table in (matrix, 1.0 - 2.0 * (out % 2), sine)))
    for table in (axis.matrix, axis.alternating, axis.sine):
        table.flags.writeable = False
    return axis


def _sinc(x: float) -> float:
    return math.sin(math.pi * x) / (math.pi * x) if x else 1.0


@functools.lru_cache(maxsize=64)
def lanczos_table(length: int, size: int) -> NDArray[np.int32]:
    """Pillow's Lanczos weights times 2**22, (size, length) with zeros outside of the window.

    With scale = length / size and f = max(scale, 1), output o takes the places lo to hi - 1 with
    centre = (o + 0.5) scale, lo = max(0, trunc(centre - 3f + 0.5)) and hi = min(length, trunc(centre + 3f + 0.5)). The
    weight of x is L((x - centre + 0.5) / f), L(u) = sinc(u) sinc(u / 3) for -3 <= u < 3, divided by their sum and
    rounded half away from zero.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    table = np.zeros((size, length), np.int32)
    for out in range(size):
        centre = (out + 0.5) * scale
        low = max(0, int(centre - 3.0 * stretch + 0.5))
        high = min(length, int(centre + 3.0 * stretch + 0.5))
        places = [(x - centre + 0.5) * (1.0 / stretch) for x in range(low, high)]
        weights = [_sinc(u) * _sinc(u / 3.0) if -3.0 <= u < 3.0 else 0.0 for u in places]
        total = 0.0
        for weight in weights:
            total += weight
        for x, weight in enumerate(weights, low):
            table[out, x] = int(weight / total * 2**LANCZOS_BITS + (0.5 if weight >= 0 else -0.5))
    table.flags.writeable = False
    return table


def lanczos_sizes(height: Length, width: Length, size: Length) -> tuple[Any, Any]:
    """Height and width of a picture whose shorter side becomes `size` and whose longer keeps the proportion."""
    if height <= width:
        return size, size * width // height
    return size * height // width, size
