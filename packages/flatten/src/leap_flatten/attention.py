"""Focused linear attention as modules: stand-alone and Swin's, PVT's with spatial reduction, CSWin's branch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from leap_flatten import ops
from leap_flatten.functional import EPSILON, Keys, attend, check_finite, check_focus, epsilon_of, is_traced
from leap_flatten.ops.reference import widest
from leap_shared.errors import UserError
from leap_shared.ops import requested
from leap_shared.vision.bodies.grids import (
    Number,
    Size,
    Tokens,
    check_reduction,
    replace_data,
    resample_grid,
    to_image,
    to_tokens,
)

__all__ = ["CSWinFocusedLinearAttention", "Focused", "FocusedLinearAttention", "PVTFocusedLinearAttention"]


class Focused(nn.Module):
    """What the three layers share: scale, positional encoding on its grid, the convolution, and the operator's call.

    Args:
        dim, num_heads: channels and heads.
        grid: height and width of the map of keys that the positional encoding is for.
        focusing_factor: p, above 0.
        kernel_size: side of the depthwise convolution, odd.
        denominator: "mean" or "sum", see `functional.focused_linear_attention`.
        prefix_tokens: class tokens before the map; they have an encoding, and no convolution.

    Raises:
        UserError: a number is impossible.
    """

    floor: Tensor | None

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Size,
        focusing_factor: Number = 3,
        kernel_size: int = 5,
        denominator: str = "mean",
        prefix_tokens: int = 0,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise UserError(f"{dim} channels and {num_heads} heads: the channels must be a multiple of the heads")
        if prefix_tokens < 0:
            raise UserError(f"prefix_tokens {prefix_tokens}: expected 0 or more")
        _check_grid(grid)
        check_focus(focusing_factor, kernel_size, denominator)
        self.num_heads, self.grid, self.prefix_tokens = num_heads, grid, prefix_tokens
        self.focusing_factor, self.denominator = focusing_factor, denominator
        self.scale = nn.Parameter(torch.zeros(1, 1, dim))
        self.positional_encoding = nn.Parameter(torch.zeros(1, prefix_tokens + grid[0] * grid[1], dim))
        head_dim = dim // num_heads
        self.dwc = nn.Conv2d(head_dim, head_dim, kernel_size, padding=kernel_size // 2, groups=head_dim)
        self.register_buffer("floor", None, persistent=False)  # of the features, where the scale is folded

    def position_for(self, grid: Size) -> Float[Tensor, "one keys channels"]:
        """The positional encoding on another grid: bicubic, class tokens kept."""
        table: Tensor = self.positional_encoding
        if grid == self.grid:
            return table
        prefix, places = table[:, : self.prefix_tokens], table[:, self.prefix_tokens :]
        return torch.cat((prefix, resample_grid(places, self.grid, grid)), 1)

    def set_input_size(self, hw: Size) -> None:
        """Resample the positional encoding to another map once, in place."""
        _check_grid(hw)
        replace_data(self.positional_encoding, self.position_for(hw))
        self.grid = hw

    def kernels(self) -> tuple[Tensor, Tensor]:
        """Kernels and biases that the values' map is convolved with."""
        weight, bias = self.dwc.parameters()
        return weight, bias

    def _features(self) -> tuple[Tensor | None, Tensor]:
        """Gain and floor of the features; no gain where the scale is folded into the projections."""
        if self.floor is not None:
            return None, self.floor
        gain = 1 / F.softplus(self.scale.flatten().to(widest(self.scale.dtype)))
        return gain, EPSILON * gain

    def attend(self, query: Tokens, key: Keys, value: Keys, hw: Size, grid: Size | None = None) -> Tokens:
        """Attention and convolution of projected tokens; `grid` is that of the keys where it is not `hw`."""
        position = self.position_for(grid or hw)[0]
        gain, floor = self._features()
        weight, bias = self.kernels()
        numbers = (self.num_heads, self.focusing_factor, self.denominator)
        return attend(query, key, value, position, gain, floor, weight, bias, *numbers, hw)

    def attend_at_once(
        self, x: Tokens, hw: Size, query: Projection, key: Projection, value: Projection, out: nn.Linear
    ) -> Tokens:
        """Projections, attention and convolution as one operator, see `_at_once`."""
        position, (gain, floor), (weight, bias) = self.position_for(hw)[0], self._features(), self.kernels()
        tensors = (position, gain, floor, weight, bias, out.weight, out.bias)
        epsilon = epsilon_of(self.denominator, x.shape[1])
        return ops.focused_linear_attention_layer(
            x, *query, *key, *value, *tensors, self.num_heads, float(self.focusing_factor), epsilon, *hw
        )


