"""Weights in other files, and models that are folded for inference."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leap_flatten.attention import CSWinFocusedLinearAttention, Focused, FocusedLinearAttention
from leap_flatten.checkpoints import OFFICIAL
from leap_flatten.functional import EPSILON
from leap_flatten.ops.reference import widest
from leap_shared.errors import UserError
from leap_shared.vision.bodies import CSWinBlock
from leap_shared.vision.official import SUFFIXES, Conversion

__all__ = ["SUFFIXES", "Conversion", "convert", "fuse_for_inference"]

Module = TypeVar("Module", bound=nn.Module)
convert = OFFICIAL.convert


def fuse_for_inference(model: Module) -> Module:
    """A copy of a model or layer that gives the same in fewer steps, in eval mode and without gradients.

    1 / softplus(scale), which queries and keys are multiplied by behind their ReLU, moves into the rows of their
    projections and into the positional encoding: relu(x) g + floor = max(x g + floor, floor) with g > 0. Rounding apart
    (about 4e-7 of the largest output) nothing changes, and every image size goes on working. The model given stays as
    it was; of one that is folded already the copy is the same.

    The state dict of the copy has `floor` (1e-6 / softplus(scale) of each channel) in place of `scale`: neither loads
    into a model of the other kind, so load and save weights before.

    Raises:
        UserError: a projection is no plain linear layer, or a CSWin branch is given without its block, which has them.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    for module in fused.modules():
        if isinstance(module, CSWinBlock):
            branches = [attn for attn in module.attns if isinstance(attn, Focused) and attn.floor is None]
            if branches:
                _fold(branches, [(module.qkv, 2)])
    for name, module in fused.named_modules():
        if not isinstance(module, Focused) or module.floor is not None:
            continue
        if isinstance(module, CSWinFocusedLinearAttention):
            where = name or "this branch"
            raise UserError(
                f"{where} has no projections to fold its scale into: give the CSWinBlock that it is part of"
            )
        packed = isinstance(module, FocusedLinearAttention)
        _fold([module], [(module.qkv, 2)] if packed else [(module.q, 1), (module.kv, 1)])
    return fused


def _fold(layers: list[Any], projections: list[tuple[Any, int]]) -> None:
    """Fold scales into linear layers whose first outputs are, once or twice, the layers' channels side by side."""
    for linear, _ in projections:
        if type(linear) is not nn.Linear:
            raise UserError(f"a projection is a {type(linear).__name__}: fold before layers are wrapped or quantised")
    gains = [1 / F.softplus(layer.scale.flatten().to(widest(layer.scale.dtype))) for layer in layers]
    for linear, times in projections:
        gain = torch.cat(gains).repeat(times)
        rows = len(gain)
        bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
        bias[:rows] = bias[:rows] * gain + EPSILON * gain
        linear.bias = nn.Parameter(bias, requires_grad=False)
        linear.weight[:rows] = linear.weight[:rows] * gain[:, None]
    for layer, gain in zip(layers, gains, strict=True):
        layer.positional_encoding.copy_(layer.positional_encoding * gain)
        scale = layer.scale.detach()
        del layer.scale
        layer.register_buffer("scale", scale, persistent=False)  # tells the number of channels, and what was folded
        layer.register_buffer("floor", EPSILON * gain)
        layer.register_load_state_dict_pre_hook(_refuse_scale)


def _refuse_scale(_: nn.Module, state: Mapping[str, Tensor], prefix: str, *__: object) -> None:
    if f"{prefix}scale" in state:
        raise UserError(f"{prefix}scale is folded into the projections of this model: load the weights, then fold")
