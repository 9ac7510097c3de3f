"""Two paths into one, weights from Swin, PVT, DeiT and ViT, and files of other kinds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from leap_shared.checkpoints import rename, unwrap
from leap_shared.errors import UserError
from leap_shared.vision.bodies import Body, drop_computed
from leap_shared.vision.official import SUFFIXES, Conversion
from leap_slide.attention import MERGED
from leap_slide.checkpoints import OFFICIAL, merge_paths, read_official, slide_layers
from leap_slide.functional import merge_weights

__all__ = ["SUFFIXES", "Conversion", "Initialisation", "convert", "from_swin", "reparameterize", "reparameterize_file"]
__all__ += ["to_head_major", "to_packed"]

Module = TypeVar("Module", bound=nn.Module)
convert = OFFICIAL.convert


def reparameterize(model: Module, force: bool = False) -> Module:
    """The same model, in place, with one convolution where two paths are added (section 3.3); the same function.

    Where that is done already, nothing happens. Sets `model.reparameterized`. The two paths cannot be had back.

    Args:
        model: a model, or a `SlideAttention`.
        force: also in training mode.

    Raises:
        UserError: the model is in training mode: an optimiser would go on holding the parameters of the two paths, and
            train nothing.
    """
    layers = [layer for _, layer in slide_layers(model) if not layer.reparameterized]
    if layers and not force and (model.training or any(layer.training for layer in layers)):
        raise UserError(
            "the model is in training mode, and an optimiser would go on holding the parameters of the two paths: "
            "call model.eval() first, or pass force=True and make a new optimiser"
        )
    merge_paths(model)
    return model


def reparameterize_file(
    path_in: str | Path, path_out: str | Path, use_ema: bool = False, verify: bool = True
) -> Conversion:
    """Weights with two paths into a deploy file with one, of a model of any size.

    Args:
        path_in: a .pth in the authors' layout, or a .safetensors.
        path_out: what to write, .safetensors or .pth.
        use_ema: take the moving average of the weights.
        verify: read the written file again and compare.

    Raises:
        UserError: as `convert`, or the file has no two paths.
    """
    return convert(path_in, path_out, use_ema, verify, _merged)


def _merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that a model has after `reparameterize`."""
    found = dict(state)
    layers = [name.removesuffix("dep_conv1.weight") for name in state if name.endswith("dep_conv1.weight")]
    if not layers:
        deployed = any(f"{MERGED}." in name for name in state)
        raise UserError(
            "the file has one path already" if deployed else "the file has no two paths: expected dep_conv1.weight"
        )
    for layer in layers:
        fixed = [found.pop(f"{layer}dep_conv.{leaf}", None) for leaf in ("weight", "bias")]
        for learned, merged in (("dep_conv1", MERGED), ("dep_conv2", f"{MERGED}2")):
            weight, bias = (found.pop(f"{layer}{learned}.{leaf}", None) for leaf in ("weight", "bias"))
            if fixed[0] is not None and weight is not None:
                weight, bias = merge_weights(fixed[0], fixed[1], weight, bias)
                found |= {f"{layer}{merged}.weight": weight, f"{layer}{merged}.bias": bias}
    return found


def to_head_major(packed: Shaped[Tensor, "rows ..."], num_heads: int) -> Shaped[Tensor, "rows ..."]:
    """Weight or bias of a qkv projection: rows from [q | k | v] (Swin, timm) to [q k v] of one head after the other.

    Raises:
        UserError: the rows are no multiple of three times the heads.
    """
    _check_rows(packed, num_heads)
    return packed.reshape(3, num_heads, -1, *packed.shape[1:]).transpose(0, 1).reshape(packed.shape)


def to_packed(head_major: Shaped[Tensor, "rows ..."], num_heads: int) -> Shaped[Tensor, "rows ..."]:
    """Inverse of `to_head_major`."""
    _check_rows(head_major, num_heads)
    return head_major.reshape(num_heads, 3, -1, *head_major.shape[1:]).transpose(0, 1).reshape(head_major.shape)


def _check_rows(x: Tensor, num_heads: int) -> None:
    if num_heads < 1 or not x.shape[0] or x.shape[0] % (3 * num_heads):
        given = f"a projection of shape {tuple(x.shape)} and {num_heads} heads"
        raise UserError(f"{given}: expected a multiple of 3 * heads as the number of rows")


