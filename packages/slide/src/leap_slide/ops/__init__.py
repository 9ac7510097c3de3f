"""The package's operator: local attention whose keys and values are shifted by depthwise kernels, and its gradient.

`reference.py` takes one tap at a time over whole maps; `cpu.py` does so over strips that stay in the cache; `triton.py`
has the GPU kernels. All read maps by their strides, so that channels may come first or last, and compute in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from leap_shared.ops import operator
from leap_slide.ops import cpu, cpu_backward, flops, reference

__all__ = ["slide_attention", "slide_attention_backward"]


@operator("leap_slide::slide_attention")
def slide_attention(
    query: Float[Tensor, "batch heads dim height width"],
    key: Float[Tensor, "batch heads dim padded_height padded_width"],
    value: Float[Tensor, "batch heads dim padded_height padded_width"],
    key_weight: Float[Tensor, "dim slots taps"],
    key_bias: Float[Tensor, "dim slots"],
    value_weight: Float[Tensor, "dim slots taps"] | None,
    value_bias: Float[Tensor, "dim slots"] | None,
    position: Float[Tensor, "heads slots"] | None,
    keep: Float[Tensor, "batch heads slots height width"] | None,
    scale: float,
    on_logits: bool,
    masked: bool,
    padded: bool,
) -> Float[Tensor, "batch heads dim height width"]:
    """Slide attention (Pan et al. 2023, eq. 4 to 9) without the k * k copies of keys and values.

    Args:
        query: not yet scaled. The output's memory has the order of its dimensions.
        key: as the query, or with `padded` a radius of k // 2 larger on every side.
        value: as the key.
        key_weight: summed kernels of the two convolutions by channel, slot and tap; k * k slots and taps.
        key_bias: their summed biases.
        value_weight: of the values where they have kernels of their own.
        value_bias: of the values where they have kernels of their own.
        position: added to every channel of a slot's key; with `on_logits` to its logit.
        keep: what softmax's shares are multiplied by, as dropout does.
        scale: of the logits.
        on_logits: see `position`.
        masked: leave slots out whose pixel is outside of the map.
        padded: keys and values bring what is around the map; else it is zeros.
    """
    tensors = (query, key, value, key_weight, key_bias, value_weight, value_bias, position, keep)
    return reference.forward(*tensors, scale, on_logits, masked, padded)


@slide_attention.fake
def _like_query(query: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(query)


@slide_attention.backend("cpu")
def _forward_cpu(*args: Any) -> Any:
    return cpu.forward(*args)


def _fits(*args: Any) -> bool | str:
    from leap_slide.ops import triton

    return triton.refusal(args[0], args[3]) or True


@slide_attention.backend("triton", supports=_fits)
def _forward_triton(*args: Any) -> Any:
    from leap_slide.ops import triton

    return triton.forward(*args)


@operator("leap_slide::slide_attention_backward")
def slide_attention_backward(
    gradient: Float[Tensor, "batch heads dim height width"],
    query: Float[Tensor, "batch heads dim height width"],
    key: Float[Tensor, "batch heads dim padded_height padded_width"],
    value: Float[Tensor, "batch heads dim padded_height padded_width"],
    key_weight: Float[Tensor, "dim slots taps"],
    key_bias: Float[Tensor, "dim slots"],
    value_weight: Float[Tensor, "dim slots taps"] | None,
    value_bias: Float[Tensor, "dim slots"] | None,
    position: Float[Tensor, "heads slots"] | None,
    keep: Float[Tensor, "batch heads slots height width"] | None,
    scale: float,
    on_logits: bool,
    masked: bool,
    padded: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `slide_attention` for all of its tensors but `keep`; empty where there is none.

    Everything is computed again from the inputs: the forward pass saves nothing else.
    """
    tensors = (gradient, query, key, value, key_weight, key_bias, value_weight, value_bias, position, keep)
    found = reference.gradients(*tensors, scale, on_logits, masked, padded)
    return found[0], found[1], found[2], found[3], found[4], found[5], found[6], found[7]


@slide_attention_backward.fake
def _like_inputs(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> tuple[Tensor, ...]:
    del gradient
    wide = reference.widest(query.dtype)
    of_maps = tuple(torch.empty_like(x) for x in (query, key, value))
    tables = tuple(query.new_empty(0 if x is None else x.shape, dtype=wide) for x in others[:5])
    return *of_maps, *tables


@slide_attention_backward.backend("cpu")
def _backward_cpu(*args: Any) -> Any:
    return cpu_backward.gradients(*args)


@slide_attention_backward.backend("triton", supports=lambda *args: _fits(*args[1:]))
def _backward_triton(*args: Any) -> Any:
    from leap_slide.ops import triton_backward

    return triton_backward.gradients(*args)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - the interface of torch
    *tensors, ctx.scale, ctx.on_logits, ctx.masked, ctx.padded = inputs
    ctx.save_for_backward(*tensors)


@slide_attention.backward(_save)
def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    given = ctx.saved_tensors
    arguments = (gradient, *given, ctx.scale, ctx.on_logits, ctx.masked, ctx.padded)
    found = slide_attention_backward(*arguments)
    return *(None if x is None else g.to(x.dtype) for x, g in zip(given[:8], found, strict=True)), *(None,) * 5


register_flop_formula(torch.ops.leap_slide.slide_attention)(flops.forward)
register_flop_formula(torch.ops.leap_slide.slide_attention_backward)(flops.backward)
