"""What all bodies are built of: the place of an attention, embeddings by convolution, the pre-norm block."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Number, Size, Tokens, to_tokens

__all__ = ["AttentionFactory", "Block", "Site", "conv_embed", "resize", "uses_attention"]


@dataclass(frozen=True)
class Site:
    """Place of a block, and all that its attention may need to know of it."""

    stage: int
    block: int
    dim: int
    num_heads: int
    input_size: Size
    """Height and width, in tokens, of what one call sees: the map, or one window or stripe of it."""
    plugged: bool = False
    """Whether the attention of a package goes here."""
    branch: int = 0
    """Of CSWin: 0 for stripes of full height or the whole map, 1 for stripes of full width."""
    sr_ratio: int = 1
    """Of PVT: keys and values come from a map that is smaller by this factor."""
    qkv_bias: bool = True
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    mlp_ratio: Number = 4
    drop_path: float = 0.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.dim < 1 or self.num_heads < 1 or self.dim % self.num_heads:
            where = f"stage {self.stage + 1}: {self.dim} channels and {self.num_heads} heads"
            raise UserError(f"{where}: the channels must be a multiple of the heads")


AttentionFactory = Callable[[Site], nn.Module]
"""Makes the attention of one site: a module called with ``(tokens, hw)`` that returns tokens of the same shape.

Tokens are (batch, height * width, dim), row-major. A module whose parameters depend on the size has
``set_input_size(hw)``, which resamples them in place, and resamples on the fly where a call's `hw` is another one.
The body initialises the module's linear layers (PVTv2: and its convolutions that are not frozen) as it does its own.
"""


def uses_attention(attn_type: str, depths: Sequence[int]) -> list[list[bool]]:
    """Which blocks of each stage take the plugged-in attention, from a string such as ``LLSS``.

    One letter per stage: L all blocks, S none (softmax), M mixed: the number after the letters says how many leading
    blocks of the M stages take it (``LLMS2``). Anything else raises UserError.
    """
    match = re.fullmatch(rf"([LSM]{{{len(depths)}}})(\d*)", attn_type)
    if match is None or ("M" in match[1]) != bool(match[2]):
        raise UserError(
            f"attn_type {attn_type!r}: expected {len(depths)} letters out of L, S and M, and after them, if there is "
            "an M, the number of leading L blocks of the M stages, as in LLMS2"
        )
    leading = {"L": max(depths), "S": 0, "M": int(match[2] or 0)}
    return [[block < leading[letter] for block in range(depth)] for letter, depth in zip(match[1], depths, strict=True)]


def resize(attention: nn.Module, hw: Size) -> None:
    """Call `set_input_size` of an attention that has it."""
    method = getattr(attention, "set_input_size", None)
    if method is not None:
        method(hw)


class _ToTokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return to_tokens(x)


def conv_embed(in_dim: int, dim: int, kernel: int, stride: int, padding: int, names: Sequence[str]) -> nn.Sequential:
    """Image to normalised tokens by a convolution; `names` are those of convolution, reshape and norm."""
    layers = (nn.Conv2d(in_dim, dim, kernel, stride, padding), _ToTokens(), nn.LayerNorm(dim))
    return nn.Sequential(OrderedDict(zip(names, layers, strict=True)))


class TokenMlp(Mlp):  # type: ignore[misc] # timm's layers are untyped
    """timm's MLP, told the size of the map for those of its kind that look at neighbours."""

    def forward(self, x: Tokens, hw: Size) -> Tokens:  # noqa: ARG002 - for subclasses
        """Tokens to tokens of the same shape."""
        out: Tensor = super().forward(x)
        return out


class Block(nn.Module):
    """Pre-norm block: x + attention(norm1(x)), then x + mlp(norm2(x)), each with stochastic depth."""

    mlp_class: type[TokenMlp] = TokenMlp

    def __init__(self, site: Site, attn: nn.Module | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(site.dim, site.norm_eps)
        if attn is not None:
            self.attn = attn
        self.drop_path1: nn.Module = DropPath(site.drop_path) if site.drop_path else nn.Identity()
        self.norm2 = nn.LayerNorm(site.dim, site.norm_eps)
        self.mlp: nn.Module = self.mlp_class(site.dim, int(site.dim * site.mlp_ratio), drop=site.proj_drop)
        self.drop_path2: nn.Module = DropPath(site.drop_path) if site.drop_path else nn.Identity()

    def attend(self, x: Tokens, hw: Size) -> Tokens:
        """The attention, over the whole map unless a family says otherwise."""
        out: Tensor = self.attn(x, hw)
        return out

    def set_input_size(self, hw: Size) -> None:
        """Resample what depends on the size of the map."""
        resize(self.attn, hw)

    def forward(self, x: Tokens, hw: Size) -> Tokens:
        """Tokens of a map of height and width `hw` to tokens of the same shape."""
        x = x + self.drop_path1(self.attend(self.norm1(x), hw))
        y: Tensor = self.drop_path2(self.mlp(self.norm2(x), hw))
        return x + y
