"""Costs of the operators, from shapes, for `torch.utils.flop_counter`: products with the kernels, times two.

They are those of the merged convolutions: k * k taps for each of k * k slots, once for keys and once for values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

__all__ = ["backward", "forward"]

Shape = Sequence[int]


def forward(query: Shape, key: Shape, value: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Of `slide_attention`."""
    del key, value
    slots, taps = weight[1:]
    return 2 * 2 * math.prod(query) * slots * taps


def backward(gradient: Shape, query: Shape, *others: Any, **_: Any) -> int:
    """Of `slide_attention_backward`: the scores again, then three products for keys and three for values."""
    del gradient
    return 7 * forward(query, *others) // 2
