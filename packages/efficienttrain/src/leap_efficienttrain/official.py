"""Names of parameters: those of the released code, and timm's, each from the other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from leap_shared.checkpoints import rename

__all__ = ["COMPUTED", "family_of", "official_name", "official_names", "official_state", "timm_names"]

COMPUTED = ("relative_position_index", "attn_mask")
"""Endings of the names of what Swin computes from its image size."""

Rows = tuple[tuple[str, str], ...]
# (regular expression, replacement), applied in this order to every name
TO_TIMM: dict[str, Rows] = {
    "swin": (
        *((rf"^layers\.{stage}\.downsample\.", f"layers.{stage + 1}.downsample.") for stage in (2, 1, 0)),
        (r"^head\.", "head.fc."),
    ),
    "convnext": (
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"^downsample_layers\.0\.", "stem."),
        (r"^downsample_layers\.(\d+)\.", r"stages.\1.downsample."),
        (r"\.dwconv\.", ".conv_dw."),
        (r"\.pwconv(\d)\.", r".mlp.fc\1."),
        (r"^head\.", "head.fc."),
        (r"^norm\.", "head.norm."),
    ),
    "caformer": (
        (r"^stages\.(\d+)\.(\d+)\.", r"stages.\1.blocks.\2."),
        (r"^downsample_layers\.0\.conv\.", "stem.conv."),
        (r"^downsample_layers\.0\.post_norm\.", "stem.norm."),
        (r"^downsample_layers\.(\d+)\.conv\.", r"stages.\1.downsample.conv."),
        (r"^downsample_layers\.(\d+)\.pre_norm\.", r"stages.\1.downsample.norm."),
        (r"^head\.", "head.fc."),
        (r"^norm\.", "head.norm."),
    ),
}
TO_OFFICIAL: dict[str, Rows] = {
    "swin": (
        *((rf"^layers\.{stage}\.downsample\.", f"layers.{stage - 1}.downsample.") for stage in (1, 2, 3)),
        (r"^head\.fc\.", "head."),
    ),
    "convnext": (
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
        (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    ),
    "caformer": (
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
        (r"^stages\.(\d+)\.downsample\.norm\.", r"downsample_layers.\1.pre_norm."),
        (r"^stages\.(\d+)\.downsample\.conv\.", r"downsample_layers.\1.conv."),
        (r"^stem\.norm\.", "downsample_layers.0.post_norm."),
        (r"^stem\.conv\.", "downsample_layers.0.conv."),
        (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    ),
}
# one name that tells the layout, or the family where both layouts are the same
MARKS = {
    "stage1_conv_embed.0.weight": ("cswin", ""),
    "layers.0.downsample.reduction.weight": ("swin", "official"),
    "layers.1.blocks.0.attn.relative_position_bias_table": ("swin", "timm"),
    "stages.0.0.pwconv1.weight": ("convnext", "official"),
    "stages.0.blocks.0.conv_dw.weight": ("convnext", "timm"),
    "downsample_layers.0.post_norm.weight": ("caformer", "official"),
    "stages.0.blocks.0.token_mixer.pwconv1.weight": ("caformer", "timm"),
    "layer1.0.conv1.weight": ("resnet", ""),
    "blocks.0.attn.qkv.weight": ("deit", ""),
}
LINEAR = re.compile(r"\.(pwconv\d|mlp\.fc\d)\.weight$")  # of CAFormer: 1x1 convolutions in timm


def family_of(names: Iterable[str]) -> tuple[str, str]:
    """Family that a state of these names belongs to, and whose names they are.

    Returns:
        resnet, convnext, deit, swin, cswin, caformer, or nothing; and "official", "timm", or nothing where both agree.
    """
    given = set(names)
    return next((found for mark, found in MARKS.items() if mark in given), ("", ""))


def official_name(name: str, family: str) -> str:
    """The released code's name of timm's parameter."""
    for pattern, replacement in TO_OFFICIAL.get(family, ()):
        name = re.sub(pattern, replacement, name)
    return name


def timm_names(state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A state under timm's names, whichever it has; `shapes` are those of timm's model, for its 1x1 convolutions."""
    family, layout = family_of(state)
    named = rename(state, TO_TIMM[family]) if layout == "official" else dict(state)
    if family != "caformer":
        return named
    convolved = {name for name, shape in shapes.items() if shape[2:] == (1, 1)}
    return {
        name: value[..., None, None] if name in convolved and value.ndim == 2 else value
        for name, value in named.items()
    }


def official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state under the released code's names, whichever it has."""
    family, layout = family_of(state)
    named = rename(state, TO_OFFICIAL[family]) if layout == "timm" else dict(state)
    if family != "caformer":
        return named
    return {name: value.flatten(1) if LINEAR.search(name) else value for name, value in named.items()}


def official_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state under the released code's names, with the index tables and masks that it has for Swin."""
    computed = {name: value for name, value in model.named_buffers() if name.endswith(COMPUTED)}
    return official_names({**model.state_dict(), **computed})