@dataclass(frozen=True)
class Initialisation:
    """What a model took from another's weights.

    Attributes:
        taken: its entries that were filled, in slide attention with rows in another order.
        resampled: its entries that were filled from tables of another size.
        left: its entries that stayed as they were.
        unused: entries of the source that have no place, by the authors' names.
    """

    taken: tuple[str, ...]
    resampled: tuple[str, ...]
    left: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        """One line of how many."""
        kinds = ("taken", "resampled", "left as initialised", "of the source unused")
        lists = (self.taken, self.resampled, self.left, self.unused)
        return ", ".join(f"{len(names)} {kind}" for names, kind in zip(lists, kinds, strict=True))


def from_swin(
    model: nn.Module,
    source: nn.Module | Mapping[str, Any] | str | Path,
    *,
    prefix: str = "",
    use_ema: bool = False,
) -> Initialisation:
    """Start a model, or one layer, from weights with softmax attention; what has no counterpart stays as it is.

    Rows of qkv projections are put in slide attention's order, those of PVT's q and kv joined; tables of windows and
    places are resampled where their size is another, and PVT's class token is left out. Kernels and relative biases of
    slide attention have no counterpart, as a head for other classes has not.

    Args:
        model: a `SlideSwin`, from Swin; a `SlidePVT` or `SlidePVTv2`, from PVT; or a `SlideAttention`, from an
            attention of Swin, PVT, DeiT or ViT.
        source: a model or layer, its state dict in any envelope, or a file of it, with the authors' names or timm's.
        prefix: what the names of the wanted entries begin with, as "blocks.0.attn." of a DeiT for a layer.
        use_ema: take the moving average of a file.

    Returns:
        What was taken, resampled, left and unused.

    Raises:
        UserError: the file cannot be read, nothing in it fits, or it has slide attention already.
    """
    if isinstance(source, str | Path):
        given = read_official(source, use_ema=use_ema)
    else:
        content = source.state_dict() if isinstance(source, nn.Module) else source
        given = drop_computed(unwrap(content, ema=use_ema))
    if any("dep_conv1." in name or f"{MERGED}." in name for name in given):
        raise UserError("these are weights of slide attention: use leap_slide.load_official")
    state = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    state = _in_slide_order(model, _official_names(state))
    resized = OFFICIAL.resize_tables(model, state) if isinstance(model, Body) else state
    own = model.state_dict()
    fitting = {name: value for name, value in resized.items() if name in own and value.shape == own[name].shape}
    if not fitting:
        names = ", ".join(list(given)[:3])
        raise UserError(
            f"nothing of these weights ({names}, ...) fits {type(model).__name__}: expected those of the same family "
            "and sizes, or for a layer a prefix, as prefix='blocks.0.attn.'"
        )
    model.load_state_dict(fitting, strict=False)
    resampled = tuple(name for name in fitting if fitting[name] is not state.get(name))
    return Initialisation(
        taken=tuple(name for name in fitting if name not in resampled),
        resampled=resampled,
        left=tuple(name for name in own if name not in fitting),
        unused=tuple(name for name in resized if name not in fitting),
    )


def _official_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of timm's Swin and PVTv2, or of PVT with its class token, by the names that models here have."""
    rows = [(r"^head\.fc\.", "head.")]
    if not any(name.startswith("layers.0.downsample.") for name in state):  # timm counts it to the stage behind
        rows += [(rf"^layers\.{stage}\.downsample\.", f"layers.{stage - 1}.downsample.") for stage in (1, 2, 3)]
    if any(name.startswith("stages.0.blocks.") for name in state):
        rows += [(r"^patch_embed\.", "patch_embed1."), (r"\.dwconv\.", ".dwconv.dwconv.")]
        for stage in range(4):
            parts = (("blocks", "block"), ("downsample", "patch_embed"), ("norm", "norm"))
            rows += [(rf"^stages\.{stage}\.{theirs}\.", f"{ours}{stage + 1}.") for theirs, ours in parts]
    found = rename(state, rows)
    if "cls_token" in found and "pos_embed4" in found:
        found["pos_embed4"] = found["pos_embed4"][:, 1:]
    return found


def _in_slide_order(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict with one projection, in head-major order, where the model has slide attention."""
    found = dict(state)
    for prefix, layer in slide_layers(model):
        for leaf, own in layer.qkv.named_parameters():
            name, apart = f"{prefix}qkv.{leaf}", [f"{prefix}{part}.{leaf}" for part in ("q", "kv")]
            if all(part in found for part in apart):
                found[name] = torch.cat([found.pop(part) for part in apart])
            if name in found and found[name].shape == own.shape and not layer.share_qkv:
                found[name] = to_head_major(found[name], layer.num_heads)
    return found
