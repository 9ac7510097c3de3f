"""Focused linear attention as its equations read, and its gradient (section 3 of the paper, and what its code adds)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from leap_shared.vision.bodies.grids import Number, Size, to_image, to_tokens

__all__ = [
    "depthwise",
    "depthwise_gradients",
    "features",
    "focus",
    "forward",
    "gradients",
    "heads",
    "layer",
    "raise_to",
    "tokens",
    "widest",
]

Vectors = Float[Tensor, "batch tokens channels"]
Keys = Float[Tensor, "batch keys channels"]


def widest(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: half precisions would lose the 1e-6 of the features, whose cube is 1e-18."""
    return dtype if dtype == torch.float64 else torch.float32


def raise_to(x: Float[Tensor, "*shape"], power: Number) -> Float[Tensor, "*shape"]:
    """Power of every number, by multiplications where the power is 2, 3 or 4."""
    if power == 2:
        return x * x
    if power == 3:
        return x * x * x
    if power == 4:
        return (x * x).square()
    return x**power


def focus(x: Float[Tensor, "*shape channels"], power: Number) -> Float[Tensor, "*shape channels"]:
    """Sharpen the direction of non-negative vectors and keep their norms: x^p / ||x^p|| * ||x||.

    Divided by its largest entry first, which cancels, no vector's power underflows.
    """
    peak = x.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    raised = raise_to(x / peak, power)
    length = torch.linalg.vector_norm(raised, dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    focused: Tensor = raised / length * torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return focused


def features(x: Vectors, gain: Float[Tensor, " channels"] | None, floor: Float[Tensor, " channels"]) -> Vectors:
    """relu(x) * gain + floor; without a gain, what is folded into the projections: max(x, floor)."""
    return torch.maximum(x, floor) if gain is None else torch.addcmul(floor, x.relu(), gain)


def heads(x: Vectors, num_heads: int) -> Float[Tensor, "batch heads tokens dim"]:
    """Split channels into heads: channel = head * dim + place in the head."""
    return x.reshape(*x.shape[:2], num_heads, x.shape[2] // num_heads).transpose(1, 2)


def tokens(x: Float[Tensor, "batch heads tokens dim"]) -> Vectors:
    """Inverse of `heads`."""
    return x.transpose(1, 2).flatten(2)


def depthwise(
    value: Vectors, weight: Float[Tensor, "kernels 1 side side"], bias: Float[Tensor, " kernels"] | None, hw: Size
) -> Vectors:
    """Depthwise convolution of tokens as an image; fewer kernels than channels are repeated, once for each head."""
    times = value.shape[2] // weight.shape[0]
    weight, bias = weight.repeat(times, 1, 1, 1), None if bias is None else bias.repeat(times)
    image = F.conv2d(to_image(value, hw), weight, bias, padding=weight.shape[2] // 2, groups=value.shape[2])
    return to_tokens(image)


def forward(
    query: Vectors,
    key: Keys,
    value: Keys,
    position: Tensor | None,
    gain: Tensor | None,
    floor: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    num_heads: int,
    power: Number,
    epsilon: float,
    hw: Size,
) -> Vectors:
    """phi(q) (mean of phi(k) v^T) / (phi(q) . mean of phi(k) + epsilon) head by head, plus DWC of the values' map."""
    dtype, wide = query.dtype, widest(query.dtype)
    query, key, value, floor = (x.to(wide) for x in (query, key, value, floor))
    position, gain, weight, bias = (None if x is None else x.to(wide) for x in (position, gain, weight, bias))
    key = key if position is None else key + position
    sharp_query, sharp_key = (heads(focus(features(x, gain, floor), power), num_heads) for x in (query, key))
    state = sharp_key.transpose(2, 3) @ heads(value, num_heads) / key.shape[1]
    share = sharp_query @ sharp_key.mean(2, keepdim=True).transpose(2, 3) + epsilon
    out = tokens(sharp_query @ state / share)
    if weight is not None:
        first = value.shape[1] - hw[0] * hw[1]  # class tokens come before the map
        out = out + F.pad(depthwise(value[:, first:], weight, bias, hw), (0, 0, first, 0))
    return out.to(dtype)


def layer(
    x: Vectors,
    query_weight: Tensor,
    query_bias: Tensor | None,
    key_weight: Tensor,
    key_bias: Tensor | None,
    value_weight: Tensor,
    value_bias: Tensor | None,
    position: Tensor,
    gain: Tensor | None,
    floor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    num_heads: int,
    power: Number,
    epsilon: float,
    hw: Size,
) -> Vectors:
    """`forward` between its linear projections."""
    query, key = F.linear(x, query_weight, query_bias), F.linear(x, key_weight, key_bias)
    value = F.linear(x, value_weight, value_bias)
    out = forward(query, key, value, position, gain, floor, weight, bias, num_heads, power, epsilon, hw)
    return F.linear(out, out_weight, out_bias)


def _focus_gradient(x: Vectors, gradient: Vectors, power: Number) -> Vectors:
    """Gradient through `focus`: of the norm and of the direction apart, as their joint factor overflows in float32."""
    peak = x.amax(-1, keepdim=True)
    below = raise_to(x / peak, power - 1) if power != 1 else torch.ones_like(x)
    raised = below * (x / peak)
    length, norm = (torch.linalg.vector_norm(y, dim=-1, keepdim=True) for y in (raised, x))
    direction = raised / length
    along = (direction * gradient).sum(-1, keepdim=True)
    of_direction = (gradient - direction * along) * (norm / (peak * length)) * below * power
    total: Tensor = x * (along / norm) + of_direction
    return total


def gradients(
    gradient: Vectors,
    query: Vectors,
    key: Keys,
    value: Keys,
    position: Tensor | None,
    gain: Tensor | None,
    floor: Tensor,
    weight: Tensor | None,
    num_heads: int,
    power: Number,
    epsilon: float,
    hw: Size,
) -> tuple[Tensor, ...]:
    """Gradients of `forward` for query, key, value, gain, floor, weight and bias; empty where there is none.

    The gradient for `position` is that for the key, summed over the batch.
    """
    wide, count = widest(query.dtype), key.shape[1]
    given, gradient = (query, key, value), gradient.to(wide)
    query, key, value, floor = (x.to(wide) for x in (query, key, value, floor))
    position, gain, weight = (None if x is None else x.to(wide) for x in (position, gain, weight))
    key = key if position is None else key + position
    query_features, key_features = (features(x, gain, floor) for x in (query, key))
    sharp_query, sharp_key = (heads(focus(x, power), num_heads) for x in (query_features, key_features))
    values, outer = heads(value, num_heads), heads(gradient, num_heads)
    state, mean = sharp_key.transpose(2, 3) @ values / count, sharp_key.mean(2, keepdim=True)
    share = sharp_query @ mean.transpose(2, 3) + epsilon
    outer = outer / share
    of_share = -(outer * (sharp_query @ state)).sum(-1, keepdim=True) / share
    of_state = sharp_query.transpose(2, 3) @ outer / count
    of_mean = (of_share * sharp_query).sum(2, keepdim=True) / count
    of_query = tokens(outer @ state.transpose(2, 3) + of_share * mean)
    of_key = tokens(values @ of_state.transpose(2, 3) + of_mean)
    of_value = tokens(sharp_key @ of_state)
    of_gain, of_floor = floor.new_zeros(0 if gain is None else floor.shape[0]), torch.zeros_like(floor)
    passed = []
    for x, x_features, of_x in ((query, query_features, of_query), (key, key_features, of_key)):
        of_features = _focus_gradient(x_features, of_x, power)
        if gain is None:
            of_input = torch.where(x > floor, of_features, 0.0)
            of_floor = of_floor + (of_features - of_input).sum((0, 1))
        else:
            of_input = torch.where(x > 0, of_features * gain, 0.0)
            of_gain = of_gain + (of_features * x.relu()).sum((0, 1))
            of_floor = of_floor + of_features.sum((0, 1))
        passed.append(of_input)
    of_weight, of_bias = floor.new_zeros(0), floor.new_zeros(0)
    if weight is not None:
        first = value.shape[1] - hw[0] * hw[1]
        of_image, of_weight, of_bias = depthwise_gradients(gradient[:, first:], value[:, first:], weight, hw)
        of_value = of_value + F.pad(of_image, (0, 0, first, 0))
    of_inputs = (x.to(like.dtype) for x, like in zip((*passed, of_value), given, strict=True))
    return (*of_inputs, of_gain, of_floor, of_weight, of_bias)


def depthwise_gradients(gradient: Vectors, value: Vectors, weight: Tensor, hw: Size) -> tuple[Vectors, Tensor, Tensor]:
    """Gradients of `depthwise` for values, weight and bias."""
    times, channels = value.shape[2] // weight.shape[0], value.shape[2]
    reach = int(weight.shape[2]) // 2  # a number also where shapes are symbols: second derivatives need it
    of_image, of_weight, of_bias = torch.ops.aten.convolution_backward(
        *(to_image(x, hw) for x in (gradient, value)),
        weight.repeat(times, 1, 1, 1),
        [channels],
        *([1, 1], [reach, reach], [1, 1], False, [0, 0], channels),
        (True, True, True),
    )
    shared = of_weight.reshape(times, *weight.shape).sum(0), of_bias.reshape(times, -1).sum(0)
    return to_tokens(of_image), *shared
