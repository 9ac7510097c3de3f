"""FLatten-DeiT, derived: the authors publish results of it and no code; DeiT with linear attention in every block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.layers import PatchEmbed, to_2tuple, trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leap_flatten.functional import check_finite
from leap_flatten.models.common import swin_attention
from leap_shared.errors import UserError
from leap_shared.vision.bodies import Block, Site, build, pretrained_config
from leap_shared.vision.bodies.grids import Number, Size, Tokens, replace_data, resample_grid, to_image

__all__ = ["FlattenDeiT"]


class FlattenDeiT(nn.Module):
    """DeiT with focused linear attention in every block, and timm's interface.

    The class token takes part in the attention and has a row of the positional encoding, but is no part of the map
    that is convolved. Maps of features (`forward_intermediates`, `features_only`) are those of blocks, at one stride.

    Args:
        img_size: height and width in pixels, multiples of `patch_size`.
        patch_size: side of the patches.
        embed_dim, depth, num_heads, mlp_ratio: channels, blocks, heads, and width of the MLPs over the channels.
        in_chans, num_classes, qkv_bias: as in timm.
        global_pool: "token" for the class token, "avg" for the mean of the others, "" for neither.
        drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: dropout and stochastic depth, as in timm.
        focusing_factor, kernel_size, denominator: see `leap_flatten.FocusedLinearAttention`.
        dynamic_img_size: take every image size, resampling tables at each call.

    Raises:
        UserError: sizes or heads do not fit together.
    """

    first_conv = "patch_embed.proj"

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: Number = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        focusing_factor: Number = 3,
        kernel_size: int = 5,
        denominator: str = "mean",
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size, self.in_chans, self.num_features = patch_size, in_chans, embed_dim
        self.img_size = self._checked(to_2tuple(img_size))
        self.num_classes, self.global_pool, self.head_drop = num_classes, global_pool, nn.Dropout(drop_rate)
        self.dynamic_img_size, self.grad_checkpointing = dynamic_img_size, False
        self.grid = self._grid(self.img_size)
        make = swin_attention(focusing_factor, kernel_size, denominator, prefix_tokens=1)
        self.patch_embed = PatchEmbed(None, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], embed_dim))
        blocks = []
        for index, rate in enumerate(torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()):
            drops = {"attn_drop": attn_drop_rate, "proj_drop": proj_drop_rate, "drop_path": rate}
            place: dict[str, Any] = {"qkv_bias": qkv_bias, "mlp_ratio": mlp_ratio, "norm_eps": 1e-6, **drops}
            site = Site(0, index, embed_dim, num_heads, self.grid, plugged=True, **place)
            blocks.append(Block(site, make(site)))
        self.blocks = nn.ModuleList(blocks)
        self.norm: nn.Module = nn.LayerNorm(embed_dim, 1e-6)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{index}"} for index in range(depth)
        ]
        trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        self.apply(self._init_weights)
        self.reset_classifier(num_classes, global_pool)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _checked(self, size: Size) -> Size:
        if any(side < self.patch_size or side % self.patch_size for side in size):
            given = "x".join(map(str, size))
            raise UserError(f"image size {given}: height and width must be multiples of the patches' {self.patch_size}")
        return size[0], size[1]

    def _grid(self, size: Size) -> Size:
        return size[0] // self.patch_size, size[1] // self.patch_size

    def _position(self, grid: Size) -> Tensor:
        token, places = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        return torch.cat((token, resample_grid(places, self.grid, grid)), 1)

    def _embed(self, image: Tensor) -> tuple[Tokens, Size]:
        if image.ndim != 4 or image.shape[1] != self.in_chans or not image.is_floating_point():
            expected = f"expected floating-point numbers of shape (batch, {self.in_chans}, height, width)"
            raise UserError(f"image of shape {tuple(image.shape)} and type {image.dtype}: {expected}")
        check_finite("image", image)
        size = (image.shape[2], image.shape[3])
        if size != self.img_size:
            self._checked(size)
            if not self.dynamic_img_size:
                given, own = (f"{height}x{width}" for height, width in (size, self.img_size))
                advice = f"call set_input_size({size}), or create it with dynamic_img_size=True"
                raise UserError(f"image of {given} pixels, but the model is set to {own}: {advice}")
        grid = self._grid(size)
        tokens = self.patch_embed(image)
        tokens = torch.cat((self.cls_token.expand(tokens.shape[0], -1, -1), tokens), 1)
        return tokens + (self.pos_embed if grid == self.grid else self._position(grid)), grid

    def _block(self, index: int, x: Tokens, grid: Size) -> Tokens:
        if self.grad_checkpointing and self.training:
            out: Tensor = checkpoint(self.blocks[index], x, grid, use_reentrant=False)
        else:
            out = self.blocks[index](x, grid)
        return out

    def forward_features(self, x: Tensor) -> Tokens:
        """Image (batch, channels, height, width) -> normalised tokens, the class token first."""
        x, grid = self._embed(x)
        for index in range(len(self.blocks)):
            x = self._block(index, x, grid)
        out: Tensor = self.norm(x)
        return out

    def forward_head(self, x: Tokens, pre_logits: bool = False) -> Tensor:
        """Tokens -> logits (batch, classes), or the pooled vector with `pre_logits`."""
        if self.global_pool:
            x = x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Image (batch, channels, height, width) -> logits (batch, classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps (batch, channels, height, width) of the blocks `indices`, and the tokens after the last block.

        `norm` applies the final norm to every map. An int takes that many last blocks, None takes all.
        """
        if output_fmt != "NCHW":
            raise UserError(f"output_fmt {output_fmt!r}: only 'NCHW' is offered")
        chosen, last = feature_take_indices(len(self.blocks), indices)
        maps = []
        x, grid = self._embed(x)
        for index in range(last + 1 if stop_early or intermediates_only else len(self.blocks)):
            x = self._block(index, x, grid)
            if index in chosen:
                maps.append(to_image((self.norm(x) if norm else x)[:, 1:], grid).contiguous())
        return maps if intermediates_only else (self.norm(x), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop all that the chosen blocks do not need; returns their indices."""
        chosen, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return list(chosen)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new head for `num_classes` classes; none for 0."""
        if num_classes < 0 or global_pool not in {"token", "avg", "", None}:
            expected = "expected >= 0, and 'token', 'avg' or ''"
            raise UserError(f"num_classes {num_classes}, global_pool {global_pool!r}: {expected}")
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        like = self.cls_token
        head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype) if num_classes else None
        self.head, self.head_hidden_size = head or nn.Identity(), self.num_features
        self._init_weights(self.head)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Set another image size once: tables are resampled in place, the parameters stay the same objects."""
        size = self._checked(to_2tuple(img_size))
        grid = self._grid(size)
        replace_data(self.pos_embed, self._position(grid))
        for block in self.blocks.children():
            cast("Block", block).set_input_size(grid)
        self.img_size, self.grid = size, grid

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order parameters by depth, for layer-wise learning rates."""
        inside = [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))]
        return {
            "stem": r"^(?:cls_token|pos_embed|patch_embed)",
            "blocks": r"^(?:blocks|norm)\." if coarse else inside,
        }

    def no_weight_decay(self) -> set[str]:
        """Names of the tables that are not decayed, beside all vectors."""
        return {"pos_embed", "cls_token"}


default_cfgs = generate_default_cfgs({"flatten_deit_tiny": pretrained_config(FlattenDeiT, pool_size=None)})


@register_model
def flatten_deit_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """FLatten-DeiT-T (derived): 6.2M parameters, 1.1 GMAC, top-1 74.1 in the paper, whose code is unreleased."""
    return build(FlattenDeiT, "flatten_deit_tiny", pretrained, **{"out_indices": (2, 5, 8, 11), **kwargs})
