"""The paper's idea as functions: the focused feature map, and linear attention over it with the values' convolution."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from leap_flatten import ops
from leap_flatten.ops import reference
from leap_shared.errors import UserError
from leap_shared.ops import BACKENDS, backends, use
from leap_shared.vision.bodies.grids import Number, Size, Tokens

__all__ = ["DENOMINATORS", "EPSILON", "Keys", "attend", "check_finite", "check_focus", "epsilon_of", "focus"]
__all__ += ["focused_linear_attention", "stretch"]

EPSILON = 1e-6
DENOMINATORS = ("mean", "sum")
Keys = Float[Tensor, "batch keys channels"]


def check_focus(power: object, kernel_size: object, denominator: str) -> None:
    """Raise UserError where a focusing factor, a kernel size or a denominator is impossible."""
    if not isinstance(power, (int, float)) or not 0 < power < math.inf:
        raise UserError(f"focusing_factor {power!r}: expected a number above 0, the paper takes 3")
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise UserError(f"kernel_size {kernel_size!r}: expected an odd number, the paper takes 5")
    if denominator not in DENOMINATORS:
        raise UserError(f"denominator {denominator!r}: expected 'mean' (current release) or 'sum' (first release)")


def is_traced() -> bool:
    """Whether a graph is being made, in which tensors have no values to look at."""
    jit: Any = torch.jit
    return bool(torch.compiler.is_compiling() or jit.is_tracing())


def check_finite(name: str, x: Tensor) -> None:
    """Raise UserError where an input holds NaN or infinity, as far as that costs nothing to speak of.

    A sum of the input takes less than 1% of a layer's time on a CPU. A GPU would have to be waited for, a graph that is
    compiled or exported has no values to look at, and what a differentiable model makes inside itself is judged by its
    loss: these are not looked at, and NaN goes through to the output.
    """
    if is_traced() or x.device.type != "cpu" or x.grad_fn is not None:
        return
    plain = x.detach()
    try:
        total = plain.sum(dtype=reference.widest(x.dtype)).item()
        finite = math.isfinite(total) or bool(plain.isfinite().all())  # sums may overflow
    except RuntimeError:  # vmap and other tracers have no values either
        return
    if not finite:
        raise UserError(f"{name} of shape {tuple(x.shape)} holds NaN or infinity: expected finite numbers")


def focus(x: Float[Tensor, "*shape channels"], p: Number = 3) -> Float[Tensor, "*shape channels"]:
    """Focused feature map of non-negative vectors, x^p / ||x^p|| * ||x|| (eq. 6); zero stays zero.

    Raises:
        UserError: p is not above 0, or `x` holds no floating-point or no finite numbers.
    """
    check_focus(p, 1, "mean")
    if not x.is_floating_point():
        raise UserError(f"x is of type {x.dtype}: expected floating-point numbers")
    check_finite("x", x)
    return reference.focus(x.to(reference.widest(x.dtype)), p).to(x.dtype)


def epsilon_of(denominator: str, keys: int) -> float:
    """What is added to q . mean of k: 1e-6 beside a sum over keys is that much less beside their mean."""
    return EPSILON if denominator == "mean" else EPSILON / keys


def stretch(value: Tokens, count: int) -> Float[Tensor, "batch stretched channels"]:
    """Interpolate tokens linearly along their flattened axis, align_corners False, as PVT's reduced values are."""
    return F.interpolate(value.transpose(1, 2), count, mode="linear", align_corners=False).transpose(1, 2)


