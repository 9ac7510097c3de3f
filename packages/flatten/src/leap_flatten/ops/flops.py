"""Costs of the operators, from shapes, for `torch.utils.flop_counter`: matrix products and convolutions, times two.

Arguments are the operators', tensors by their shapes; the output's shape comes by keyword.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["backward", "forward", "layer"]

Shape = Sequence[int]


def _products(query: Shape, key: Shape, num_heads: int) -> int:
    """Multiply-adds of the sums over keys, and of the queries' share of them."""
    batch, count, channels = query
    return batch * channels * ((count + key[1]) * (channels // num_heads) + count)


def _convolution(query: Shape, weight: Shape | None, height: int, width: int) -> int:
    return 0 if weight is None else query[0] * query[2] * height * width * weight[2] * weight[3]


def forward(query: Shape, key: Shape, *others: Any, **_: Any) -> int:
    """Of `focused_linear_attention`."""
    weight, num_heads, size = others[4], others[6], others[-2:]
    return 2 * (_products(query, key, num_heads) + _convolution(query, weight, *size))


def layer(x: Shape, *others: Any, **_: Any) -> int:
    """Of `focused_linear_attention_layer`: four projections more."""
    weight, num_heads, size = others[9], others[13], others[-2:]
    projections = 4 * x[0] * x[1] * x[2] ** 2
    return 2 * (projections + _products(x, x, num_heads) + _convolution(x, weight, *size))


def backward(gradient: Shape, query: Shape, key: Shape, *others: Any, **_: Any) -> int:
    """Of `focused_linear_attention_backward`: the forward pass's products again, and two for each of them."""
    weight, num_heads, size = others[4], others[5], others[-2:]
    return 2 * (3 * _products(query, key, num_heads) + 2 * _convolution(gradient, weight, *size))
