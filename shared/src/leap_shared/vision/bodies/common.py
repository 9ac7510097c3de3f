"""What the four bodies share: timm's interface over four stages of blocks at strides 4, 8, 16 and 32."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Number, Size, Tokens, replace_data, resample_grid, to_image
from leap_shared.vision.bodies.parts import AttentionFactory, Block, Site, uses_attention

__all__ = ["Body", "Names", "build", "drop_computed", "pretrained_config"]


class Names(NamedTuple):
    """State-dict names of the parts of a stage; empty where the family has no such part."""

    blocks: str
    embedding: str  # image, or tokens of the stage before as an image, to tokens
    position: str = ""
    norm: str = ""  # closes the stage and belongs to its features


def _checked_size(img_size: int | Sequence[int]) -> Size:
    size: tuple[int, ...] = to_2tuple(img_size)
    if len(size) != 2 or any(side < 32 or side % 32 for side in size):
        given, near = ("x".join(map(str, sides)) for sides in (size, [max(32, (s + 16) // 32 * 32) for s in size]))
        raise UserError(f"image size {given}: height and width must be multiples of 32: resize or pad, say to {near}")
    return size[0], size[1]


class Body(nn.Module, ABC):
    """Backbone with timm's interface; a family names its parts, and makes embeddings and blocks.

    Arguments that timm's models have too mean the same. Those of its own:

    Args:
        dims, depths, num_heads, mlp_ratios: channels, blocks, heads, and width of the MLPs over the channels, by stage.
        attn_type: which blocks take `attention`, see `parts.uses_attention`.
        attention: makes the attention of the L blocks.
        dynamic_img_size: take every image size, resampling tables at each call.

    Raises:
        UserError: sizes, heads, depths or `attn_type` do not fit together.
    """

    first_conv: str
    """Name of the convolution that sees the image, for timm's adaptation to other numbers of channels."""
    norm_eps = 1e-5
    position_mode = "bicubic"
    applies_norm = True
    norm: nn.Module
    head: nn.Module

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratios: Sequence[Number],
        *,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_type: str = "SSSS",
        attention: AttentionFactory | None = None,
        dynamic_img_size: bool = False,
    ) -> None:
        super().__init__()
        given = {"dims": dims, "depths": depths, "num_heads": num_heads, "mlp_ratios": mlp_ratios}
        for name, numbers in given.items():
            if len(numbers) != 4 or min(numbers) <= 0:
                raise UserError(f"{name} {numbers}: expected four positive numbers, one per stage")
        plugged = uses_attention(attn_type, depths)
        if attention is None and any(map(any, plugged)):
            raise UserError(f"attn_type {attn_type!r} has L blocks, but no attention was given for them")
        self.img_size = _checked_size(img_size)
        self.dims, self.in_chans, self.num_features, self.num_stages = tuple(dims), in_chans, dims[-1], 4
        self.attention, self.dynamic_img_size, self.grad_checkpointing = attention, dynamic_img_size, False
        self.num_classes, self.global_pool, self.head_drop = num_classes, global_pool, nn.Dropout(drop_rate)
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist())
        self.sites = [
            Site(
                *(stage, block, dims[stage], num_heads[stage], self._map_size(stage)),
                plugged=plugged[stage][block],
                qkv_bias=qkv_bias,
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
                drop_path=next(rates),
                mlp_ratio=mlp_ratios[stage],
                norm_eps=self.norm_eps,
            )
            for stage in range(4)
            for block in range(depths[stage])
        ]

    def _assemble(self) -> None:
        self.feature_info = []
        for stage, dim in enumerate(self.dims):
            names, (height, width), norm = self._names(stage), self._map_size(stage), nn.LayerNorm(dim, self.norm_eps)
            self._put(names.embedding, self._embedding(stage, self.dims[stage - 1] if stage else self.in_chans, dim))
            self._put(names.blocks, nn.ModuleList(self._block(site) for site in self.sites if site.stage == stage))
            if names.position:
                table = trunc_normal_(nn.Parameter(torch.empty(1, height * width, dim)), std=0.02)
                self.register_parameter(names.position, table)
            if names.norm:
                self._put(names.norm, norm)
            self.feature_info.append({"num_chs": dim, "reduction": 4 << stage, "module": names.blocks})
        self.norm = nn.Identity() if names.norm else norm
        self.norm.requires_grad_(self.applies_norm)
        self.apply(self._init_weights)
        self.reset_classifier(self.num_classes, self.global_pool)

    def _put(self, name: str, part: nn.Module | None) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.get_submodule(parent), leaf, part)

    @abstractmethod
    def _names(self, stage: int) -> Names: ...

    @abstractmethod
    def _embedding(self, stage: int, in_dim: int, dim: int) -> nn.Module: ...

    @abstractmethod
    def _block(self, site: Site) -> Block: ...

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def _map_size(self, stage: int, image_size: Size | None = None) -> Size:
        height, width = image_size or self.img_size
        return height // (4 << stage), width // (4 << stage)

    def _run_stage(self, stage: int, x: Tensor, image_size: Size) -> Tensor:
        names, hw = self._names(stage), self._map_size(stage, image_size)
        image = to_image(x, self._map_size(stage - 1, image_size)) if stage else x
        x = self.get_submodule(names.embedding)(image)
        if names.position:
            table = self.get_parameter(names.position)
            x = x + resample_grid(table, self._map_size(stage), hw, self.position_mode)
        for block in self.get_submodule(names.blocks).children():
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, hw, use_reentrant=False)
            else:
                x = block(x, hw)
        return self.get_submodule(names.norm)(x) if names.norm else x

    def _finish(self, x: Tensor, stage: int) -> Tensor:
        return self.norm(x) if stage == 3 and self.applies_norm else x

    def _size_of(self, image: Tensor) -> Size:
        if image.ndim != 4 or image.shape[1] != self.in_chans or not image.is_floating_point():
            expected = f"expected floating-point numbers of shape (batch, {self.in_chans}, height, width)"
            raise UserError(f"image of shape {tuple(image.shape)} and type {image.dtype}: {expected}")
        size = (image.shape[2], image.shape[3])
        if size != self.img_size:
            _checked_size(size)
        if size != self.img_size and not self.dynamic_img_size:
            given, own = (f"{height}x{width}" for height, width in (size, self.img_size))
            advice = f"call set_input_size({size}), or create it with dynamic_img_size=True"
            raise UserError(f"image of {given} pixels, but the model is set to {own}: {advice}")
        return size

    def forward_features(self, x: Tensor) -> Tokens:
        """Image (batch, channels, height, width) -> the tokens that the head pools."""
        size = self._size_of(x)
        for stage in range(self.num_stages):
            x = self._run_stage(stage, x, size)
        return self._finish(x, self.num_stages - 1)

    def forward_head(self, x: Tokens, pre_logits: bool = False) -> Tensor:
        """Tokens -> logits (batch, classes), or the pooled vector with `pre_logits`."""
        x = self.head_drop(x.mean(1) if self.global_pool else x)
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
        """Feature maps (batch, channels, height, width) of the stages `indices`, and the tokens after the last stage.

        Only the last map can have the final `norm`. An int takes that many last stages, None takes all.
        """
        if output_fmt != "NCHW":
            raise UserError(f"output_fmt {output_fmt!r}: only 'NCHW' is offered")
        chosen, last = feature_take_indices(self.num_stages, indices)
        size, maps, stage = self._size_of(x), [], 0
        for stage in range(last + 1 if stop_early or intermediates_only else self.num_stages):
            x = self._run_stage(stage, x, size)
            if stage in chosen:
                tokens = self._finish(x, stage) if norm else x
                maps.append(to_image(tokens, self._map_size(stage, size)).contiguous())
        return maps if intermediates_only else (self._finish(x, stage), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop all that the chosen stages do not need; returns their indices."""
        chosen, last = feature_take_indices(self.num_stages, indices)
        shorter = last + 1 < self.num_stages
        for stage in range(last + 1, self.num_stages):
            for name in filter(None, self._names(stage)):
                self._put(name, None)
        self.num_stages, self.num_features = last + 1, self.dims[last]
        if prune_norm or shorter:
            self.norm = nn.Identity()
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return list(chosen)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new head for `num_classes` classes; none for 0."""
        if num_classes < 0 or global_pool not in {"avg", "", None}:
            raise UserError(f"num_classes {num_classes}, global_pool {global_pool!r}: expected >= 0, and 'avg' or ''")
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        like = next(self.parameters())
        head = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype) if num_classes else None
        self.head, self.head_hidden_size = head or nn.Identity(), self.num_features
        self._init_weights(self.head)

    def set_input_size(self, img_size: int | Sequence[int]) -> None:
        """Set another image size once: tables are resampled in place, the parameters stay the same objects."""
        size = _checked_size(img_size)
        for stage in range(self.num_stages):
            names, hw = self._names(stage), self._map_size(stage, size)
            if names.position:
                table = self.get_parameter(names.position)
                replace_data(table, resample_grid(table, self._map_size(stage), hw, self.position_mode))
            for block in self.get_submodule(names.blocks).children():
                cast("Block", block).set_input_size(hw)
        self.img_size = size

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order parameters by depth, for layer-wise learning rates."""
        groups: dict[str, Any] = {}
        for stage in range(self.num_stages):
            names = self._names(stage)
            entry = "|".join(filter(None, (names.embedding, names.position)))
            groups[f"entry{stage + 1}" if stage else "stem"] = rf"^(?:{entry})(?:\.|$)"
            closing = names.norm or ("norm" if stage == 3 else "")
            inside = [(rf"^{names.blocks}\.(\d+)", None), (rf"^{closing}\.", (99999,))]
            groups[f"blocks{stage + 1}"] = rf"^(?:{names.blocks}|{closing})\." if coarse else inside
        return groups

    def no_weight_decay(self) -> set[str]:
        """Names of the tables that are not decayed, beside all vectors."""
        spared = ("relative_position_bias_table", "absolute_pos_embed")
        return {name for name, _ in self.named_parameters() if name.endswith(spared)}


def drop_computed(state: Mapping[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """State dict without the index tables and masks of official checkpoints, which the models compute themselves."""
    del model  # timm passes it to filters of checkpoints
    return {key: value for key, value in state.items() if not key.endswith(("relative_position_index", "attn_mask"))}


def pretrained_config(body: type[Any], **changes: Any) -> dict[str, Any]:
    """What timm wants to know of a variant: size, preprocessing, names of first (`body.first_conv`) and last layer."""
    defaults = {"num_classes": 1000, "input_size": (3, 224, 224), "fixed_input_size": True, "pool_size": (7, 7)}
    pictures = {"crop_pct": 0.9, "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return {**defaults, **pictures, "first_conv": body.first_conv, "classifier": "head", **changes}


def build(body: type[nn.Module], variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """What a function registered with timm returns: the model, or with `features_only` a pyramid for every size."""
    if kwargs.get("features_only"):
        kwargs.setdefault("dynamic_img_size", True)
    pyramid = {"out_indices": kwargs.pop("out_indices", (0, 1, 2, 3)), "feature_cls": "getter"}
    model: nn.Module = build_model_with_cfg(
        body, variant, pretrained, pretrained_filter_fn=drop_computed, feature_cfg=pyramid, **kwargs
    )
    return model
