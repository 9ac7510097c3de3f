"""Deterministic tensors, so that golden files need to hold no weights.

A golden case stores the names and shapes of a checkpoint and the outputs that those names gave once filled by these
rules. NumPy keeps the stream of `RandomState` frozen, so every machine makes the same numbers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["fill_state", "parameter", "tensor"]


def tensor(name: str, shape: Sequence[int], scale: float = 1.0) -> NDArray[np.float32]:
    """Normal float32 numbers of standard deviation `scale`, seeded by the CRC-32 of `name`."""
    generator = np.random.RandomState(zlib.crc32(name.encode()))
    return np.asarray(generator.standard_normal(tuple(shape)) * scale, dtype=np.float32)


def parameter(name: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """Fill of one floating-point entry of a checkpoint, by the role that its name and shape show.

    Matrices and kernels get variance 1/fan-in (all dimensions but the first), a running variance 1 + 0.1|z|, the gain
    of a normalisation (a vector named `weight`) 1 + 0.1z, and every other vector or scalar 0.1z.
    """
    role = name.rpartition(".")[2]
    if role == "running_var":
        return np.asarray(1.0 + np.abs(tensor(name, shape, 0.1)), dtype=np.float32)
    if len(shape) > 1:
        return tensor(name, shape, math.prod(shape[1:]) ** -0.5)
    offset = 1.0 if role == "weight" else 0.0
    return np.asarray(offset + tensor(name, shape, 0.1), dtype=np.float32)


def fill_state(schema: Mapping[str, tuple[Sequence[int], str]]) -> dict[str, NDArray[np.float32]]:
    """Fill every floating-point entry of {name: (shape, dtype)}; integers and booleans are the model's own affair."""
    return {name: parameter(name, shape) for name, (shape, dtype) in schema.items() if "float" in dtype}
