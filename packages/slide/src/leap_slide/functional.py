"""The paper's idea as functions: slide attention between projections, and the sum of its two paths' kernels."""

from __future__ import annotations

import contextlib
import math
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from leap_shared.errors import UserError, did_you_mean
from leap_shared.ops import backends, requested, use
from leap_slide import ops
from leap_slide.ops import reference
from leap_slide.ops.reference import Bias, Maps, Slots, Taps

__all__ = ["BACKENDS", "PADDINGS", "Kernels", "attend", "check_backend", "check_kernel_size", "check_options"]
__all__ += ["is_traced", "merge_weights", "padded_maps", "resolved", "shift_kernel"]
__all__ += ["slide_attention", "slide_attention_conv"]

BACKENDS = ("auto", "conv", "gemm", "triton")
PADDINGS = ("zeros", "reflect", "replicate", "circular")
Weight = Float[Tensor, "kernels 1 side side"]
Kernels = tuple[Weight, Float[Tensor, " kernels"]]
"""Weight and bias of a depthwise convolution to k * k slots of each channel; kernel j * k * k + i is that of slot i."""


def check_kernel_size(kernel_size: object) -> None:
    """Raise UserError where a kernel has no middle."""
    number = 0
    if not isinstance(kernel_size, bool) and isinstance(kernel_size, Integral):
        number = int(kernel_size)
    if number < 1 or number % 2 == 0:
        raise UserError(f"kernel_size {kernel_size!r}: expected an odd number of 1 or more, the paper takes 3")


def check_backend(backend: str, device: torch.device | None = None) -> None:
    """Raise UserError where a backend is unknown, or cannot run on a device."""
    if backend not in BACKENDS:
        raise UserError(f"backend {backend!r} is unknown: {did_you_mean(backend, BACKENDS)}")
    if backend != "triton" or device is None:
        return
    state = backends()["triton"]
    if state != "works" and not state.startswith("interpreter"):
        raise UserError(f"backend='triton' cannot run here: {state}; 'auto' takes what works")
    if state == "works" and device.type != "cuda":
        raise UserError(f"backend='triton' needs CUDA tensors, these are on {device.type}: move them, or take 'auto'")


def is_traced() -> bool:
    """Whether torch.export or torch.jit are recording operations, rather than running or compiling them."""
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()
    jit: Any = torch.jit
    return bool(compiling or jit.is_tracing())


def resolved(backend: str, device: torch.device) -> str:
    """The backend as given, but "conv" for "auto" where only ordinary operations run: on MPS, and in exporters."""
    return "conv" if backend == "auto" and (device.type == "mps" or is_traced()) else backend


def shift_kernel(dim: int, kernel_size: int) -> Weight:
    """Kernels of the fixed path (section 3.2): slot i of every channel reads the pixel at tap i, row by row.

    Args:
        dim: channels of a head.
        kernel_size: k, odd.

    Returns:
        Weights (dim * k * k, 1, k, k) of zeros and ones.
    """
    check_kernel_size(kernel_size)
    taps = kernel_size * kernel_size
    return torch.eye(taps).reshape(taps, 1, kernel_size, kernel_size).repeat(dim, 1, 1, 1)


def merge_weights(
    dep_conv_weight: Weight,
    dep_conv_bias: Float[Tensor, " kernels"] | None,
    dep_conv1_weight: Weight,
    dep_conv1_bias: Float[Tensor, " kernels"] | None,
) -> Kernels:
    """Weight and bias of the one convolution that does what both paths do (section 3.3); None stands for zeros.

    Raises:
        UserError: the shapes differ, or are none of a depthwise convolution's.
    """
    shapes = [tuple(x.shape) for x in (dep_conv_weight, dep_conv1_weight)]
    side = shapes[0][-1] if len(shapes[0]) == 4 else 0
    if shapes[0] != shapes[1] or side % 2 == 0 or shapes[0][1:3] != (1, side) or shapes[0][0] % side**2:
        raise UserError(f"kernels of shapes {shapes[0]} and {shapes[1]}: expected two of (dim * k * k, 1, k, k), k odd")
    biases = [bias for bias in (dep_conv_bias, dep_conv1_bias) if bias is not None]
    for bias in biases:
        if bias.shape != shapes[0][:1]:
            raise UserError(f"a bias of shape {tuple(bias.shape)}: expected ({shapes[0][0]},), one per kernel")
    total = sum(biases[1:], biases[0]) if biases else dep_conv_weight.new_zeros(shapes[0][0])
    return dep_conv_weight + dep_conv1_weight, total


