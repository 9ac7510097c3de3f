"""Slide attention as a module: the authors' two convolution paths while training, one after `reparameterize`."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import trunc_normal_
from torch import Tensor, nn

from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Number, Size, Tokens
from leap_slide.functional import (
    Kernels,
    attend,
    check_backend,
    check_kernel_size,
    check_options,
    merge_weights,
    shift_kernel,
)
from leap_slide.ops.reference import Maps

__all__ = ["DepthwiseKernels", "SlideAttention", "check_state"]

log = logging.getLogger(__name__)
MERGED = "dep_conv_merged"


class DepthwiseKernels(nn.Module):
    """Weight and bias of a depthwise convolution from `dim` channels to `slots` of each; no convolution is run.

    Args:
        dim: channels of a head.
        side: k, of the kernels and, squared, of the slots.
        bias: whether there is one.
        frozen: start as the plain shifts of `shift_kernel`, without gradient.
    """

    def __init__(self, dim: int, side: int, bias: bool = True, frozen: bool = False) -> None:
        super().__init__()
        start = shift_kernel(dim, side) if frozen else torch.empty(dim * side**2, 1, side, side)
        self.weight = nn.Parameter(start, requires_grad=not frozen)
        self.bias = nn.Parameter(torch.empty(dim * side**2)) if bias else None
        for parameter in (self.bias, None if frozen else self.weight):
            if parameter is not None:
                nn.init.uniform_(parameter, -1 / side, 1 / side)  # as nn.Conv2d does


class SlideAttention(nn.Module):
    """Local self-attention of every pixel to the k x k slots that depthwise convolutions make of its neighbours.

    The paper's layer (section 3) with the names, memory layout and arithmetic of its code, and the options of the
    authors' extended one. Neither the shifted keys nor the shifted values are ever in memory, but by "conv".

    Args:
        dim: channels.
        num_heads: heads.
        kernel_size: k, odd.
        qkv_bias: whether the projection of q, k and v has a bias.
        qk_scale: of the logits; None for (dim / num_heads)^-1/2, whatever `dim_reduction`.
        dim_reduction: attend in dim / dim_reduction channels.
        share_qkv: one projection for q, k and v.
        share_kernel: values have the keys' kernels; else `dep_conv2` in place of `dep_conv1`.
        rel_pos_bias: have a bias per head and slot.
        padding_mode: what is around the map: zeros, reflect, replicate or circular.
        backend: auto, conv, gemm or triton, see `functional.slide_attention`.
        attn_drop: dropout of the attention's shares.
        proj_drop: dropout behind the output projection.
        single_bias: train one bias where the reference trains two that are only ever added.
        rpb_on: "keys", as in the reference, or "logits".
        mask_padding: leave slots out whose pixel is outside of the map, which the reference does not.

    Raises:
        UserError: a number or a name is impossible; from `forward`: the input does not fit `dim` and `hw`.
    """

    relative_position_bias_table: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        kernel_size: int = 3,
        qkv_bias: bool = True,
        qk_scale: Number | None = None,
        dim_reduction: int = 1,
        share_qkv: bool = False,
        share_kernel: bool = True,
        rel_pos_bias: bool = True,
        padding_mode: str = "zeros",
        backend: str = "auto",
        attn_drop: Number = 0.0,
        proj_drop: Number = 0.0,
        single_bias: bool = False,
        rpb_on: str = "keys",
        mask_padding: bool = False,
    ) -> None:
        super().__init__()
        check_kernel_size(kernel_size)
        check_backend(backend)
        check_options(rpb_on, padding_mode, mask_padding)
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise UserError(f"{dim} channels and {num_heads} heads: the channels must be a multiple of the heads")
        if dim_reduction < 1 or dim % (num_heads * dim_reduction):
            wanted = f"a multiple of heads times dim_reduction, {num_heads} * {dim_reduction}"
            raise UserError(f"{dim} channels: expected {wanted} (which must be 1 or more)")
        for name, rate in (("attn_drop", attn_drop), ("proj_drop", proj_drop)):
            if not 0 <= rate < 1:
                raise UserError(f"{name} {rate}: expected a rate from 0 to below 1")
        if qk_scale is not None and not math.isfinite(qk_scale):
            raise UserError(f"qk_scale {qk_scale}: expected a finite number, or None")
        self.dim, self.num_heads, self.kernel_size, self.head_dim = dim, num_heads, kernel_size, dim // num_heads
        self.head_dim //= dim_reduction
        self.scale = float((dim // num_heads) ** -0.5 if qk_scale is None else qk_scale)
        self.dim_reduction, self.share_qkv, self.share_kernel = dim_reduction, share_qkv, share_kernel
        self.padding_mode, self.backend, self.attn_drop = padding_mode, backend, attn_drop
        self.rpb_on, self.mask_padding, self.single_bias = rpb_on, mask_padding, single_bias
        inner = dim // dim_reduction
        self.qkv = nn.Linear(dim, inner * (1 if share_qkv else 3), bias=qkv_bias)
        self.dep_conv = DepthwiseKernels(self.head_dim, kernel_size, not single_bias, frozen=True)
        self.dep_conv1 = DepthwiseKernels(self.head_dim, kernel_size)
        if not share_kernel:
            self.dep_conv2 = DepthwiseKernels(self.head_dim, kernel_size)
        self.register_parameter("relative_position_bias_table", None)
        if rel_pos_bias:
            self.relative_position_bias_table = nn.Parameter(torch.empty(1, num_heads, 1, kernel_size**2, 1, 1))
            trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.proj = nn.Linear(inner, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        hooks: Any = self
        hooks.register_load_state_dict_pre_hook(_check_state)

    @property
    def reparameterized(self) -> bool:
        """Whether there is one path in place of two."""
        return not hasattr(self, "dep_conv")

    def kernels(self) -> tuple[Kernels, Kernels | None]:
        """Merged weights and biases of the keys' convolution, and of the values' where they have their own."""
        if self.reparameterized:
            merged: list[Any] = [module for name, module in self.named_children() if name.startswith(MERGED)]
            kernels = [(module.weight, module.bias) for module in merged]
            return kernels[0], None if self.share_kernel else kernels[1]
        fixed, keys = self.dep_conv, self.dep_conv1
        of_keys = merge_weights(fixed.weight, fixed.bias, keys.weight, keys.bias)
        if self.share_kernel:
            return of_keys, None
        values = self.dep_conv2
        return of_keys, merge_weights(fixed.weight, fixed.bias, values.weight, values.bias)

    def reparameterize(self) -> None:
        """Make one convolution of the two paths, see `convert.reparameterize`; nothing where that is done."""
        if self.reparameterized:
            return
        for number, kernels in enumerate(self.kernels()):
            if kernels is not None:
                merged = DepthwiseKernels(self.head_dim, self.kernel_size)
                merged.weight, merged.bias = (nn.Parameter(x.detach().clone()) for x in kernels)
                self.add_module(f"{MERGED}{number + 1 if number else ''}", merged)
        for name in ("dep_conv", "dep_conv1", "dep_conv2"):
            if hasattr(self, name):
                delattr(self, name)

    def projected(self, x: Tokens, hw: Size) -> tuple[Maps, Maps, Maps]:
        """Queries, keys and values as maps of heads; in memory channels first on a CPU, and last elsewhere."""
        sizes = (self.num_heads, 1 if self.share_qkv else 3, self.head_dim)
        if x.device.type == "cpu" and _is_plain(self.qkv):
            bias: Tensor | None = self.qkv.bias
            weight, turned = self.qkv.weight.expand(x.shape[0], -1, -1), x.transpose(1, 2)
            packed = weight @ turned if bias is None else torch.baddbmm(bias[:, None], weight, turned)
            parts = packed.reshape(-1, *sizes, x.shape[1]).unbind(2)
        else:
            packed = self.qkv(x)
            parts = tuple(part.permute(0, 2, 3, 1) for part in packed.reshape(*x.shape[:2], *sizes).unbind(3))
        maps = [part.reshape(*part.shape[:3], *hw) for part in parts]  # five dimensions are the most that Core ML takes
        return (maps[0],) * 3 if self.share_qkv else (maps[0], maps[1], maps[2])

    def attended(self, query: Maps, key: Maps, value: Maps) -> Maps:
        """The attention between projections."""
        keys, values = self.kernels()
        table, keep = self.relative_position_bias_table, None
        position = None if table is None else table.reshape(self.num_heads, -1)
        if self.attn_drop and self.training:
            shape = (*query.shape[:2], self.kernel_size**2, *query.shape[3:])
            keep = torch.empty(shape, device=query.device).bernoulli_(1 - self.attn_drop).div_(1 - self.attn_drop)
        options = (self.rpb_on == "logits", self.mask_padding, self.padding_mode, self.backend)
        return attend(query, key, value, keys, values, position, keep, self.scale, *options)

    def forward(
        self, x: Tokens | Float[Tensor, "batch channels height width"], hw: Size | None = None
    ) -> Tokens | Float[Tensor, "batch channels height width"]:
        """Tokens (batch, height * width, dim), row-major, or maps (batch, dim, height, width), to the same layout.

        `hw` is height and width of the tokens' map; without it a square is meant.
        """
        check_backend(self.backend, x.device)
        hw = self.size_of(x, hw)
        tokens = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x
        attended = self.attended(*self.projected(tokens, hw)).flatten(1, 2).flatten(2)
        out: Tensor = self.proj_drop(self.proj(attended.transpose(1, 2)))
        return out.transpose(1, 2).reshape(x.shape) if x.ndim == 4 else out

    def size_of(self, x: Tensor, hw: Size | None) -> Size:
        """Height and width of the map that an input is of; a UserError where it does not fit."""
        given = f"input of shape {tuple(x.shape)} and type {x.dtype}"
        channels = x.shape[1 if x.ndim == 4 else -1] if x.ndim in (3, 4) else None
        if channels != self.dim or not x.is_floating_point():
            expected = f"(batch, height * width, {self.dim}) or (batch, {self.dim}, height, width)"
            raise UserError(f"{given}: expected floating-point numbers of shape {expected}")
        if x.ndim == 4:
            size = (x.shape[2], x.shape[3])
            if hw not in (None, size):
                raise UserError(f"{given} is a map of {size[0]}x{size[1]}, but hw is {hw}: leave hw out")
            hw, count = size, size[0] * size[1]
        else:
            count = x.shape[1]
            hw = hw or (math.isqrt(count),) * 2
        if min(hw) < 1 or hw[0] * hw[1] != count:
            raise UserError(f"{count} tokens are no map of {hw[0]}x{hw[1]}: give hw=(height, width)")
        return hw

    def extra_repr(self) -> str:
        """The numbers that tell one layer from another."""
        return f"dim={self.dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, backend={self.backend!r}"


def _is_plain(linear: nn.Module) -> bool:
    """Whether a layer's weight may be used without calling it: nothing wraps it, watches it or stands in for it."""
    watchers = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    return type(linear) is nn.Linear and not any(watchers)


