"""The package's operator: focused linear attention with its depthwise convolution, forward and backward.

`reference.py` reads like the equations; `cpu.py` goes over the tokens in blocks that stay in the cache; `triton.py` has
the GPU kernels. All read query, key and value by their strides, and compute in float32 or wider.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from leap_flatten.ops import reference
from leap_shared.ops import operator

__all__ = ["focused_linear_attention", "focused_linear_attention_backward"]


@operator("leap_flatten::focused_linear_attention")
def focused_linear_attention(
    query: Float[Tensor, "batch tokens channels"],
    key: Float[Tensor, "batch keys channels"],
    value: Float[Tensor, "batch keys channels"],
    position: Float[Tensor, "keys channels"] | None,
    gain: Float[Tensor, " channels"] | None,
    floor: Float[Tensor, " channels"],
    weight: Float[Tensor, "kernels 1 side side"] | None,
    bias: Float[Tensor, " kernels"] | None,
    num_heads: int,
    power: float,
    epsilon: float,
    height: int,
    width: int,
) -> Float[Tensor, "batch tokens channels"]:
    """Non-causal linear attention with the focused feature map (Han et al. 2023), plus DWC of the values.

    Features are relu(x) * gain + floor, or max(x, floor) without a gain; their direction is sharpened by `power`, their
    norm (over all channels) kept. O(tokens * dim^2): keys are summed once per head.

    Args:
        query, key, value: channels are head-major.
        position: added to the keys.
        gain: 1 / softplus(scale).
        floor: 1e-6 / softplus(scale).
        weight: kernels of the depthwise convolution over the last height * width tokens: one per channel, or dim of
            them for every head; None leaves it out.
        bias: of the convolution.
        num_heads: dim is channels / num_heads.
        power: of the focus.
        epsilon: added to the denominator q . mean of k.
        height, width: of the map.
    """
    numbers = (num_heads, power, epsilon, (height, width))
    return reference.forward(query, key, value, position, gain, floor, weight, bias, *numbers)


@operator("leap_flatten::focused_linear_attention_backward")
def focused_linear_attention_backward(
    gradient: Float[Tensor, "batch tokens channels"],
    query: Float[Tensor, "batch tokens channels"],
    key: Float[Tensor, "batch keys channels"],
    value: Float[Tensor, "batch keys channels"],
    position: Float[Tensor, "keys channels"] | None,
    gain: Float[Tensor, " channels"] | None,
    floor: Float[Tensor, " channels"],
    weight: Float[Tensor, "kernels 1 side side"] | None,
    num_heads: int,
    power: float,
    epsilon: float,
    height: int,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `focused_linear_attention` for query, key, value, gain, floor, weight and bias.

    Everything is computed again from the inputs: the forward pass saves nothing else.
    """
    numbers = (num_heads, power, epsilon, (height, width))
    found = reference.gradients(gradient, query, key, value, position, gain, floor, weight, *numbers)
    return found[0], found[1], found[2], found[3], found[4], found[5], found[6]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - the interface of torch
    *tensors, ctx.num_heads, ctx.power, ctx.epsilon, ctx.height, ctx.width = inputs
    ctx.save_for_backward(*tensors)


@focused_linear_attention.backward(_save)
def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, bias = ctx.saved_tensors
    position, *others = tensors[3:]
    numbers = (ctx.num_heads, ctx.power, ctx.epsilon, ctx.height, ctx.width)
    *of_inputs, of_gain, of_floor, of_weight, of_bias = focused_linear_attention_backward(gradient, *tensors, *numbers)
    of_position = None if position is None else of_inputs[1].sum(0, dtype=of_floor.dtype).to(position.dtype)
    found = zip((*others, bias), (of_gain, of_floor, of_weight, of_bias), strict=True)
    return *of_inputs, of_position, *(None if x is None else g.to(x.dtype) for x, g in found), *(None,) * 5
