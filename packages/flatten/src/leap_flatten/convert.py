"""Weights in other files, and models that are folded for inference."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leap_flatten.attention import CSWinFocusedLinearAttention, Focused, FocusedLinearAttention
from leap_flatten.checkpoints import read_official, variants_of
from leap_flatten.functional import EPSILON
from leap_flatten.ops.reference import widest
from leap_shared import files
from leap_shared.checkpoints import load_into, write_safetensors
from leap_shared.errors import UserError
from leap_shared.vision.bodies import CSWinBlock

__all__ = ["SUFFIXES", "Conversion", "convert", "fuse_for_inference"]

SUFFIXES = (".pth", ".safetensors")
COMPUTED = ("relative_position_index", "attn_mask")

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        written: the file.
        variant: whose weights they are, but for head and image size; None where no variant of this package fits.
        tensors, parameters: how many tensors and numbers were in the file that was read, without tables of indices.
        sha256: of the file that was written.
        verified: what was found equal bit by bit in both files: "tensors and logits", "tensors" where no variant has
            exactly these shapes, or "nothing" where it was not asked for.
    """

    written: Path
    variant: str | None
    tensors: int
    parameters: int
    sha256: str
    verified: str


def convert(path_in: str | Path, path_out: str | Path, use_ema: bool = False, verify: bool = True) -> Conversion:
    """Weights of one file into a file of the other kind, bit by bit: .safetensors, or .pth in the authors' envelope.

    Index tables and masks are left out of a .safetensors; a .pth gets them again, so that the authors' code can load it
    strictly, where the weights are exactly a variant's.

    Args:
        path_in: the authors' .pth or a .safetensors.
        path_out: what to write; the ending says which kind.
        use_ema: take the moving average of the weights.
        verify: read the written file again and compare.

    Raises:
        UserError: an ending is unknown, the files are one, the first cannot be read, or the second not written.
    """
    source, target = Path(path_in), Path(path_out)
    for path in (source, target):
        if path.suffix not in SUFFIXES:
            raise UserError(f"{path} ends in {path.suffix or 'nothing'}: expected {' or '.join(SUFFIXES)}")
    if source.resolve() == target.resolve():
        raise UserError(f"{target} would replace the file that it is made of: give another name")
    state = read_official(source, use_ema=use_ema)
    names = variants_of(state)
    model = _exact(names, state)
    if target.suffix == ".pth":
        computed = {} if model is None else _computed(model)
        content = {name: value.detach().clone().contiguous() for name, value in {**state, **computed}.items()}
        with files.atomic_writer(target) as file:
            torch.save({"model": content}, file)
    else:
        write_safetensors(target, state, {"format": "pt", **({"model": names[0]} if names else {})})
    verified = _verify(target, state, model) if verify else "nothing"
    parameters = sum(value.numel() for value in state.values())
    return Conversion(target, names[0] if names else None, len(state), parameters, files.sha256(target), verified)


def _exact(names: list[str], state: Mapping[str, Tensor]) -> nn.Module | None:
    """The variant whose tensors have exactly the shapes of `state`, with these weights."""
    if not names:
        return None
    model: nn.Module = timm.create_model(names[0])
    try:
        load_into(model, state)
    except UserError:  # another head, or another image size
        return None
    return model.eval()


def _computed(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_buffers() if name.endswith(COMPUTED)}


def _verify(path: Path, state: Mapping[str, Tensor], model: nn.Module | None) -> str:
    again = read_official(path)
    differing = [name for name in {**state, **again} if not _same(state.get(name), again.get(name))]
    if differing:
        raise RuntimeError(f"{path}: {len(differing)} tensors are not those that were read: {differing[:5]}")
    if model is None:
        return "tensors"
    size: Any = model.img_size
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(image)
        load_into(model, again)
        after = model(image)
    if not _same(before, after):
        raise RuntimeError(f"{path}: the logits of the two files differ")
    return "tensors and logits"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors have the same bits."""
    if a is None or b is None or a.dtype != b.dtype or a.shape != b.shape:
        return False
    first, second = (x.contiguous().flatten().view(torch.uint8) for x in (a, b))
    return torch.equal(first, second)


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
