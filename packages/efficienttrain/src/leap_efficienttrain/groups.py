"""Parameter groups as the released code makes them: what is decayed, and smaller rates for earlier layers."""

from __future__ import annotations

import math
import re
from typing import Any

from timm.optim import param_groups_layer_decay
from timm.utils import unwrap_model
from torch import nn

from leap_efficienttrain.official import family_of, official_name
from leap_shared.errors import UserError
from leap_shared.vision.bodies.grids import Number

__all__ = ["named_groups", "param_groups"]

CONVNEXT_LAYERS, CONVNEXT_EMBEDDINGS = 12, (0, 2, 3, 12)
CSWIN_LAYERS, CSWIN_MERGES = 20, (2, 4, 20)


def param_groups(model: nn.Module, *, weight_decay: Number, layer_decay: Number | None = None) -> list[dict[str, Any]]:
    """Groups for an optimiser: vectors, biases and the tables that the model spares are not decayed; Swin's biases are.

    With `layer_decay` d, layer i of n + 1 learns at d^(n + 1 - i) of the rate, which each group holds as `lr_scale`, as
    timm's schedulers and `leap_efficienttrain` take it: by the papers' tables for CSWin (n = 20) and ConvNeXt (n = 12),
    by timm's order of layers for all other models. Frozen parameters are left out.

    Args:
        model: timm's or one's own, or wrapped by DistributedDataParallel, torch.compile or an EMA.
        weight_decay: of weights and of Swin's relative position biases.
        layer_decay: d in (0, 1]; None for the same rate everywhere.

    Returns:
        Dictionaries of `params`, `weight_decay` and `lr_scale`, in the order in which the parameters appear.

    Raises:
        UserError: a number is out of its range, or no parameter is to be trained.
    """
    parameters = dict(unwrap_model(model).named_parameters())
    groups = _groups(model, weight_decay, layer_decay)
    return [{**group, "params": [parameters[name] for name in group["params"]]} for group in groups]


def named_groups(model: nn.Module, *, weight_decay: Number, layer_decay: Number | None = None) -> list[dict[str, Any]]:
    """The same groups with the released code's names in place of the parameters."""
    groups = _groups(model, weight_decay, layer_decay)
    family, layout = family_of(name for name, _ in unwrap_model(model).named_parameters())
    if layout != "timm":
        return groups
    return [{**group, "params": [official_name(name, family) for name in group["params"]]} for group in groups]


def _groups(model: nn.Module, weight_decay: Number, layer_decay: Number | None) -> list[dict[str, Any]]:
    model = unwrap_model(model)
    if not 0 <= weight_decay < math.inf:
        raise UserError(f"weight_decay {weight_decay}: expected a number >= 0")
    if layer_decay is not None and not 0 < layer_decay <= 1:
        raise UserError(f"layer_decay {layer_decay}: expected a number in (0, 1], such as 0.9")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise UserError(f"{type(model).__name__} has no parameter that requires a gradient: unfreeze some")
    layers, spared = _layers(model, layer_decay), _spared(model)
    groups: dict[tuple[Number, bool], dict[str, Any]] = {}
    for name, parameter in trained.items():
        decayed = parameter.ndim > 1 and not name.endswith(".bias") and name not in spared
        layer, scale = layers.get(name, (0, 1.0))
        empty = {"params": [], "weight_decay": float(weight_decay) if decayed else 0.0, "lr_scale": scale}
        groups.setdefault((layer, decayed), empty)["params"].append(name)
    return list(groups.values())


def _spared(model: nn.Module) -> set[str]:
    """Names that the model itself does not want decayed; timm spares Swin's biases too, the released code does not."""
    own: Any = getattr(model, "no_weight_decay", set)
    return {name for name in own() if not name.endswith("relative_position_bias_table")}


def _layers(model: nn.Module, layer_decay: Number | None) -> dict[str, tuple[Number, float]]:
    """What tells a parameter's layer from the others, and the layer's scale of the rate."""
    if layer_decay is None:
        return {}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    family, _ = family_of(names.values())
    if family == "cswin":
        layers = {name: (_cswin_layer(name), CSWIN_LAYERS) for name in names.values()}
    elif family == "convnext":
        layers = {name: (_convnext_layer(official_name(name, family)), CONVNEXT_LAYERS) for name in names.values()}
    else:
        groups = param_groups_layer_decay(model, layer_decay=layer_decay)
        scales = {names[id(p)]: float(group["lr_scale"]) for group in groups for p in group["params"]}
        return {name: (scale, scale) for name, scale in scales.items()}
    return {name: (layer, float(layer_decay ** (count + 1 - layer))) for name, (layer, count) in layers.items()}


def _cswin_layer(name: str) -> int:
    """0 to 21: the first embedding, the blocks in pairs with the embedding before them, norm and head."""
    match = re.match(r"(stage1_conv_embed)|merge(\d)|stage(\d)\.(\d+)\.", name)
    if match is None:
        return CSWIN_LAYERS + 1
    embedding, merge, stage, block = match.groups()
    if embedding:
        return 0
    if merge:
        return CSWIN_MERGES[int(merge) - 1]
    return (1, *CSWIN_MERGES)[int(stage) - 1] + int(block) // 2


def _convnext_layer(name: str) -> int:
    """0 to 13: stem, first two stages, third stage in threes, last stage, norm and head."""
    match = re.match(r"(downsample_layers|stages)\.(\d)\.(\d+)", name)
    if match is None:
        return CONVNEXT_LAYERS + 1
    part, stage, block = match[1], int(match[2]), int(match[3])
    if part == "downsample_layers":
        return CONVNEXT_EMBEDDINGS[stage]
    return (1, 2, 3 + block // 3, 12)[stage]
