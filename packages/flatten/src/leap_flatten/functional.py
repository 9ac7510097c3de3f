"""The paper's idea as functions: the focused feature map, and linear attention over it with the values' convolution."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from leap_flatten import ops
from leap_flatten.ops import reference
from leap_shared.errors import UserError
from leap_shared.ops import BACKENDS, use
from leap_shared.vision.bodies.grids import Number, Size, Tokens

__all__ = ["DENOMINATORS", "EPSILON", "attend", "check_focus", "focus", "focused_linear_attention", "stretch"]

EPSILON = 1e-6
DENOMINATORS = ("mean", "sum")


def check_focus(power: Number, kernel_size: int, denominator: str) -> None:
    """Raise UserError where a focusing factor, a kernel size or a denominator is impossible."""
    if not 0 < power < math.inf:
        raise UserError(f"focusing_factor {power}: expected a number above 0, the paper takes 3")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise UserError(f"kernel_size {kernel_size}: expected an odd number, the paper takes 5")
    if denominator not in DENOMINATORS:
        raise UserError(f"denominator {denominator!r}: expected 'mean' (current release) or 'sum' (first release)")


def focus(x: Float[Tensor, "*shape channels"], p: Number = 3) -> Float[Tensor, "*shape channels"]:
    """Focused feature map of non-negative vectors, x^p / ||x^p|| * ||x|| (eq. 6); zero stays zero.

    Raises:
        UserError: p is not above 0, or `x` holds no floating-point numbers.
    """
    check_focus(p, 1, "mean")
    if not x.is_floating_point():
        raise UserError(f"x is of type {x.dtype}: expected floating-point numbers")
    return reference.focus(x.to(reference.widest(x.dtype)), p).to(x.dtype)


def stretch(value: Tokens, count: int) -> Tokens:
    """Interpolate tokens linearly along their flattened axis, align_corners False, as PVT's reduced values are."""
    return F.interpolate(value.transpose(1, 2), count, mode="linear", align_corners=False).transpose(1, 2)


def attend(
    query: Tokens,
    key: Tokens,
    value: Tokens,
    position: Float[Tensor, "keys channels"] | None,
    gain: Float[Tensor, " channels"] | None,
    floor: Float[Tensor, " channels"],
    weight: Float[Tensor, "kernels 1 side side"] | None,
    bias: Float[Tensor, " kernels"] | None,
    num_heads: int,
    power: Number,
    denominator: str,
    hw: Size,
) -> Tokens:
    """The operator, with values stretched for the convolution where there are fewer keys than queries."""
    epsilon = EPSILON if denominator == "mean" else EPSILON / key.shape[1]
    numbers = (num_heads, float(power), epsilon)
    tensors = (query, key, value, position, gain, floor)
    if weight is None or value.shape[1] >= hw[0] * hw[1]:
        return ops.focused_linear_attention(*tensors, weight, bias, *numbers, *hw)
    out = ops.focused_linear_attention(*tensors, None, None, *numbers, *hw)
    return out + reference.depthwise(stretch(value, hw[0] * hw[1]), weight, bias, hw)


def focused_linear_attention(
    q: Tokens,
    k: Tokens,
    v: Tokens,
    num_heads: int,
    scale: Float[Tensor, "*one channels"],
    pos: Float[Tensor, "*one keys channels"] | None = None,
    dwc_weight: Float[Tensor, "kernels 1 side side"] | None = None,
    dwc_bias: Float[Tensor, " kernels"] | None = None,
    p: Number = 3,
    hw: Size | None = None,
    denominator: str = "mean",
    backend: str = "auto",
) -> Tokens:
    """Focused linear attention between projections, everything but the linear layers (eq. 5 to 8 and the code).

    Args:
        q: queries, (batch, tokens, channels), channels head-major; any strides, so that a packed qkv needs no copy.
        k, v: keys and values, of as many tokens, or fewer (PVT's spatial reduction).
        num_heads: heads, a divisor of the channels.
        scale: S before the softplus that q and k are divided by.
        pos: positional encoding, added to the keys.
        dwc_weight: kernels of the depthwise convolution, (channels / heads, 1, side, side) for every head, or one per
            channel; None leaves the convolution out.
        dwc_bias: its bias.
        p: focusing factor, above 0.
        hw: height and width of the map, the last tokens; needed with `dwc_weight` unless all tokens are a square map.
        denominator: 1e-6 is added to q . mean of k ("mean", the current release) or to q . sum of k ("sum").
        backend: auto, reference, cpu or triton.

    Raises:
        UserError: shapes, dtypes or numbers do not fit, or the backend cannot run here.
    """
    check_focus(p, 1 if dwc_weight is None else dwc_weight.shape[-1], denominator)
    batch, count, channels = q.shape
    if num_heads < 1 or channels % num_heads:
        raise UserError(f"{channels} channels and {num_heads} heads: the channels must be a multiple of the heads")
    if k.shape != v.shape or (k.shape[0], k.shape[2]) != (batch, channels) or not 0 < k.shape[1] <= count:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        raise UserError(f"{shapes}: expected one batch and channels, and as many keys as values, at most the queries")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not tensor.is_floating_point():
            raise UserError(f"{name} is of type {tensor.dtype}: expected floating-point numbers")
    if scale.numel() != channels:
        raise UserError(f"scale has {scale.numel()} numbers: expected one per channel, {channels}")
    if pos is not None and pos.shape[-2:] != k.shape[1:]:
        raise UserError(f"pos has shape {tuple(pos.shape)}: expected {tuple(k.shape[1:])}, as the keys")
    if dwc_weight is not None and dwc_weight.shape[0] not in (channels // num_heads, channels):
        raise UserError(
            f"dwc_weight has {dwc_weight.shape[0]} kernels: expected {channels // num_heads} (dim of a head) or {channels}"
        )
    side = math.isqrt(count)
    hw = hw or (side, side)
    if dwc_weight is not None and not 0 < hw[0] * hw[1] <= count:
        raise UserError(f"hw {hw} is a map of {hw[0] * hw[1]} tokens, but there are {count}: give the map's size")
    if backend not in (*BACKENDS, "auto"):
        raise UserError(f"backend {backend!r}: expected auto, {', '.join(BACKENDS)}")
    gain = 1 / F.softplus(scale.reshape(-1).to(reference.widest(scale.dtype)))
    position = None if pos is None else pos.reshape(pos.shape[-2:])
    tensors = (q, k, v, position, gain, EPSILON * gain, dwc_weight, dwc_bias)
    if backend == "auto":
        return attend(*tensors, num_heads, p, denominator, hw)
    with use(backend):
        return attend(*tensors, num_heads, p, denominator, hw)
