"""The authors' files and this package's: reading, fitting to another image size, naming the variant, writing."""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from leap_flatten import models  # registers the variants
from leap_flatten.attention import Focused
from leap_flatten.models.variants import VARIANTS, find
from leap_shared.checkpoints import Report, load_into, read, unwrap, write_safetensors
from leap_shared.errors import UserError
from leap_shared.vision.bodies import CSWinBlock, WindowAttention, drop_computed
from leap_shared.vision.bodies.grids import Size, resample_grid
from leap_shared.vision.optimisation import build_model

__all__ = ["create_model", "load_official", "read_official", "resize_tables", "save_safetensors", "variants_of"]

log = logging.getLogger(__name__)
HEAD = ("head.weight", "head.bias")
FAMILIES = {  # by what the names of their entries begin with
    "layers": "flatten_swin_.+",
    "pos_embed1": "flatten_pvt_[a-z]+",
    "norm4": "flatten_pvt_v2_.+",
    "stage1": "flatten_cswin_.+",
    "cls_token": "flatten_deit_.+",
}


def create_model(
    name: str,
    *,
    pretrained: bool | str | Path = False,
    checkpoint: str | Path | None = None,
    resize: bool = False,
    **options: Any,
) -> nn.Module:
    """A named variant, with the weights of a file where one is given.

    Args:
        name: of a variant, see `VARIANTS`.
        pretrained: the path of a checkpoint, as `checkpoint`; there is no address that weights could be fetched from.
        checkpoint: the authors' .pth or this package's .safetensors; with `num_classes` it may be for another number of
            classes, and the head then starts at zero.
        resize: take a file that is for another image size.
        **options: of the model's class, and timm's, as `num_classes`, `img_size`, `drop_path_rate` or `features_only`.

    Raises:
        UserError: the name is unknown, an option is impossible, or the file does not fit.
    """
    find(name)
    if pretrained is True:
        raise UserError(f"{name} has no weights to download: give the path of a file, checkpoint='flatten_swin_t.pth'")
    path = checkpoint or pretrained or None
    model = build_model(name, options)
    if path is not None and options.get("features_only"):
        rest = {key: value for key, value in options.items() if key not in ("features_only", "out_indices")}
        whole = timm.create_model(name, **{**rest, "num_classes": 0})
        load_official(whole, path, resize=resize, new_head=True)
        state = {f"model.{key}": value for key, value in whole.state_dict().items()}
        model.load_state_dict({key: state[key] for key in model.state_dict()})
    elif path is not None:
        load_official(model, path, resize=resize, new_head="num_classes" in options)
    return model


def read_official(path: str | Path, *, use_ema: bool = False) -> dict[str, Tensor]:
    """Weights of a file by the authors' names, without index tables and masks; its pickled config is never run.

    Args:
        path: a .pth (bare state dict, or in the authors' envelope) or a .safetensors.
        use_ema: take the moving average.

    Raises:
        UserError: the file is missing, damaged or no checkpoint, or has no moving average.
    """
    return drop_computed(unwrap(read(path, skip_foreign=True), ema=use_ema))


def load_official(
    model: nn.Module,
    path: str | Path,
    *,
    use_ema: bool = False,
    resize: bool = False,
    source_size: Size | None = None,
    new_head: bool = False,
) -> Report:
    """Load a file into a model, every entry or none.

    Args:
        model: one of this package's.
        path: see `read_official`.
        use_ema: see `read_official`.
        resize: resample tables where the file is for another image size, as the authors' fine-tuning loader does.
        source_size: height and width in pixels that the file is for, where the image was not square.
        new_head: zero the head where the file's has another number of classes, and leave the file's out where the model
            has none, instead of refusing the file.

    Returns:
        What was loaded; everything fits, or it raises.

    Raises:
        UserError: something does not fit: says what first, and which variant would.
    """
    state = read_official(path, use_ema=use_ema)
    if resize:
        state = resize_tables(model, state, source_size)
    own = model.state_dict()
    if new_head:
        state = _with_head(state, own, path)
    try:
        return load_into(model, state)
    except UserError as error:
        raise UserError(f"{path}: {error}. {_advice(model, state, resize)}") from error