def attend(
    query: Tokens,
    key: Keys,
    value: Keys,
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
    numbers = (num_heads, float(power), epsilon_of(denominator, key.shape[1]))
    tensors = (query, key, value, position, gain, floor)
    if weight is None or value.shape[1] >= hw[0] * hw[1]:
        return ops.focused_linear_attention(*tensors, weight, bias, *numbers, *hw)
    out = ops.focused_linear_attention(*tensors, None, None, *numbers, *hw)
    wide = reference.widest(query.dtype)
    kernels, offsets = weight.to(wide), None if bias is None else bias.to(wide)
    local = reference.depthwise(stretch(value.to(wide), hw[0] * hw[1]), kernels, offsets, hw)
    return (out.to(wide) + local).to(out.dtype)


def focused_linear_attention(
    q: Tokens,
    k: Keys,
    v: Keys,
    num_heads: int,
    scale: Float[Tensor, "*ones channels"],
    pos: Float[Tensor, "*one keys channels"] | None = None,
    dwc_weight: Float[Tensor, "kernels 1 side side"] | None = None,
    dwc_bias: Float[Tensor, " kernels"] | None = None,
    p: Number = 3,
    hw: Size | None = None,
    denominator: str = "mean",
    backend: str = "auto",
    prefix_tokens: int = 0,
) -> Tokens:
    """Focused linear attention between projections, everything but the linear layers (eq. 5 to 8 and the code).

    Args:
        q: queries, (batch, tokens, channels), channels head-major; any strides, so that a packed qkv needs no copy.
        k: keys, of as many tokens, or fewer (PVT's spatial reduction).
        v: values, as the keys.
        num_heads: heads, a divisor of the channels.
        scale: S before the softplus that q and k are divided by.
        pos: positional encoding, added to the keys.
        dwc_weight: kernels of the depthwise convolution, (channels / heads, 1, side, side) for every head, or one per
            channel; None leaves the convolution out.
        dwc_bias: its bias.
        p: focusing factor, above 0.
        hw: height and width of the map of queries; needed with `dwc_weight` unless it is a square.
        denominator: 1e-6 is added to q . mean of k ("mean", the current release) or to q . sum of k ("sum").
        backend: auto, reference, cpu or triton.
        prefix_tokens: class tokens before the map, which take part in the attention and not in the convolution.

    Raises:
        UserError: shapes, dtypes or numbers do not fit, or the backend cannot run here.
    """
    check_focus(p, 1 if dwc_weight is None else dwc_weight.shape[-1], denominator)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 3:
        raise UserError(f"{shapes}: expected three tensors (batch, tokens, channels), heads not yet split")
    batch, count, channels = q.shape
    if num_heads < 1 or channels % num_heads:
        raise UserError(f"{channels} channels and {num_heads} heads: the channels must be a multiple of the heads")
    if k.shape != v.shape or (k.shape[0], k.shape[2]) != (batch, channels) or not 0 < k.shape[1] <= count:
        raise UserError(f"{shapes}: expected one batch and channels, and as many keys as values, at most the queries")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not tensor.is_floating_point():
            raise UserError(f"{name} is of type {tensor.dtype}: expected floating-point numbers")
        check_finite(name, tensor)
    if scale.numel() != channels:
        raise UserError(f"scale has {scale.numel()} numbers: expected one per channel, {channels}")
    if pos is not None and (pos.shape[-2:] != k.shape[1:] or pos.numel() != k.shape[1:].numel()):
        raise UserError(f"pos has shape {tuple(pos.shape)}: expected {tuple(k.shape[1:])}, as the keys")
    if dwc_weight is not None:
        _check_kernels(dwc_weight, dwc_bias, channels, num_heads)
    if not 0 <= prefix_tokens < max(count, 1) or (prefix_tokens and k.shape[1] != count):
        raise UserError(
            f"{prefix_tokens} prefix tokens of {count}, {k.shape[1]} keys: expected fewer, and as many keys"
        )
    places = count - prefix_tokens
    if hw is None:
        hw = (places, 1) if dwc_weight is None else (math.isqrt(places),) * 2
    if hw[0] * hw[1] != places:
        raise UserError(f"{places} tokens are no map of {hw[0]}x{hw[1]}: give hw=(height, width) of the queries' map")
    if backend not in (*BACKENDS, "auto"):
        raise UserError(f"backend {backend!r}: expected auto, {', '.join(BACKENDS)}")
    state = backends()[backend] if backend == "triton" else "works"
    if state != "works" and not state.startswith("interpreter"):
        advice = "It needs an NVIDIA GPU, and torch installed for CUDA; or leave backend='auto'"
        raise UserError(f"backend='triton' cannot run here: {state}. {advice}")
    gain = 1 / F.softplus(scale.reshape(-1).to(reference.widest(scale.dtype)))
    position = None if pos is None else pos.reshape(pos.shape[-2:])
    tensors = (q, k, v, position, gain, EPSILON * gain, dwc_weight, dwc_bias)
    if backend == "auto":
        return attend(*tensors, num_heads, p, denominator, hw)
    with use(backend):
        return attend(*tensors, num_heads, p, denominator, hw)


def _check_kernels(weight: Tensor, bias: Tensor | None, channels: int, num_heads: int) -> None:
    counts = (channels // num_heads, channels)
    if weight.ndim != 4 or weight.shape[0] not in counts or weight.shape[1:] != (1, *weight.shape[3:] * 2):
        expected = f"expected (kernels, 1, side, side) with {counts[0]} (dim of a head) or {counts[1]} kernels"
        raise UserError(f"dwc_weight has shape {tuple(weight.shape)}: {expected}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(f"dwc_bias has shape {tuple(bias.shape)}: expected ({weight.shape[0]},), one per kernel")