def check_state(layer: SlideAttention, state: Mapping[str, Tensor], prefix: str, strict: bool = True) -> None:
    """Say what is wrong with a state dict where PyTorch's list of keys and shapes would not; mend a second bias.

    Raises:
        UserError: the weights are of the other form, of another kernel size, and where all are wanted (`strict`) of
            another attention, or without a bias that was left out in their training.
    """
    where, side = prefix.rstrip(".") or "the layer", layer.kernel_size
    deployed = f"{prefix}{MERGED}.weight" in state
    two_paths = f"{prefix}dep_conv1.weight" in state
    if deployed and not layer.reparameterized:
        raise UserError(f"{where}: the weights have one path, this model two: call reparameterize(model), then load")
    if two_paths and layer.reparameterized:
        raise UserError(f"{where}: the weights have two paths, this model one: load, then call reparameterize(model)")
    table = state.get(f"{prefix}relative_position_bias_table")
    windowed = table is not None and table.ndim == 2
    other = windowed or (strict and any(f"{prefix}{name}.weight" in state for name in ("qkv", "q", "kv")))
    if other and not (deployed or two_paths):
        raise UserError(
            f"{where}: these are weights of {'window' if windowed else 'another'} attention, whose qkv rows are "
            "ordered in another way: use leap_slide.convert.from_swin"
        )
    weight = state.get(f"{prefix}{MERGED if deployed else 'dep_conv1'}.weight")
    if weight is not None and weight.ndim == 4 and weight.shape[2] != side:
        raise UserError(f"{where}: the weights have kernel_size {weight.shape[2]}, this model {side}: create it so")
    second = f"{prefix}dep_conv.bias"
    if strict and two_paths and second not in state and not layer.single_bias:
        raise UserError(f"{where}: the weights have one bias, this model two: create it with single_bias=True")
    if layer.single_bias and not layer.reparameterized and second in state and isinstance(state, dict):
        bias = state.pop(second)
        for name in ("dep_conv1", "dep_conv2"):
            if f"{prefix}{name}.bias" in state:
                state[f"{prefix}{name}.bias"] = state[f"{prefix}{name}.bias"] + bias


def _check_state(layer: SlideAttention, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Before a state dict is loaded: check it, and warn of a fixed path that is not plain."""
    check_state(layer, state, prefix, strict=False)  # PyTorch does not tell whether a part is enough
    side, fixed = layer.kernel_size, state.get(f"{prefix}dep_conv.weight")
    expected = (layer.head_dim * side**2, 1, side, side)
    if (
        fixed is not None
        and fixed.shape == expected
        and not torch.equal(fixed.cpu().float(), shift_kernel(layer.head_dim, side))
    ):
        where = prefix.rstrip(".") or "the layer"
        log.warning("%s: dep_conv.weight of these weights is not the plain shift; it is taken as it is", where)