def _with_head(state: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """The state with the head that a model of `own` needs: the file's, zeros, or none."""
    if "head.weight" not in own:
        return {name: value for name, value in state.items() if name not in HEAD}
    given = [state[name].shape[:1] for name in HEAD if name in state]
    if len(given) < len(HEAD) or given == [own[name].shape[:1] for name in HEAD]:
        return dict(state)  # what is missing or fits is for the strict loader to judge
    log.warning("%s: its head does not fit %d classes, so the head starts at zero", path, len(own["head.bias"]))
    return {**state, **{name: torch.zeros_like(own[name]) for name in HEAD}}


def _advice(model: nn.Module, state: Mapping[str, Tensor], resize: bool) -> str:
    own, ways = model.state_dict(), []
    shapes = [{name: value.shape for name, value in entries.items()} for entries in (own, state)]
    wrong = {name for name in own.keys() | state.keys() if shapes[0].get(name) != shapes[1].get(name)}
    sized = {name for name in wrong if _is_table(name) or ".get_v." in name}  # a small map has one branch of CSWin
    if sized and not resize:
        ways.append("another image size: pass resize=True")
    if wrong & set(HEAD):
        ways.append("other classes: pass new_head=True")
    if ways and wrong == sized | (wrong & set(HEAD)):
        return f"It is for {' and for '.join(ways)}"
    fitting = variants_of(state)
    if fitting:
        return f"It fits {' or '.join(fitting)}"
    return "It fits no variant of this package: is it one of the authors' classification checkpoints?"


def _is_table(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf.startswith("pos_embed") or leaf in (
        "positional_encoding",
        "relative_position_bias_table",
        "absolute_pos_embed",
    )


@cache
def _schema(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = timm.create_model(name)
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def variants_of(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the variants that a state dict fits: exactly, or else but for the head and the image size."""
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    count = sum(map(math.prod, shapes.values()))
    exact = [name for name, variant in VARIANTS.items() if variant.parameters == count and _schema(name) == shapes]
    if exact:
        return exact

    def body(of: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...] | None]:
        return {key: None if _is_table(key) else shape for key, shape in of.items() if not key.startswith("head.")}

    roots = {key.partition(".")[0] for key in shapes}
    patterns = [pattern for root, pattern in FAMILIES.items() if root in roots]
    candidates = [name for name in VARIANTS if any(re.fullmatch(pattern, name) for pattern in patterns)]
    return [name for name in candidates if body(_schema(name)) == body(shapes)]


def resize_tables(model: nn.Module, state: Mapping[str, Tensor], source_size: Size | None = None) -> dict[str, Tensor]:
    """State dict whose tables of another image size are resampled to the model's, by the rules of fine-tuning.

    Positional encodings, relative position biases and absolute embeddings: bicubic; PVT's `pos_embed`: bilinear. Where
    a stripe covers the map, a softmax block of CSWin has one branch, and at larger sizes two, of the same kernels.

    Raises:
        UserError: the file's grid can't be told from its tables: give `source_size`.
    """
    own = model.state_dict()
    resized = _rebranched(model, state)
    for name, value in state.items():
        if _is_table(name) and name in own and value.shape != own[name].shape and value.ndim == own[name].ndim:
            resized[name] = _resized(model, name, value, source_size)
    return resized


def _rebranched(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = dict(state)
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, CSWinBlock)}
    for (name, block), leaf in itertools.product(blocks.items(), ("weight", "bias")):
        first, second = (f"{name}.attns.{branch}.get_v.{leaf}" for branch in (0, 1))
        if block.plugged or first not in found:
            continue
        if len(block.attns) == 1 and second in found:
            found[first] = torch.cat((found[first], found.pop(second)))
        elif len(block.attns) == 2 and second not in found:
            found[first], found[second] = found[first].chunk(2)
    return found


def _resized(model: Any, name: str, table: Tensor, source_size: Size | None) -> Tensor:
    owner = model.get_submodule(name.rpartition(".")[0])
    image: Size = model.img_size
    if isinstance(owner, WindowAttention):
        old, new = math.isqrt(table.shape[0]), 2 * owner.window - 1
        if old * old != table.shape[0]:
            raise UserError(f"{name} has {table.shape[0]} rows: expected a square number")
        return resample_grid(table[None], (old, old), (new, new))[0]
    prefix = 0
    if isinstance(owner, Focused):
        grid, prefix = owner.grid, owner.prefix_tokens
    elif isinstance(model, models.FlattenDeiT):
        grid, prefix = model.grid, 1
    else:
        stage = int(name[-1]) - 1 if name[-1].isdigit() else 0
        grid = (image[0] // (4 << stage), image[1] // (4 << stage))
    old_grid = _grid_of(name, table.shape[1] - prefix, grid, image, source_size)
    mode = "bilinear" if isinstance(model, models.FlattenPVT) and name.startswith("pos_embed") else "bicubic"
    places = resample_grid(table[:, prefix:], old_grid, grid, mode)
    return torch.cat((table[:, :prefix], places), 1)


def _grid_of(name: str, count: int, grid: Size, image: Size, source_size: Size | None) -> Size:
    """Height and width of a file's table of `count` rows, for which the model has `grid` at the size `image`."""
    side = math.isqrt(count)
    guesses = [(side, side)]
    if source_size is not None:
        guesses = [(grid[0] * source_size[0] // image[0], grid[1] * source_size[1] // image[1]), *guesses]
    elif grid[0] != grid[1]:  # a stripe keeps its width; a map its ratio
        factor = math.sqrt(count / (grid[0] * grid[1]))
        scaled = (round(grid[0] * factor), round(grid[1] * factor))
        guesses = [*guesses, (count // grid[1], grid[1]), (grid[0], count // grid[0]), scaled]
    for guess in guesses:
        if guess[0] * guess[1] == count:
            return guess
    raise UserError(f"{name} has {count} rows, and nothing tells their height and width: pass source_size=(H, W)")


def save_safetensors(model: nn.Module, path: str | Path) -> None:
    """Write the model's weights under the authors' names, readable by `load_official` and by any safetensors reader.

    Raises:
        UserError: the folder is missing or not writable.
    """
    write_safetensors(Path(path), model.state_dict(), {"format": "pt", "model": type(model).__name__})
