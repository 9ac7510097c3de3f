"""The package's operator: focused linear attention with its depthwise convolution, forward and backward.

`reference.py` reads like the equations; `cpu.py` goes over the tokens in blocks that stay in the cache; `triton.py` has
the GPU kernels. All read query, key and value by their strides, and compute in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from leap_flatten.ops import cpu, cpu_backward, flops, reference
from leap_shared.ops import operator

__all__ = ["focused_linear_attention", "focused_linear_attention_backward", "focused_linear_attention_layer"]


def _joined(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Call with height and width, which a schema keeps apart, as one size."""
    return function(*args[:-2], (args[-2], args[-1]))


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
        query: channels are head-major.
        key: as the query.
        value: as the query.
        position: added to the keys.
        gain: 1 / softplus(scale).
        floor: 1e-6 / softplus(scale).
        weight: kernels of the depthwise convolution over the last height * width tokens: one per channel, or dim of
            them for every head; None leaves it out.
        bias: of the convolution.
        num_heads: dim is channels / num_heads.
        power: of the focus.
        epsilon: added to the denominator q . mean of k.
        height: of the map.
        width: of the map.
    """
    tensors = (query, key, value, position, gain, floor, weight, bias)
    return reference.forward(*tensors, num_heads, power, epsilon, (height, width))


@focused_linear_attention.backend("cpu")
def _forward_cpu(*args: Any) -> Any:
    return _joined(cpu.forward, args)


def _fits(*args: Any) -> bool | str:
    from leap_flatten.ops import triton

    query, key, value, _, _, _, weight = args[:7]
    return triton.refusal(query, key, value, weight, num_heads=args[-5]) or True


@focused_linear_attention.backend("triton", supports=_fits)
def _forward_triton(*args: Any) -> Any:
    from leap_flatten.ops import triton

    return _joined(triton.forward, args)


@operator("leap_flatten::focused_linear_attention_layer")
def focused_linear_attention_layer(
    x: Float[Tensor, "batch tokens channels"],
    query_weight: Float[Tensor, "channels channels"],
    query_bias: Float[Tensor, " channels"] | None,
    key_weight: Float[Tensor, "channels channels"],
    key_bias: Float[Tensor, " channels"] | None,
    value_weight: Float[Tensor, "channels channels"],
    value_bias: Float[Tensor, " channels"] | None,
    position: Float[Tensor, "tokens channels"],
    gain: Float[Tensor, " channels"] | None,
    floor: Float[Tensor, " channels"],
    weight: Float[Tensor, "kernels 1 side side"],
    bias: Float[Tensor, " kernels"] | None,
    out_weight: Float[Tensor, "channels channels"],
    out_bias: Float[Tensor, " channels"] | None,
    num_heads: int,
    power: float,
    epsilon: float,
    height: int,
    width: int,
) -> Float[Tensor, "batch tokens channels"]:
    """`focused_linear_attention` with the linear projections around it, for inference on a CPU.

    There it projects block by block, and no more than the values is ever written to memory. Elsewhere, and where
    gradients are wanted, projections of their own and `focused_linear_attention` serve better.
    """
    tensors = (x, query_weight, query_bias, key_weight, key_bias, value_weight, value_bias)
    others = (position, gain, floor, weight, bias, out_weight, out_bias)
    return reference.layer(*tensors, *others, num_heads, power, epsilon, (height, width))


def _projects(x: Tensor, *others: Any) -> bool | str:
    wanted = {tensor.dtype for tensor in others if isinstance(tensor, Tensor)}
    return (x.dtype in (torch.float32, torch.float64) and wanted == {x.dtype}) or "all must be float32, or all float64"


@focused_linear_attention_layer.backend("cpu", supports=_projects)
def _layer_cpu(*args: Any) -> Any:
    return _joined(cpu.layer, args)


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
    tensors = (gradient, query, key, value, position, gain, floor, weight)
    found = reference.gradients(*tensors, num_heads, power, epsilon, (height, width))
    return found[0], found[1], found[2], found[3], found[4], found[5], found[6]


@focused_linear_attention_backward.backend("cpu")
def _backward_cpu(*args: Any) -> Any:
    return _joined(cpu_backward.gradients, args)


@focused_linear_attention_backward.backend("triton", supports=lambda *args: _fits(*args[1:]))
def _backward_triton(*args: Any) -> Any:
    from leap_flatten.ops import triton_backward

    return _joined(triton_backward.gradients, args)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - the interface of torch
    *tensors, ctx.num_heads, ctx.power, ctx.epsilon, ctx.height, ctx.width = inputs
    ctx.save_for_backward(*tensors)


@focused_linear_attention.backward(_save)
def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, bias = ctx.saved_tensors
    position, *others = tensors[3:]
    given = (gradient, *tensors, ctx.num_heads, ctx.power, ctx.epsilon, ctx.height, ctx.width)
    *of_inputs, of_gain, of_floor, of_weight, of_bias = focused_linear_attention_backward(*given)
    of_position = None if position is None else of_inputs[1].sum(0, dtype=of_floor.dtype).to(position.dtype)
    found = zip((*others, bias), (of_gain, of_floor, of_weight, of_bias), strict=True)
    return *of_inputs, of_position, *(None if x is None else g.to(x.dtype) for x, g in found), *(None,) * 5


register_flop_formula(torch.ops.leap_flatten.focused_linear_attention)(flops.forward)
register_flop_formula(torch.ops.leap_flatten.focused_linear_attention_layer)(flops.layer)
register_flop_formula(torch.ops.leap_flatten.focused_linear_attention_backward)(flops.backward)