Projection = tuple[Tensor, Tensor | None]


def _rows(linear: nn.Linear, first: int, last: int) -> Projection:
    """Weights and biases of some outputs of a linear layer."""
    bias: Tensor | None = linear.bias
    return linear.weight[first:last], None if bias is None else bias[first:last]


def _at_once(x: Tensor, *linears: nn.Linear) -> bool:
    """Whether the operator that projects too may serve: eager inference in full precision on a CPU, plain layers."""
    eager = not (torch.is_grad_enabled() or is_traced())
    plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and requested() in ("auto", "cpu")
    if not (eager and plain) or torch.is_autocast_enabled("cpu"):
        return False
    return all(
        type(linear) is nn.Linear
        and linear.weight.dtype == x.dtype
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        for linear in linears
    )


def _check_grid(grid: Size) -> None:
    if min(grid) < 1:
        raise UserError(f"a map of {grid[0]}x{grid[1]} tokens: expected 1 or more each way")


def _check_tokens(x: Tensor, dim: int, count: int, hw: Size) -> None:
    if x.ndim != 3 or x.shape[2] != dim or not x.is_floating_point():
        given = f"input of shape {tuple(x.shape)} and type {x.dtype}"
        raise UserError(f"{given}: expected floating-point numbers of shape (batch, tokens, {dim})")
    if x.shape[1] != count:
        raise UserError(f"{x.shape[1]} tokens are no map of {hw[0]}x{hw[1]} ({count} tokens): give hw=(height, width)")