def padded_maps(x: Maps, radius: int, mode: str) -> Float[Tensor, "batch heads dim padded_height padded_width"]:
    """Maps with what lies around them: zeros, or by another mode of `torch.nn.functional.pad`."""
    if mode == "zeros":
        return F.pad(x, (radius,) * 4)
    height, width = x.shape[3:]
    if mode in ("reflect", "circular") and radius >= min(height, width) + (mode == "circular"):
        raise UserError(
            f"a map of {height}x{width} tokens is too small for padding_mode {mode!r} with a kernel of "
            f"{2 * radius + 1}x{2 * radius + 1}: use 'replicate' or 'zeros', or a larger image"
        )
    around = F.pad(x.flatten(0, 1), (radius,) * 4, mode=mode)
    return around.reshape(*x.shape[:2], *around.shape[1:])


def _convolved(x: Maps, kernels: Kernels, padding_mode: str) -> Float[Tensor, "maps dim slots height width"]:
    """All slots of maps, batch and heads in one, as Core ML takes five dimensions at most."""
    weight, bias = (one.to(x.dtype) for one in kernels)
    dim, side = x.shape[2], weight.shape[2]
    around = padded_maps(x, side // 2, padding_mode).flatten(0, 1)
    return F.conv2d(around, weight, bias, groups=dim).reshape(-1, dim, side * side, *x.shape[3:])


def slide_attention_conv(
    query: Maps,
    key: Maps,
    value: Maps,
    keys: Kernels,
    values: Kernels,
    position: Float[Tensor, "heads slots"] | None,
    keep: Slots | None,
    scale: float,
    on_logits: bool = False,
    masked: bool = False,
    padding_mode: str = "zeros",
) -> Maps:
    """Slide attention as the paper writes it, by depthwise convolutions (eq. 4 to 9), with its k * k copies.

    It is made of ordinary operations, for exporters and devices that know no others. Arguments as for `attend`.
    """
    batch, heads, dim, height, width = query.shape
    position, keep = (None if x is None else x.to(query.dtype) for x in (position, keep))
    query, shifted = (query * scale).flatten(0, 1), _convolved(key, keys, padding_mode)
    added = None if position is None else position.repeat(batch, 1)[:, :, None, None]
    if added is not None and not on_logits:
        shifted = shifted + added[:, None]
    logits = (query[:, :, None] * shifted).sum(1)
    if added is not None and on_logits:
        logits = logits + added
    if masked:
        logits = logits.masked_fill(~reference.inside((height, width), keys[0].shape[2], query.device), -math.inf)
    share = logits.softmax(1)
    if keep is not None:
        share = share * keep.flatten(0, 1)
    return (share[:, None] * _convolved(value, values, padding_mode)).sum(2).reshape(batch, heads, dim, height, width)


def attend(
    query: Maps,
    key: Maps,
    value: Maps,
    keys: Kernels,
    values: Kernels | None,
    position: Float[Tensor, "heads slots"] | None,
    keep: Slots | None,
    scale: float,
    on_logits: bool = False,
    masked: bool = False,
    padding_mode: str = "zeros",
    backend: str = "auto",
) -> Maps:
    """Slide attention of maps (batch, heads, dim, height, width) in any memory order, by the backend that fits.

    Args:
        query: not yet scaled.
        key: as the query.
        value: as the query.
        keys: weight and bias of the keys' convolution.
        values: those of the values', None for the keys'.
        position: added to every channel of a slot's key, with `on_logits` to its logit.
        keep: what the shares of the softmax are multiplied by.
        scale: of the logits.
        on_logits: see `position`.
        masked: leave slots out whose pixel is outside of the map.
        padding_mode: what lies around the map.
        backend: see `slide_attention`.
    """
    backend = resolved(backend, query.device)
    if backend == "conv":
        numbers = (scale, on_logits, masked, padding_mode)
        return slide_attention_conv(query, key, value, keys, values or keys, position, keep, *numbers)
    side = keys[0].shape[2]
    padded = padding_mode != "zeros"
    if padded:
        key, value = (padded_maps(x, side // 2, padding_mode) for x in (key, value))
    (weight, bias), (own_weight, own_bias) = _by_tap(keys), (None, None) if values is None else _by_tap(values)
    tensors = (query, key, value, weight, bias, own_weight, own_bias, position, keep)
    forced = {"gemm": "cpu" if query.device.type == "cpu" else "reference", "triton": "triton"}.get(backend)
    by_itself = forced in (None, requested()) or (forced == "cpu" and requested() == "auto")
    # What `use` asks for holds for other threads too, so it is not asked for without need, nor inside a graph.
    with contextlib.nullcontext() if by_itself or torch.compiler.is_compiling() else use(str(forced)):
        return ops.slide_attention(*tensors, scale, on_logits, masked, padded)


def _by_tap(kernels: Kernels) -> tuple[Taps, Bias]:
    """Weights by channel, slot and tap, and biases by channel and slot."""
    (weight, bias), slots = kernels, kernels[0].shape[2] ** 2
    return weight.reshape(-1, slots, slots), bias.reshape(-1, slots)


def slide_attention(
    q: Float[Tensor, "batch height width channels"],
    k: Float[Tensor, "batch height width channels"],
    v: Float[Tensor, "batch height width channels"],
    weight: Weight,
    bias: Float[Tensor, " kernels"],
    rpb: Tensor | None = None,
    *,
    num_heads: int,
    kernel_size: int = 3,
    scale: float | None = None,
    backend: str = "auto",
    value_weight: Weight | None = None,
    value_bias: Float[Tensor, " kernels"] | None = None,
    rpb_on: str = "keys",
    mask_padding: bool = False,
    padding_mode: str = "zeros",
) -> Float[Tensor, "batch height width channels"]:
    """Slide attention, everything between the projections (section 3 of the paper).

    Args:
        q: queries, channels head-major and last, any strides; not yet scaled.
        k: keys, as the queries.
        v: values, as the queries.
        weight: merged kernels (dim * k * k, 1, k, k), see `merge_weights`; dim is channels / num_heads.
        bias: their merged biases (dim * k * k,).
        rpb: relative position bias, one number per head and slot in any shape that has heads * k * k, or None.
        num_heads: heads, a divisor of the channels.
        kernel_size: k, odd.
        scale: of the logits; None for dim^-1/2.
        backend: "auto", "conv" (depthwise convolutions, with k * k copies of keys and values), "gemm" (a tap at a time)
            or "triton".
        value_weight: kernels of the values where they have their own.
        value_bias: biases of the values where they have their own.
        rpb_on: "keys", as in the paper's code, or "logits".
        mask_padding: leave slots out of the softmax whose pixel is outside; the paper's code does not.
        padding_mode: "zeros", "reflect", "replicate" or "circular".

    Raises:
        UserError: shapes, dtypes or options do not fit, or the backend cannot run here.
    """
    check_kernel_size(kernel_size)
    check_backend(backend, q.device)
    check_options(rpb_on, padding_mode, mask_padding)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise UserError(f"{shapes}: expected three tensors (batch, height, width, channels) of one shape")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise UserError(f"{name} is of type {tensor.dtype}, q of {q.dtype}: expected one floating-point type")
    tables = {"weight": weight, "bias": bias, "rpb": rpb, "value_weight": value_weight, "value_bias": value_bias}
    for name, table in {"k": k, "v": v, **tables}.items():
        if table is not None and not table.is_floating_point():
            raise UserError(f"{name} is of type {table.dtype}: expected a floating-point type")
        if table is not None and table.device != q.device:
            raise UserError(f"{name} is on {table.device}, q on {q.device}: move one to the other")
    height, width, channels = q.shape[1:]
    if num_heads < 1 or channels % num_heads:
        raise UserError(f"{channels} channels and {num_heads} heads: the channels must be a multiple of the heads")
    if not min(height, width):
        raise UserError(f"{shapes}: expected at least one pixel")
    dim, slots = channels // num_heads, kernel_size**2
    keys, values = (weight, bias), None
    _check_kernels("weight", "bias", weight, bias, dim, kernel_size)
    if value_weight is not None and value_bias is not None:
        _check_kernels("value_weight", "value_bias", value_weight, value_bias, dim, kernel_size)
        values = (value_weight, value_bias)
    elif value_weight is not None or value_bias is not None:
        raise UserError("values with kernels of their own need both value_weight and value_bias")
    if rpb is not None and rpb.numel() != num_heads * slots:
        raise UserError(f"rpb has {rpb.numel()} numbers: expected {num_heads} heads times {slots} slots")
    position = None if rpb is None else rpb.reshape(num_heads, slots)
    query, key, value = (x.reshape(*x.shape[:3], num_heads, dim).permute(0, 3, 4, 1, 2) for x in (q, k, v))
    numbers = (dim**-0.5 if scale is None else float(scale), rpb_on == "logits", mask_padding, padding_mode)
    out = attend(query, key, value, keys, values, position, None, *numbers, backend)
    return out.permute(0, 3, 4, 1, 2).flatten(3)


def check_options(rpb_on: str, padding_mode: str, mask_padding: bool) -> None:
    """Raise UserError where options of the attention are unknown or exclude each other."""
    if rpb_on not in ("keys", "logits"):
        raise UserError(f"rpb_on {rpb_on!r}: expected 'keys' (as in the paper's code) or 'logits'")
    if padding_mode not in PADDINGS:
        raise UserError(f"padding_mode {padding_mode!r} is unknown: {did_you_mean(padding_mode, PADDINGS)}")
    if mask_padding and padding_mode != "zeros":
        raise UserError(f"mask_padding leaves the padding out, so padding_mode {padding_mode!r} has no use: drop one")


def _check_kernels(weight_name: str, bias_name: str, weight: Tensor, bias: Tensor, dim: int, side: int) -> None:
    expected = (dim * side**2, 1, side, side)
    if weight.shape != expected or bias.shape != expected[:1]:
        given = f"{weight_name} {tuple(weight.shape)} and {bias_name} {tuple(bias.shape)}"
        raise UserError(f"{given}: expected {expected} and {expected[:1]}, for {dim} channels a head and k = {side}")