class FocusedLinearAttention(Focused):
    """Multi-head focused linear attention over the tokens of a map, a drop-in for softmax self-attention.

    phi(q) (phi(k)^T v) costs O(tokens * dim^2 / heads); a depthwise convolution of the values restores the rank that
    linear attention lacks (Han et al. 2023, section 3). Swin and DeiT use it; the state-dict keys are the authors'.

    Args:
        dim: channels, a multiple of `num_heads`.
        num_heads: heads.
        input_size: height and width of the map; the positional encoding is resampled where a call's is another.
        focusing_factor: p of the feature map, above 0.
        kernel_size: side of the depthwise convolution, odd.
        denominator: "mean" (current release) or "sum" (first release, that of the published figures).
        qkv_bias: whether the projection of q, k and v has a bias.
        attn_drop: accepted and never applied, as in the reference.
        proj_drop: dropout behind the output projection.
        prefix_tokens: class tokens before the map.

    Raises:
        UserError: a number is impossible; from `forward`: the tokens do not fit `dim` and `hw`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        input_size: Size = (14, 14),
        focusing_factor: Number = 3,
        kernel_size: int = 5,
        denominator: str = "mean",
        qkv_bias: bool = True,
        attn_drop: float = 0.0,  # noqa: ARG002 - see above
        proj_drop: float = 0.0,
        prefix_tokens: int = 0,
    ) -> None:
        super().__init__(dim, num_heads, input_size, focusing_factor, kernel_size, denominator, prefix_tokens)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self, x: Tokens, hw: Size | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tokens:
        """Tokens (batch, prefix + height * width, dim), row-major, to tokens of the same shape.

        `attn_mask` and `is_causal` are there because timm's blocks pass them; a mask is refused.
        """
        if attn_mask is not None or is_causal:
            given = f"attn_mask of type {type(attn_mask).__name__} and is_causal={is_causal}"
            raise UserError(f"{given}: linear attention sums its keys once for all queries, pass None and False")
        hw = hw or self.grid
        _check_tokens(x, self.scale.shape[2], self.prefix_tokens + hw[0] * hw[1], hw)
        check_finite("input", x)
        if _at_once(x, self.qkv, self.proj):
            dim = x.shape[2]
            query, key, value = (_rows(self.qkv, first, first + dim) for first in (0, dim, 2 * dim))
            out = self.attend_at_once(x, hw, query, key, value, self.proj)
        else:
            q, k, v = self.qkv(x).chunk(3, 2)
            out = self.proj(self.attend(q, k, v, hw))
        dropped: Tensor = self.proj_drop(out)
        return dropped


class PVTFocusedLinearAttention(Focused):
    """PVT's layer: keys and values may come from the map shrunk by a strided convolution.

    Where they do, the values are stretched back along the flattened token axis for the convolution, as the reference
    does. Arguments as for `FocusedLinearAttention`, and:

    Args:
        sr_ratio: factor of the reduction, a divisor of height and width; 1 for none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        input_size: Size = (14, 14),
        sr_ratio: int = 1,
        focusing_factor: Number = 3,
        kernel_size: int = 5,
        denominator: str = "mean",
        qkv_bias: bool = True,
        attn_drop: float = 0.0,  # noqa: ARG002 - accepted and never applied, as in the reference
        proj_drop: float = 0.0,
    ) -> None:
        check_reduction(input_size, sr_ratio)
        grid = (input_size[0] // sr_ratio, input_size[1] // sr_ratio)
        super().__init__(dim, num_heads, grid, focusing_factor, kernel_size, denominator)
        self.sr_ratio = sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(dim)

    def _reduced(self, hw: Size) -> Size:
        check_reduction(hw, self.sr_ratio)
        return hw[0] // self.sr_ratio, hw[1] // self.sr_ratio

    def set_input_size(self, hw: Size) -> None:
        """Resample the positional encoding to another map, given before its reduction."""
        super().set_input_size(self._reduced(hw))

    def forward(self, x: Tokens, hw: Size | None = None) -> Tokens:
        """Tokens (batch, height * width, dim), row-major, to tokens of the same shape."""
        hw = hw or (self.grid[0] * self.sr_ratio, self.grid[1] * self.sr_ratio)
        _check_tokens(x, self.scale.shape[2], hw[0] * hw[1], hw)
        check_finite("input", x)
        grid, dim = self._reduced(hw), x.shape[2]
        if self.sr_ratio == 1 and _at_once(x, self.q, self.kv, self.proj):
            projections = _rows(self.q, 0, dim), _rows(self.kv, 0, dim), _rows(self.kv, dim, 2 * dim)
            out = self.attend_at_once(x, hw, *projections, self.proj)
        else:
            shrunk = self.norm(to_tokens(self.sr(to_image(x, hw)))) if self.sr_ratio > 1 else x
            key, value = self.kv(shrunk).chunk(2, 2)
            out = self.proj(self.attend(self.q(x), key, value, hw, grid))
        dropped: Tensor = self.proj_drop(out)
        return dropped


class CSWinFocusedLinearAttention(Focused):
    """Branch of a CSWin block: attention inside each stripe, the shared convolution, and LePE; no projections.

    LePE is a second depthwise convolution, 3x3 with a kernel per channel, zero-padded at the stripe's borders as the
    first is; since both are linear in the values, one convolution with the sum of their kernels does both.

    Args:
        dim, num_heads: channels and heads of the branch.
        input_size: height and width of one stripe.
        focusing_factor, kernel_size, denominator: see `FocusedLinearAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        input_size: Size = (14, 14),
        focusing_factor: Number = 3,
        kernel_size: int = 5,
        denominator: str = "mean",
    ) -> None:
        super().__init__(dim, num_heads, input_size, focusing_factor, kernel_size, denominator)
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def kernels(self) -> tuple[Tensor, Tensor]:
        """Kernels and biases of both convolutions together, one per channel."""
        (weight, bias), (lepe, lepe_bias) = super().kernels(), self.get_v.parameters()
        side = max(weight.shape[2], lepe.shape[2])
        shared, own = (F.pad(kernel, ((side - kernel.shape[2]) // 2,) * 4) for kernel in (weight, lepe))
        return shared.repeat(self.num_heads, 1, 1, 1) + own, bias.repeat(self.num_heads) + lepe_bias

    def forward(
        self, qkv: Float[Tensor, "three stripes tokens channels"], hw: Size | None = None
    ) -> Float[Tensor, "stripes tokens channels"]:
        """Stacked q, k and v of the stripes, row-major inside, to the stripes' tokens."""
        hw = hw or self.grid
        if qkv.ndim != 4 or qkv.shape[0] != 3:
            raise UserError(f"qkv of shape {tuple(qkv.shape)}: expected (3, stripes, tokens, channels)")
        _check_tokens(qkv[0], self.scale.shape[2], hw[0] * hw[1], hw)
        check_finite("qkv", qkv)
        query, key, value = qkv.unbind(0)
        return self.attend(query, key, value, hw)
